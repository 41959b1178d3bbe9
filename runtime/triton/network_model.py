"""The network in Triton's Python backend: `image` N,3,H,W and `mask` N,1,H,W to `output` N,3,H,W, all float32."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import open_backend
from .tensors import array_of, failure, parameters


class TritonPythonModel:
    """Triton calls these methods by their names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model file that lies beside model.py."""
        given = parameters(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"
        threads = int(given["threads"]) if given.get("threads") else None
        self._backend = open_backend(folder / given["file"], given.get("backend", "auto"), device, threads=threads)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response per request; those of one size run as one batch."""
        import triton_python_backend_utils as utils

        responses: list[Any] = [None] * len(requests)
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        inputs: dict[int, tuple[Any, Any]] = {}
        for number, request in enumerate(requests):
            try:
                image, mask = array_of(request, "image"), array_of(request, "mask")
                if image.shape[:1] + image.shape[2:] != mask.shape[:1] + mask.shape[2:]:
                    raise ValueError(f"image {image.shape} and mask {mask.shape} must agree in N, H and W")
                inputs[number] = image, mask
                groups[image.shape[2:]].append(number)
            except Exception as error:  # one request's fault is its own
                responses[number] = failure(error)
        for numbers in groups.values():
            try:
                image, mask = (np.concatenate([inputs[number][part] for number in numbers]) for part in (0, 1))
                output = self._backend(image, mask)
            except Exception as error:
                for number in numbers:
                    responses[number] = failure(error)
                continue
            parts = np.split(output, np.cumsum([len(inputs[number][0]) for number in numbers])[:-1])
            for number, part in zip(numbers, parts, strict=True):
                tensor = utils.Tensor("output", np.ascontiguousarray(part))
                responses[number] = utils.InferenceResponse(output_tensors=[tensor])
        return responses
