"""The network's sizes and wiring, as saved in every checkpoint and in the ONNX metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

MULTIPLE = 4
"""The network halves the resolution twice, so that the layers need heights and widths that are multiples of this."""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes and wiring of an `InpaintingNetwork`; the defaults are the published model's.

    The paper's ablations (arXiv 2203.06304, table 4) are settings of `feature_filter_level` and `image_filter`.

    Raises:
        ValueError: a size is out of its range or does not fit the others; the message names it.

    """

    width: int = 64
    """Channels of the filtering branch at full resolution; doubled at 1/2 and again at 1/4."""
    prediction_width: int = 64
    """Channels of the prediction branch at full resolution; x2, x4, x8 at the lower ones."""
    prediction_convs: int = 3
    """3x3 convolutions per block of the prediction branch."""
    residual_dilations: tuple[int, ...] = (2,) * 8
    """One entry per residual block: the dilation of its first convolution."""
    kernel_size: int = 3
    """Side K of the K x K taps of both dynamic filters."""
    share: int = 4
    """Number of consecutive taps of the feature filter that share one predicted channel; 1 in the image filter."""
    feature_filter_level: int = 3
    """Resolution at which features are filtered: 1 full, 2 half, 3 quarter (the published model); 0 for no filter."""
    image_filter: bool = True
    """Whether the three output channels are filtered."""
    normalize: bool = True
    """Whether the filtering branch has instance norms. Without them a pixel depends only on its surroundings, not on
    the statistics of the whole picture, so that training on small crops carries over to large pictures."""
    detail: int = 0
    """Channels at full resolution of the head that adds detail (`network.Detail`); 0 for the published wiring. With a
    head, holes are first filled smoothly from their surroundings, both branches work at a quarter of the resolution, at
    a sixteenth of the cost, and the head adds what that resolution cannot show."""

    working_size: int = 256
    """Side in pixels of the squares that the runtime gives to the network: about the size it was trained at or, without
    instance norms, a size at which it fills equally well."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "residual_dilations", tuple(self.residual_dilations))
        integers = [self.width, self.prediction_width, self.prediction_convs, self.share, *self.residual_dilations]
        integers += [self.kernel_size, self.feature_filter_level, self.detail]
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in [*integers, self.working_size]):
            raise ValueError(f"NetworkConfig expects whole numbers, got {self}")
        if not all(isinstance(value, bool) for value in (self.image_filter, self.normalize)):
            raise ValueError(f"image_filter and normalize must be true or false, got {self}")
        if min(integers[:-2]) < 1 or max(integers) > 1024 or len(self.residual_dilations) > 64:
            raise ValueError(f"NetworkConfig sizes must be within 1..1024 (64 residual blocks), got {self}")
        if self.kernel_size % 2 == 0 or self.kernel_size > 15:
            raise ValueError(f"kernel_size must be odd and at most 15, got {self.kernel_size}")
        if self.detail < 0:
            raise ValueError(f"detail must be at least 0, got {self.detail}")
        if not 64 <= self.working_size <= 8192:
            raise ValueError(f"working_size must be within 64..8192 pixels, got {self.working_size}")
        if self.feature_filter_level not in (0, 1, 2, 3):
            raise ValueError(f"feature_filter_level must be 0, 1, 2 or 3, got {self.feature_filter_level}")
        if self.feature_filter_level and self.filtered_channels * self.kernel_size**2 % self.share:
            raise ValueError(
                f"share must divide the {self.filtered_channels} filtered channels x {self.kernel_size**2} taps, "
                f"got {self.share}"
            )

    @property
    def filtered_channels(self) -> int:
        """Number of channels of the filtered feature map."""
        return self.width << max(self.feature_filter_level - 1, 0)

    @property
    def feature_taps(self) -> int:
        """Number of channels of the feature filter's taps; 576 in the published model."""
        return self.filtered_channels * self.kernel_size**2 // self.share

    @property
    def prediction_levels(self) -> int:
        """Number of resolutions of the prediction branch: 4 (with a decoder) for the image filter, else as needed."""
        return 4 if self.image_filter else self.feature_filter_level

    @property
    def scale(self) -> int:
        """The branches work at 1/scale of the resolution."""
        return 4 if self.detail else 1

    @property
    def multiple(self) -> int:
        """Height and width inside the network must be multiples of this."""
        return MULTIPLE * self.scale

    @property
    def minimum_side(self) -> int:
        """Smallest height and width inside the network: reflection padding needs more pixels than it adds."""
        return self.multiple * (max(self.residual_dilations, default=1) + 1)

    def padded_side(self, side: int) -> int:
        """Return the height or width that the network works at for a picture of `side` pixels."""
        return max(self.minimum_side, -(-side // self.multiple) * self.multiple)

    def to_json(self) -> str:
        """Return the config as one JSON object with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> NetworkConfig:
        """Return the config saved by `to_json`.

        Raises:
            ValueError: not JSON, unknown keys (a newer misf?), or sizes out of range.

        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the network config must be JSON, got {text[:80]!r}") from error
        if not isinstance(values, dict):
            raise ValueError(f"the network config must be a JSON object, got {text[:80]!r}")
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown network config keys {', '.join(unknown)}: was it written by another misf?")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"the network config does not fit: {error}") from error


PRESETS: dict[str, NetworkConfig] = {
    "misf": NetworkConfig(),
    "misf-small": NetworkConfig(
        width=24,
        prediction_width=8,
        prediction_convs=2,
        residual_dilations=(2, 4, 8, 4),
        normalize=False,
        detail=16,
        working_size=512,
    ),
    "misf-tiny": NetworkConfig(width=8, prediction_width=8, prediction_convs=1, residual_dilations=(2, 2)),
}
"""`misf`: the published sizes (23.06 M parameters). `misf-small`: the shipped one. `misf-tiny`: for tests."""
