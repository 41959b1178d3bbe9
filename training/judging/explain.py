"""What the parts of a network do inside, for one picture: the two filters, and what each part adds to the fill."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...plugins.shared.errors import MisfError
from ...runtime.pictures.geometry import Mask
from ..model.network import InpaintingNetwork, network_input, reflect_to
from ..model.smooth_fill import refined

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """What one part of the network adds to the picture."""

    name: str
    picture: Array
    """H,W,3, the predicted picture as it is after this part."""
    change: Array
    """H,W,3, the difference from the picture before this part."""


@dataclass(frozen=True)
class FeatureFilter:
    """The filter of the features. Energy is the mean over the channels of the squared features."""

    factor: int
    """Pixels of the picture along one pixel of the features."""
    before: Array
    """ceil(H/factor),ceil(W/factor), energy."""
    after: Array
    means: dict[str, dict[str, float | None]]
    """Mean energy {"hole", "known"} x {"before", "after"}, weighted by area; None where there is no such area."""
    left_out: Array
    """H,W,3: the prediction minus what the network predicts without this filter."""


@dataclass(frozen=True)
class PictureFilter:
    """The filter of the picture: where each pixel's value came from."""

    factor: int
    """Pixels of the picture along one pixel of what is filtered."""
    taps: Array
    """h,w,3,K,K, with h,w = ceil(H/factor),ceil(W/factor)."""

    @property
    def offset(self) -> Array:
        """h,w,2: x and y from each pixel to the centre of mass of |taps|, in pixels of the picture; 0 if all are 0."""
        weight, (y, x) = self._weights()
        return np.stack([(weight * x).sum((2, 3)), (weight * y).sum((2, 3))], axis=-1) * np.float32(self.factor)

    @property
    def spread(self) -> Array:
        """h,w: root mean square distance of |taps| from their centre of mass, in pixels of the picture."""
        weight, (y, x) = self._weights()
        square = (weight * (x * x + y * y)).sum((2, 3)) * np.float32(self.factor**2)
        return np.asarray(np.sqrt(np.maximum(square - (self.offset**2).sum(-1), 0)))

    def _weights(self) -> tuple[Array, Array]:
        """Return |taps| over the channels, h,w,K,K with sum 1, and the rows and columns of the taps from the middle."""
        weight = np.abs(self.taps).sum(2)
        reach = self.taps.shape[-1] // 2
        grid = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
        return weight / np.maximum(weight.sum((2, 3), keepdims=True), np.finfo(np.float32).tiny), grid

    def cell(self, x: int, y: int) -> tuple[int, int]:
        """Return row and column, in `taps`, of a pixel of the picture."""
        return y // self.factor, x // self.factor


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns. Pictures are float32 H,W,3 RGB in [0,1]; the mask is bool H,W, True = hole."""

    image: Array
    hole: Mask
    prediction: Array
    known_mean: Array
    """3, the mean colour of the known pixels, 0.5 if there are none. With the changes of all parts it adds up to the
    prediction."""
    parts: list[Part]
    feature_filter: FeatureFilter | None
    picture_filter: PictureFilter | None


def explain(network: InpaintingNetwork, image: Array, hole: Mask) -> Explanation:
    """Return what the parts of `network` do to a picture.

    Args:
        network: in eval mode.
        image: float32 H,W,3 RGB in [0,1].
        hole: bool H,W, True = hole; at least one pixel.

    Raises:
        MisfError: the prediction is not finite.

    """
    config = network.config
    size = hole.shape
    picture = torch.from_numpy(np.array(image.transpose(2, 0, 1)[None]))
    mask = torch.from_numpy(hole[None, None].astype(np.float32))
    x = reflect_to(network_input(picture, mask), *map(config.padded_side, size))
    with torch.no_grad():
        run = _run(network, x)
        known_mean = image[~hole].mean(0) if not hole.all() else np.full(3, 0.5, np.float32)
        before, parts = np.broadcast_to(known_mean, image.shape), []
        for name, tensor in _pictures(network, x, run):
            after = _picture(tensor, hole)
            parts.append(Part(name, after, after - before))
            before = after
        prediction = _picture(run.prediction, hole)
        if not np.isfinite(prediction).all():
            raise MisfError("the network predicts NaN or infinity for this picture: use another checkpoint")
        feature_filter = picture_filter = None
        if config.feature_filter_level:
            without = _picture(_run(network, x, leave_out_feature_filter=True).prediction, hole)
            factor = config.scale << (config.feature_filter_level - 1)
            features, _, filtered = run.filters[0]
            feature_filter = _feature_filter(factor, features, filtered, hole, prediction - without)
        if config.image_filter:
            k = config.kernel_size
            taps = _cropped(run.filters[-1][1], hole, config.scale)
            picture_filter = PictureFilter(config.scale, taps.reshape(*taps.shape[:2], 3, k, k))
    return Explanation(image, hole, prediction, known_mean, parts, feature_filter, picture_filter)


@dataclass
class _Run:
    """What was seen of one run of a network: inputs and output of its filters, in order, and of some of its modules."""

    prediction: Tensor
    filters: list[tuple[Tensor, Tensor, Tensor]]
    modules: dict[str, tuple[tuple[Any, ...], Tensor]]


class _Filters(TorchFunctionMode):
    """Within this context the calls of the dynamic filter are recorded: features, taps, output."""

    def __init__(self, leave_out_first: bool) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self._leave_out_first = leave_out_first

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, or return the features as they are for a filter that is left out."""
        if func is not torch.ops.misf.dynamic_filter.default:
            return func(*args, **(kwargs or {}))
        output = args[0] if self._leave_out_first and not self.calls else func(*args)
        self.calls.append((args[0], args[1], output))
        return output


