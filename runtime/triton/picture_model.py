"""Whole pictures in Triton's Python backend: `image` and `mask` are the bytes of files, and so is `output`.

Picture handling is misf-run's. The network is asked of the model `misf` on the same server, whatever backend that has.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...plugins.shared.errors import MisfError
from ..engines.side_car import Limits
from ..inpainter import Inpainter
from .tensors import array_of, failure, parameters


class NetworkOfServer:
    """A `Backend` that asks another model of the same Triton server."""

    name = "triton"
    device = "cpu"
    checkpoint_sha256 = ""
    multiple = 1  # graphs and engines pad by themselves

    def __init__(self, model: str, facts: dict[str, Any]) -> None:
        self._model = model
        self.precision = self.file_precision = facts["precision"]
        self.config = facts["config"]
        limits = facts["limits"]
        self.limits = Limits(*(tuple(shape) for shape in limits)) if limits else None

    def __call__(self, image: NDArray[np.float32], mask: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the finished picture; arguments as in `Backend`."""
        import triton_python_backend_utils as utils

        request = utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=["output"],
            inputs=[utils.Tensor("image", image), utils.Tensor("mask", mask)],
        )
        response = request.exec()
        if response.has_error():
            raise MisfError(response.error().message())
        output: NDArray[np.float32] = utils.get_output_tensor_by_name(response, "output").as_numpy()
        return output


class TritonPythonModel:
    """Triton calls these methods by their names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what config.pbtxt says about the network."""
        given = parameters(args["model_config"])
        network = NetworkOfServer(given["network"], json.loads(given["facts"]))
        self._inpaint = Inpainter(network)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response per request."""
        import triton_python_backend_utils as utils

        responses = []
        for request in requests:
            try:
                image, mask = (bytes(array_of(request, name).reshape(-1)[0]) for name in ("image", "mask"))
                filled = self._inpaint.inpaint_file(image, mask)
            except Exception as error:  # one request's fault is its own
                responses.append(failure(error))
                continue
            tensor = utils.Tensor("output", np.array([filled], np.object_))
            responses.append(utils.InferenceResponse(output_tensors=[tensor]))
        return responses
