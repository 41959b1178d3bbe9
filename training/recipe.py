"""How a network is trained: every setting of a run, saved with it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .model.config import NetworkConfig

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")
ADVERSARIAL = ("nsgan", "lsgan", "hinge")
TEACHER_WEIGHT = 1.0
"""Of the loss `teacher`, unless the recipe or the user says otherwise."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "none": {"feature_filter_level": 0, "image_filter": False},
    "image": {"feature_filter_level": 0, "image_filter": True},
    "semantic-1": {"feature_filter_level": 1, "image_filter": False},
    "semantic-2": {"feature_filter_level": 2, "image_filter": False},
    "semantic-3": {"feature_filter_level": 3, "image_filter": False},
    "both": {"feature_filter_level": 3, "image_filter": True},
}
"""The paper's ablations (arXiv 2203.06304, table 4), as the fields of NetworkConfig that they replace."""


@dataclass(frozen=True)
class Recipe:
    """Every setting of a training run; the defaults are the paper's (arXiv 2203.06304, section 4.1).

    A loss of weight 0 is switched off, together with everything that only this loss needs.

    Raises:
        ValueError: a setting is out of its range; the message names it.

    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    seed: int = 0
    steps: int = 450_000
    seconds: float = 0.0
    """If not 0, the run ends after this many seconds of training, or after `steps` if that is sooner, and the learning
    rate follows the clock. Meant for machines rented by the minute; such a run is not exactly reproducible."""
    batch: int = 8
    """Samples per step, summed over all processes and accumulated passes."""
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
    """L1 in the hole, plus the squared error and the L1 of 4x4 means (`losses.hole_loss`)."""
    hole_squared: float = 4.0
    hole_coarse: float = 0.5
    psnr: float = 0.0
    """Logarithm of the mean squared error in the hole, averaged over samples: the mean PSNR, up to a factor."""
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
    """Logarithm of the feature distance between composite and truth (`efficientnet.py`), averaged over samples."""
    grid: float = 0.0
    """How much of the fill's fine detail repeats every 16 pixels (`losses.grid_loss`)."""
    teacher: float = 0.0
    """The loss `hole`, of the fill of a trained network in place of the truth."""
    hole_patches: bool = False
    """The discriminator sees composites, and only patches near the hole count as fake."""
    adversarial_from: float = 0.0
    """The fraction of the run after which the discriminator and feature matching are switched on."""
    discriminator_width: int = 64

    optimizer: str = "adamw"
    """adamw, or muon for the weights and adamw for the biases (`optimizers.py`)."""
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.9)
    weight_decay: float = 0.0
    discriminator_rate: float = 0.1
    """The discriminator's learning rate as a fraction of the generator's; its optimizer is always Adam."""
    clip: float = 0.0
    """Maximum norm of the generator's gradient; 0 switches clipping off."""
    schedule: str = "constant"
    warm_up: int = 0
    """Number of steps over which the learning rate rises linearly to its full value."""
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        whole = {"steps": self.steps, "batch": self.batch, "accumulate": self.accumulate, "crop": self.crop}
        for name, value in whole.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch must be a multiple of accumulate, got {self.batch} and {self.accumulate}")
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
            raise ValueError(f"loss weights must be at least 0, and one of them above 0, got {self.weights}")
        if self.feature_matching and not self.adversarial:
            raise ValueError("feature_matching compares features of the discriminator: it needs adversarial above 0")
        for name in ("learning_rate", "discriminator_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("clip", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the generator's losses by name."""
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
            "grid",
            "teacher",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def needs_vgg(self) -> bool:
        """Whether a loss compares VGG-19 features."""
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
        """Return the recipe with the VGG-19 losses replaced by feature matching in the discriminator and `hole`.

        The discriminator is trained anyway and its features measure detail (pix2pixHD, arXiv 1711.11585, compares them
        with the same weight); the L1 of 4x4 means in `hole` keeps the colours of large holes right.
        """
        return replace(self, perceptual=0.0, style=0.0, feature_matching=10.0 * self.adversarial, hole=1.0)

    def to_json(self) -> str:
        """Return the recipe as a JSON object that includes the network's config."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Return the recipe saved by `to_json`.

        Raises:
            ValueError: not JSON, unknown keys, or a setting out of its range.

        """
        try:
            values = json.loads(text)
            network = NetworkConfig.from_json(json.dumps(values.pop("network")))
            unknown = sorted(set(values) - {item.name for item in fields(cls)})
            if unknown:
                raise ValueError(f"unknown keys {', '.join(unknown)}: was it written by another version of misf?")
            return cls(network=network, **values)
        except (KeyError, AttributeError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a training recipe of misf: {error}") from error


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
        steps=8_000,
        batch=8,
        zoom_out=1.25,
        shuffle_colors=True,
        l1=0.0,
        psnr=0.35,
        ssim=0.15,
        adversarial=0.1,
        adversarial_kind="hinge",
        hole_patches=True,
        feature_matching=20.0,
        distance=2.0,
        grid=3.0,
        perceptual=0.0,
        style=0.0,
        adversarial_from=0.01,
        discriminator_width=32,
        optimizer="muon",
        learning_rate=4e-3,
        betas=(0.5, 0.99),
        discriminator_rate=0.05,
        clip=1.0,
        schedule="cosine",
        warm_up=40,
        ema_decay=0.999,
    ),
}
"""`paper`: for Places2 or CelebA, takes days on a GPU. `fidelity`: PSNR and SSIM without a discriminator.
`looks`: a feature distance, a discriminator, and weaker PSNR and SSIM losses, for fills with texture."""