def _run(network: InpaintingNetwork, x: Tensor, leave_out_feature_filter: bool = False) -> _Run:
    """Return what the network does with its input N,4,H,W."""
    seen: dict[str, tuple[tuple[Any, ...], Tensor]] = {}
    with contextlib.ExitStack() as hooks:
        for name in ("stem", "head", "detail"):
            if (module := getattr(network, name)) is not None:

                def record(_: Any, inputs: tuple[Any, ...], output: Tensor, name: str = name) -> None:
                    seen[name] = (inputs, output)

                hooks.callback(module.register_forward_hook(record).remove)
        with _Filters(leave_out_feature_filter) as filters:
            prediction = network.predict(x)
    return _Run(prediction, filters.calls, seen)


def _pictures(network: InpaintingNetwork, x: Tensor, run: _Run) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each part and the picture N,3,H,W after it; the last picture is the prediction."""
    decoded = run.modules["head"][1]
    if network.detail is not None:
        border = network.stem.kernel_size[0] // 2
        base = run.modules["stem"][0][0][:, :3, border:-border, border:-border]
        decoded = base + decoded

    def shown(picture: Tensor) -> Tensor:
        """Return a picture as the branches make it as what the prediction would be without the parts after them."""
        if network.detail is None:
            return (torch.tanh(picture) + 1) / 2
        return refined(x, F.avg_pool2d(x, 2), picture)[1][0]

    if network.detail is not None:
        yield "smooth fill", shown(base)
    yield "layers", shown(decoded)
    if network.config.image_filter:
        yield "picture's filter", shown(run.filters[-1][2])
    if network.detail is not None:
        (_, _, full), detail = run.modules["detail"]
        yield "detail head", full[0] + detail
        yield "clipping", run.prediction


def _feature_filter(factor: int, before: Tensor, after: Tensor, hole: Mask, left_out: Array) -> FeatureFilter:
    maps = {
        name: _cropped(features.square().mean(1, keepdim=True), hole, factor)[..., 0]
        for name, features in (("before", before), ("after", after))
    }
    means: dict[str, dict[str, float | None]] = {}
    for place, mask in (("hole", hole), ("known", ~hole)):
        rows, columns = (side * factor - length for side, length in zip(maps["before"].shape, hole.shape, strict=True))
        plane = torch.from_numpy(np.pad(mask, ((0, rows), (0, columns))).astype(np.float32))[None, None]
        area = F.avg_pool2d(plane, factor)[0, 0].numpy()
        total = float(area.sum())
        means[place] = {name: float((area * energy).sum()) / total if total else None for name, energy in maps.items()}
    return FeatureFilter(factor, maps["before"], maps["after"], means, left_out)


def _picture(x: Tensor, hole: Mask) -> Array:
    """Return N,3,H,W without the network's padding, as H,W,3."""
    return _cropped(x, hole, 1)


def _cropped(x: Tensor, hole: Mask, factor: int) -> Array:
    """Return the first of N,C,h,w without the network's padding, as h,w,C; `factor` of the picture's pixels are one."""
    height, width = (-(-side // factor) for side in hole.shape)
    return np.ascontiguousarray(x[0, :, :height, :width].permute(1, 2, 0).float().numpy())


@dataclass(frozen=True)
class Point:
    """A pixel at which the picture's filter is looked at, and why."""

    x: int
    y: int
    why: str


def chosen_points(hole: Mask, found: PictureFilter) -> list[Point]:
    """Return up to four pixels in the hole: deepest in it, at its edge, farthest shift, widest spread of the taps."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(hole, 1))[1:-1, 1:-1]
    height, width = hole.shape
    factor = found.factor
    full = (slice(0, height), slice(0, width))
    length = np.hypot(*np.moveaxis(found.offset, -1, 0))
    shift, spread = (np.kron(plane, np.ones((factor, factor)))[full] for plane in (length, found.spread))
    deepest = np.unravel_index(np.argmax(depth), depth.shape)
    rows, columns = np.indices(hole.shape)
    apart = max(2 * factor, max(hole.shape) / 16)
    near = -np.hypot(rows - deepest[0], columns - deepest[1])
    wishes = (
        ("deepest in the hole", depth, hole),
        ("at the hole's edge", near, hole & (depth < 2)),
        ("farthest shift", shift, hole),
        ("widest spread", spread, hole),
    )
    points: list[Point] = []
    for why, value, where in wishes:
        free = where.copy()
        for point in points:  # none beside one that is there already
            free[np.hypot(rows - point.y, columns - point.x) < apart] = False
        if free.any():
            y, x = np.unravel_index(np.argmax(np.where(free, value, -np.inf)), free.shape)
            points.append(Point(int(x), int(y), why))
    return points


def steps(change: Array, hole: Mask) -> dict[str, float]:
    """Return the mean and the 95th percentile of |change| in the hole, H,W,3, in steps of 8 bits."""
    size = 255 * np.abs(change[hole].astype(np.float64))
    return {"mean": float(size.mean()), "percentile_95": float(np.percentile(size, 95))}
