"""How a network is trained: every number of a run, saved with it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .model.config import NetworkConfig

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")
ADVERSARIAL = ("nsgan", "lsgan", "hinge")
ABLATIONS: dict[str, dict[str, Any]] = {
    "none": {"feature_filter_level": 0, "image_filter": False},
    "image": {"feature_filter_level": 0, "image_filter": True},
    "semantic-1": {"feature_filter_level": 1, "image_filter": False},
    "semantic-2": {"feature_filter_level": 2, "image_filter": False},
    "semantic-3": {"feature_filter_level": 3, "image_filter": False},
    "both": {"feature_filter_level": 3, "image_filter": True},
}
"""Which filters a network has (arXiv 2203.06304, table 4): NetworkConfig fields to replace."""


@dataclass(frozen=True)
class Recipe:
    """Every number of a training run; the defaults are the paper's recipe (arXiv 2203.06304, section 4.1).

    A loss of weight 0 is switched off, with everything that only it needs.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    seed: int = 0
    steps: int = 450_000
    seconds: float = 0.0
    """If not 0, the run ends after this many seconds of training, or after `steps` if that is sooner, and the learning
    rate follows the clock: for machines that are rented by the minute. Such a run is not reproducible to the digit."""
    batch: int = 8
    """Samples per step, over all processes and accumulated passes."""
    accumulate: int = 1
    """Gradient accumulation: each batch is split into this many passes, to save memory."""
    crop: int = 256
    zoom_out: float = 1.0
    whole: bool = False
    shuffle_colors: bool = False
    """Shuffle each sample's colour channels, which makes a small collection six times as large."""

    l1: float = 1.0
    """L1 over the whole prediction, divided by the mask's mean."""
    hole: float = 0.0
    """L1 in the hole, with its square and that of its 4x4 means: `losses.hole_loss`."""
    hole_squared: float = 4.0
    hole_coarse: float = 0.5
    psnr: float = 0.0
    """Logarithm of the mean square in the hole, sample by sample: what the mean of PSNR measures."""
    ssim: float = 0.0
    """log(1 - SSIM) of the composite, averaged over samples."""
    known: float = 0.0
    """L1 outside the hole."""
    adversarial: float = 0.1
    adversarial_kind: str = "nsgan"
    perceptual: float = 0.1
    style: float = 250.0
    feature_matching: float = 0.0
    distance: float = 0.0
    """Logarithm of the finished picture's feature distance to the truth (`efficientnet.py`), sample by sample."""
    hole_patches: bool = False
    """The discriminator judges finished pictures, and takes only patches that the hole touches for false."""
    adversarial_from: float = 0.0
    """The share of the run after which the discriminator, and with it feature matching, begins."""
    discriminator_width: int = 64

    optimizer: str = "adamw"
    """adamw, or muon for the weights and adamw for the biases (`optimizers.py`)."""
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.9)
    weight_decay: float = 0.0
    discriminator_rate: float = 0.1
    """The discriminator's learning rate as a share of the generator's; its optimizer is always Adam."""
    clip: float = 0.0
    """The generator's gradients are scaled down to this norm; 0 leaves them."""
    schedule: str = "constant"
    warm_up: int = 0
    """Steps over which the learning rate rises to its value."""
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        whole = {"steps": self.steps, "batch": self.batch, "accumulate": self.accumulate, "crop": self.crop}
        for name, value in whole.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch must divide by accumulate, got {self.batch} and {self.accumulate}")
        if self.crop < self.network.minimum_side or self.crop % self.network.multiple:
            raise ValueError(
                f"crop must be a multiple of {self.network.multiple} and at least {self.network.minimum_side} for this "
                f"network, got {self.crop}"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.adversarial_kind not in ADVERSARIAL:
            raise ValueError(f"adversarial_kind must be one of {', '.join(ADVERSARIAL)}, got {self.adversarial_kind!r}")
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise ValueError(f"loss weights must not be negative, nor all 0, got {self.weights}")
        if self.feature_matching and not self.adversarial:
            raise ValueError("feature_matching compares the discriminator's features: it needs adversarial above 0")
        for name in ("learning_rate", "discriminator_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("clip", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, nor infinite, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be from 0 to below 1, got {self.ema_decay}")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every loss of the generator, by name."""
        names = (
            "l1",
            "hole",
            "psnr",
            "ssim",
            "known",
            "adversarial",
            "perceptual",
            "style",
            "feature_matching",
            "distance",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def needs_vgg(self) -> bool:
        """Whether VGG-19's features are compared."""
        return self.perceptual > 0 or self.style > 0

    def progress(self, step: int, elapsed_s: float = 0.0) -> float:
        """Return the fraction of the run completed at `step`, counted from 0, and `elapsed_s` seconds of training."""
        return max(step / self.steps, elapsed_s / self.seconds if self.seconds else 0.0)

    def rate(self, step: int, elapsed_s: float = 0.0) -> float:
        """Return the generator's learning rate for `step`, counted from 0, after `elapsed_s` seconds of training."""
        rate = self.learning_rate * min(1.0, (step + 1) / (self.warm_up + 1))
        if self.schedule == "cosine":
            rate *= 0.5 + 0.5 * math.cos(math.pi * min(self.progress(step, elapsed_s), 1.0))
        return rate

    def without_vgg(self) -> Recipe:
        """Return the recipe without VGG's losses; feature matching in the discriminator takes their place.

        The discriminator is there anyway, sees the same pictures, and its features are a learned measure of detail
        (pix2pixHD, arXiv 1711.11585, uses them so, with this weight); L1 of 4x4 means holds the colours of large holes.
        """
        return replace(self, perceptual=0.0, style=0.0, feature_matching=10.0 * self.adversarial, hole=1.0)

    def to_json(self) -> str:
        """Return the recipe as a JSON object, the network's config within."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Return the recipe saved by `to_json`; ValueError for anything else."""
        try:
            values = json.loads(text)
            network = NetworkConfig.from_json(json.dumps(values.pop("network")))
            unknown = sorted(set(values) - {item.name for item in fields(cls)})
            if unknown:
                raise ValueError(f"unknown keys {', '.join(unknown)}: was it written by another version of misf?")
            return cls(network=network, **values)
        except (KeyError, AttributeError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a training config of misf: {error}") from error


RECIPES: dict[str, Recipe] = {
    "paper": Recipe(),
    "fidelity": Recipe(
        steps=14_000,
        batch=8,
        zoom_out=1.25,
        shuffle_colors=True,
        l1=0.0,
        psnr=1.0,
        ssim=0.5,
        adversarial=0.0,
        perceptual=0.0,
        style=0.0,
        optimizer="muon",
        learning_rate=4e-3,
        betas=(0.9, 0.99),
        clip=1.0,
        schedule="cosine",
        warm_up=40,
        ema_decay=0.998,
    ),
    "looks": Recipe(
        steps=40_000,
        batch=16,
        crop=224,
        zoom_out=1.25,
        shuffle_colors=True,
        l1=0.0,
        psnr=0.3,
        ssim=0.15,
        adversarial=0.1,
        adversarial_kind="hinge",
        hole_patches=True,
        feature_matching=20.0,
        distance=0.5,
        perceptual=0.0,
        style=0.0,
        adversarial_from=0.05,
        discriminator_width=48,
        optimizer="muon",
        learning_rate=4e-3,
        betas=(0.5, 0.99),
        discriminator_rate=0.05,
        clip=1.0,
        schedule="cosine",
        warm_up=40,
        ema_decay=0.998,
    ),
}
"""`paper`: Places2 or CelebA, days on a GPU. `fidelity`: no adversary, PSNR and SSIM first.
`looks`: fidelity, then sharp fills; of the shipped misf-small."""
