"""Makes official.npz, the output of the official MISF generator for known weights and a known picture.

    git clone https://github.com/tsingqguo/misf && python tests/training/golden/make_official.py misf

The weights are random but reproducible from their names alone (`official_weights`), so that only names, shapes and
outputs are stored. Uniform He initialisation keeps every layer active; the taps of the image filter are scaled down so
that the final tanh does not hide differences by saturating. The file was made once with the official repository at
775ef7d and torch 2.13.0 on a CPU.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

GOLDEN = Path(__file__).with_name("official.npz")
SIZE = 256


def official_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return float32 weights that depend only on the names and shapes of the official parameters."""
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 100
        bound = np.sqrt(6 / fan_in) * (0.4 if "core_img" in name else 1.0)
        weights[name] = torch.from_numpy(((rng.random(shape) * 2 - 1) * bound).astype(np.float32))
    return weights


def picture_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a picture 1,3,256,256 in [0,1] (waves and noise) and a mask 1,1,256,256 with a box and a bar as hole."""
    rng = np.random.Generator(np.random.PCG64(1))
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    waves = np.stack([np.sin(2 * np.pi * (a * x + b * y)) for a, b in ((1, 2), (3, -1), (-2, 2))])
    picture = np.clip(0.5 + 0.35 * waves + 0.2 * (rng.random((3, SIZE, SIZE)) - 0.5), 0, 1).astype(np.float32)
    mask = np.zeros((1, SIZE, SIZE), np.float32)
    mask[:, 60:150, 90:200] = 1
    mask[:, 200:206] = 1
    return torch.from_numpy(picture)[None], torch.from_numpy(mask)[None]


def stored(answer: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the stored parts of the generator's output 1,3,256,256: every fourth pixel, and one whole patch."""
    return {"every_fourth": answer[0, :, ::4, ::4].numpy(), "patch": answer[0, :, 120:160, 180:220].numpy()}


def main(repository: str) -> None:
    sys.path.insert(0, repository)
    from src.networks import InpaintGenerator  # the official code

    generator = InpaintGenerator(SimpleNamespace(FILTER_TYPE="", kernel_size=[3])).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in generator.state_dict().items()}
    generator.load_state_dict(official_weights(shapes))
    picture, mask = picture_and_mask()
    with torch.no_grad():
        answer = generator(torch.cat([picture * (1 - mask), mask], 1))
    print(f"{len(shapes)} tensors; answer from {answer.min():.3f} to {answer.max():.3f}, std {answer.std():.3f}")
    names = np.array(list(shapes))
    sizes = np.array([(*shape, *(0,) * (4 - len(shape))) for shape in shapes.values()], np.int32)
    np.savez_compressed(GOLDEN, names=names, shapes=sizes, **stored(answer))


if __name__ == "__main__":
    main(sys.argv[1])
