"""TensorRT's engine inspector on a finished engine: types, layers by kind, formats at the filters.

TensorRT 10 writes 'Format/Datatype' in words, TensorRT 11 separate 'Format' and 'DataType'. For tensors with a dynamic
shape it writes only "N/A due to dynamic shapes", so that an unknown type is not an error.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ...plugins.shared.errors import AccuracyError

log = logging.getLogger(__name__)

_TENSOR_KEYS = ("Format/Datatype", "Format/DataType", "Format", "DataType")
_UNKNOWN = re.compile(r"^N/A|^\s*$")
# Types appear in words or in a tactic's name, such as sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_...
_FP16 = re.compile(r"half|fp16|float16|f16f16", re.IGNORECASE)
_FP32 = re.compile(r"float|fp32|f32f32", re.IGNORECASE)


def inspect(trt: Any, engine: Any, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the inspector's JSON of a loaded engine with `shapes` as input shapes, which add to the information."""
    inspector = engine.create_engine_inspector()
    # USER_MANAGED allocates no memory, and none is needed here.
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is not None and all(context.set_input_shape(name, shape) for name, shape in shapes.items()):
        inspector.execution_context = context
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return text


def inspected_types(information: str) -> dict[str, int]:
    """Return the numbers of 'fp16', 'fp32' and 'unknown' tensors, weights and kernels of an engine."""
    counts: Counter[str] = Counter()
    for layer in _layers(information):
        weights = [part for part in (layer.get("Weights"), layer.get("Bias")) if isinstance(part, dict)]
        said = [*map(_format, _tensors(layer)), *(str(part.get("Type", "")) for part in weights)]
        said += [str(layer["TacticName"])] if "TacticName" in layer else []
        for text in said:
            if _FP16.search(text):
                counts["fp16"] += 1
            elif _FP32.search(text):
                counts["fp32"] += 1
            elif _UNKNOWN.search(text):
                counts["unknown"] += 1
    return dict(counts)


def inspected_proof(asked: str, information: str, name: str) -> str:
    """Return the proof of the requested precision: "engine", or "network" if the inspector does not know.

    Raises:
        AccuracyError: fp16 was requested and the engine `name`, all of whose types are known, has none.

    """
    types = inspected_types(information)
    log.debug("tensors, weights and kernels of %s: %s", name, types)
    if asked == "fp16" and types and not types.keys() & {"fp16", "unknown"}:
        raise AccuracyError(f"fp16 was requested but no layer of {name} runs in it (inspector: {types})")
    return "engine" if asked in types else "network"


def inspected_layers(information: str) -> dict[str, Any]:
    """Return {"kinds": {type of layer: number}, "reformats": number, "filters": {name: formats of inputs and output}}.

    Filters are layers of the plugin; without it there are none. The result is empty if the inspector only names layers.
    """
    layers = list(_layers(information))
    kinds = Counter(str(layer.get("LayerType", "unknown")) for layer in layers)
    filters = {
        str(layer.get("Name", "")): [_format(tensor) or "unknown" for tensor in _tensors(layer)]
        for layer in layers
        if "plugin" in str(layer.get("LayerType", "")).lower()
    }
    return {"kinds": dict(kinds.most_common()), "reformats": kinds["Reformat"], "filters": filters} if layers else {}


def _layers(information: str) -> Iterator[dict[str, Any]]:
    """Yield the layers; none if the inspector only names them."""
    yield from (layer for layer in json.loads(information).get("Layers", []) if isinstance(layer, dict))


def _tensors(layer: dict[str, Any]) -> list[dict[str, Any]]:
    return [tensor for key in ("Inputs", "Outputs") for tensor in layer.get(key) or [] if isinstance(tensor, dict)]


def _format(tensor: dict[str, Any]) -> str:
    return " ".join(str(tensor[key]) for key in _TENSOR_KEYS if key in tensor)
