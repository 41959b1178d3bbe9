"""What both models need of Triton's Python backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...plugins.shared.errors import MisfError


def array_of(request: Any, name: str) -> Any:
    """Return an input of a request as an array.

    Raises MisfError where the server is too old for NumPy 2, which would hand over empty arrays without an error.
    """
    import triton_python_backend_utils as utils

    array = utils.get_input_tensor_by_name(request, name).as_numpy()
    if array.size == 0 and int(np.__version__.split(".")[0]) >= 2:
        raise MisfError(
            f"{name} is empty: this server may be too old for NumPy {np.__version__}; install numpy<2 beside it"
        )
    return array


def failure(error: Exception) -> Any:
    """Return the response of a request that failed, with the error's one line."""
    import triton_python_backend_utils as utils

    from ...plugins.shared.command import one_line

    return utils.InferenceResponse(error=utils.TritonError(one_line(error)))


def parameters(model_config: str) -> dict[str, str]:
    """Return the parameters of config.pbtxt, as Triton hands them over: JSON with a string_value each."""
    import json

    found = json.loads(model_config).get("parameters", {})
    return {name: value["string_value"] for name, value in found.items()}
