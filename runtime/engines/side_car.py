"""The side-car of an engine, X.plan.json: what the plan was built from, and for which machine.

A plan only works with its version of TensorRT, its GPU and its plugin, and TensorRT's checks give long messages or
none. So the side-car records what the plan needs, and this is checked before the plan is loaded. The plan itself is an
ordinary plan, which trtexec and Triton can read.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...plugins.shared.errors import EnvironmentMismatch, MisfError
from ...plugins.shared.files import sha256, written_whole

FORMAT = 1
OLDEST_RTX = 8  # Ampere
MAGICS = (b"ftrt", b"vtrt")
"""First bytes of the plans of TensorRT and of TensorRT for RTX."""

Shape = tuple[int, int, int]
"""N, H, W."""


@dataclass(frozen=True)
class Limits:
    """The minimum, optimum and maximum shapes of an engine, N, H, W each."""

    min: Shape
    opt: Shape
    max: Shape

    def fault(self, n: int, height: int, width: int) -> str | None:
        """Return why the engine does not support a shape, or None if it does."""
        shape = (n, height, width)
        if all(low <= side <= high for low, side, high in zip(self.min, shape, self.max, strict=True)):
            return None
        (n0, h0, w0), (n1, h1, w1) = self.min, self.max
        return f"expected {n0} to {n1} pictures of {h0}x{w0} to {h1}x{w1} (height x width), got {n} of {height}x{width}"


@dataclass(frozen=True)
class EngineInfo:
    """The contents of a side-car."""

    plan_sha256: str
    plan_bytes: int
    flavor: str
    """tensorrt or tensorrt-rtx."""
    version: str
    """Version of that flavor; a plan runs on no other."""
    platform: str
    """Operating system and processor, such as 'Linux x86_64'."""
    gpu: str | None
    """Name of the GPU that it was tuned on; None if there was none (TensorRT for RTX tunes when it loads)."""
    compute_capability: str | None
    precision_asked: str
    precision_obtained: str
    precision_proof: str
    """network: from the types of the parsed network; engine: also from the inspector on the finished engine."""
    convolutions: dict[str, int]
    """Number of convolutions by type."""
    limits: Limits
    config: dict[str, Any]
    """The network's config, from the ONNX file."""
    onnx: str
    onnx_sha256: str
    checkpoint_sha256: str
    plugin: str | None = None
    """File name of the plugin library; None for an engine without it."""
    plugin_sha256: str | None = None
    layers: dict[str, Any] = field(default_factory=dict)
    """Layers by type, reformats, and formats at the filters (`inspector.inspected_layers`)."""
    settings: dict[str, Any] = field(default_factory=dict)
    misf: str = ""

    def to_json(self) -> str:
        """Return the side-car as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"


def side_car(plan: Path) -> Path:
    """Return the path of a plan's side-car."""
    return plan.with_name(plan.name + ".json")


def this_platform() -> str:
    """Return this machine's operating system and processor, to which plans are bound."""
    return f"{platform.system()} {platform.machine()}"


@contextlib.contextmanager
def _restored_on_failure(path: Path) -> Iterator[None]:
    """Restore a file, or remove it if it is new, when the block fails."""
    before = path.read_bytes() if path.is_file() else None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if before is None:
                path.unlink()
            elif path.read_bytes() != before:
                path.write_bytes(before)
        raise


def write_engine(plan: Path, data: Any, info: EngineInfo) -> None:
    """Write a plan (the buffer `data`) and its side-car, both or neither; info.plan_* describe the plan."""
    with _restored_on_failure(side_car(plan)), written_whole(plan) as temporary_plan:
        temporary_plan.write_bytes(data)
        with written_whole(side_car(plan)) as temporary_side_car:
            temporary_side_car.write_text(info.to_json())


def read_info(plan: Path) -> EngineInfo:
    """Return the side-car of a plan, after comparing it with the plan's bytes.

    Raises:
        EnvironmentMismatch: there is no side-car.
        MisfError: the file is not a plan, is truncated or not the plan of its side-car, or the side-car is damaged.

    """
    with plan.open("rb") as file:
        magic = file.read(4)
    path = side_car(plan)
    if not path.is_file():
        if magic not in MAGICS:
            raise MisfError(f"{plan} is not a TensorRT engine: make one with misf-build MODEL.onnx -o {plan}")
        raise EnvironmentMismatch(
            f"{plan} has no side-car {path.name}, which says what it was built for: copy it from where the plan was "
            "built, or build the plan here with misf-build"
        )
    info = _parse(path)
    size = plan.stat().st_size
    if size != info.plan_bytes:
        fate = "is truncated" if size < info.plan_bytes else "is not the plan of its side-car"
        raise MisfError(f"{plan} {fate}: {size} bytes instead of {info.plan_bytes}; copy or build it again")
    if sha256(plan) != info.plan_sha256:
        raise MisfError(f"{plan} is not the plan that {path.name} describes, or is damaged: copy or build it again")
    return info


def _parse(path: Path) -> EngineInfo:
    try:
        fields = json.loads(path.read_text())
        if fields.pop("format") != FORMAT:
            raise ValueError("its format is not 1: it was written by another version of misf")
        limits = {name: _shape(fields["limits"][name]) for name in ("min", "opt", "max")}
        info = EngineInfo(**{**fields, "limits": Limits(**limits)})
        if info.flavor not in ("tensorrt", "tensorrt-rtx") or not isinstance(info.config, dict):
            raise ValueError(f"unknown flavor {info.flavor!r}")
        return info
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MisfError(f"{path} is a damaged side-car ({error}): build the engine again with misf-build") from error


def _shape(sides: list[int]) -> Shape:
    n, height, width = (int(side) for side in sides)
    return n, height, width


def check_flavor(plan: Path, info: EngineInfo, version: str, title: str) -> None:
    """Raise EnvironmentMismatch unless the plan was built with this version of its flavor of TensorRT."""
    if info.version != version:
        raise EnvironmentMismatch(
            f"{plan} was built with version {info.version} and runs on no other version, but this is {title}: "
            f"build it here with misf-build {info.onnx}"
        )


def check_machine(plan: Path, info: EngineInfo) -> None:
    """Raise EnvironmentMismatch unless the plan is for this operating system and processor, or for any (RTX)."""
    if info.flavor == "tensorrt" and info.platform != this_platform():
        raise EnvironmentMismatch(
            f"{plan} was built on {info.platform}, this is {this_platform()}: build it here with misf-build {info.onnx}"
        )


def check_gpu(plan: Path, info: EngineInfo, compute_capability: str) -> None:
    """Raise EnvironmentMismatch unless the plan was built for GPUs of this compute capability.

    According to NVIDIA's documentation, plans of TensorRT for RTX run on every GPU from Ampere (8.0) on.
    """
    if info.flavor == "tensorrt-rtx" and int(compute_capability.partition(".")[0]) < OLDEST_RTX:
        raise EnvironmentMismatch(
            f"{plan} is for TensorRT for RTX on GPUs of compute capability {OLDEST_RTX}.0 and later, this GPU has "
            f"{compute_capability}: build it with misf-build --backend tensorrt"
        )
    if info.compute_capability not in (None, compute_capability):
        raise EnvironmentMismatch(
            f"{plan} was built for {info.gpu} (compute capability {info.compute_capability}), this GPU has "
            f"{compute_capability}: build it here with misf-build {info.onnx}"
        )
