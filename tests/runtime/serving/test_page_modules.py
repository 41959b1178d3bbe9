"""The page's modules without a browser: what JavaScript computes in Node is what Python computes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt

from misf.runtime.pictures.canvas import resize
from misf.runtime.pictures.crops import plan_crops
from misf.runtime.pictures.masks import grown_mask
from misf.runtime.pictures.settings import CropSettings

MODULES = Path(__file__).parents[3] / "runtime/serving/page/js"
Node = Callable[[str, NDArray[Any], dict[str, Any]], Any]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """Run a script in Node: it finds an array's `bytes` and `options`, and its `answer` comes back."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("no Node here: the page's modules are not compared with Python")
    folder = tmp_path_factory.mktemp("modules")
    shutil.copytree(MODULES, folder / "js")
    (folder / "package.json").write_text('{"type": "module"}')

    def run(script: str, array: NDArray[Any], options: dict[str, Any]) -> Any:
        (folder / "array").write_bytes(np.ascontiguousarray(array).tobytes())
        head = f"import {{ readFileSync }} from 'fs'; const options = {json.dumps(options)}; let answer;"
        head += "const bytes = new Uint8Array(readFileSync('array'));"
        (folder / "script.js").write_text(f"{head}\n{script}\nconsole.log(JSON.stringify(answer));")
        done = subprocess.run(
            [program, "script.js"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def _masks(rng: np.random.Generator) -> list[NDArray[np.bool_]]:
    """Strokes, discs, specks and noise, of awkward sizes."""
    masks = [np.ones((1, 1), np.bool_), np.zeros((9, 7), np.bool_), np.ones((3, 9000), np.bool_)]
    y, x = np.ogrid[:1500, :2000]
    masks += [np.abs(y - x) < 5, ((y - 700) ** 2 + (x - 900) ** 2 < 400**2) | (np.abs(y - x) < 5)]
    masks += [((y - 700) ** 2 + (x - 900) ** 2 < 40**2) | (np.hypot(y - 700, x - 900) // 9 == 30)]
    for number in range(40):
        height, width = rng.integers(1, 1700, 2)
        y, x = np.ogrid[:height, :width]
        mask = rng.random((height, width)) < rng.choice([0, 0.0001, 0.01])
        for _ in range(rng.integers(1, 9)):
            top, left, radius = rng.integers(0, height), rng.integers(0, width), rng.integers(1, 350)
            slope, thickness = rng.normal(), rng.integers(1, 60)
            if number % 3:
                mask |= (y - top) ** 2 + (x - left) ** 2 < radius**2
            if number % 2:
                mask |= np.abs((y - top) - slope * (x - left)) < thickness
        masks.append(mask)
    return masks


def test_crops_are_planned_as_in_python(node: Node, rng: np.random.Generator) -> None:
    """Boxes, sizes, and every hole pixel of every crop, whatever the settings."""
    choices: list[dict[str, Any]] = [{"working_size": 512}, {"working_size": 256}, {"working_size": 300, "margin": 7}]
    choices += [{"strategy": "resize", "working_size": 256}, {"strategy": "crop", "working_size": 512, "margin": 90}]
    masks = _masks(rng)
    cases = [(mask, choices[number % len(choices)]) for number, mask in enumerate(masks)]
    script = """
    import { planCrops } from './js/crops.js';
    let at = 0;
    answer = options.map(({ height, width, working_size, strategy = 'auto', margin = null }) => {
      const data = bytes.subarray(at, (at += height * width));
      return planCrops({ data, width, height }, { strategy, workingSize: working_size, margin }).map((crop) => [
        Object.values(crop.box), crop.size, Object.values(crop.core), crop.hole.data.reduce((a, b) => a + b, 0),
        crop.hole.data.reduce((sum, value, place) => (sum + value * ((place % 65521) + 1)) % 1000003, 0),
      ]);
    });"""
    options: Any = [{"height": mask.shape[0], "width": mask.shape[1], **settings} for mask, settings in cases]
    found = node(script, np.concatenate([mask.ravel() for mask, _ in cases]), options)
    crops_seen = 0
    for (mask, settings), crops in zip(cases, found, strict=True):
        expected = []
        for crop in plan_crops(mask, CropSettings(**settings)):
            places = np.flatnonzero(crop.hole)
            digest = int(((places % 65521) + 1).sum() % 1000003)
            expected.append([list(crop.box), list(crop.size), list(crop.core), len(places), digest])
        assert crops == expected, (mask.shape, settings)
        crops_seen += len(crops)
    assert crops_seen > 200


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_pictures_are_resized_as_pillow_does(node: Node, rng: np.random.Generator, kind: str) -> None:
    """Down, up, and one side only. 8 bits, as a picture is read, are equal; floats, as a fill, to a unit or two."""
    script = """
    import { resize } from './js/resize.js';
    const data = options.kind === 'uint8' ? bytes : new Float32Array(bytes.buffer);
    answer = Array.from(resize(data, 3, options.from, options.to, options.filter));"""
    for source, target in (((61, 83), (17, 40)), ((40, 31), (97, 64)), ((50, 20), (50, 33)), ((700, 9), (300, 9))):
        for name in ("bilinear", "bicubic"):
            smooth = name == "bicubic"
            if kind == "uint8":
                array: NDArray[Any] = rng.integers(0, 256, (*source, 3), np.uint8)
                resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.BILINEAR
                expected: NDArray[Any] = np.asarray(Image.fromarray(array).resize(target[::-1], resample))
            else:
                array = rng.random((*source, 3), np.float32)
                expected = resize(array, target, smooth)
            found = node(script, array, {"kind": kind, "from": source, "to": target, "filter": name})
            tolerance = 0 if kind == "uint8" else 2e-7
            np.testing.assert_allclose(np.reshape(found, expected.shape), expected, rtol=0, atol=tolerance)


def test_masks_are_grown_as_in_python(node: Node, rng: np.random.Generator) -> None:
    script = """
    import { grownMask } from './js/masks.js';
    const { height, width } = options;
    answer = Array.from(grownMask({ data: bytes, width, height }, options.pixels).data);"""
    for (height, width), pixels in (((1, 1), 3), ((70, 91), 1), ((70, 91), 13), ((33, 200), 100), ((40, 50), 0)):
        mask = rng.random((height, width)) < 0.004
        mask[0, -1] = True
        found = node(script, mask, {"height": height, "width": width, "pixels": pixels})
        np.testing.assert_array_equal(np.reshape(found, mask.shape), grown_mask(mask, pixels))


def test_masks_are_feathered_by_distance(node: Node, rng: np.random.Generator) -> None:
    """Shares of 0 to 255 by SciPy's distances, and the hole that has any."""
    script = """
    import { feathered } from './js/masks.js';
    const { height, width } = options;
    const { shares, hole } = feathered({ data: bytes, width, height }, options.pixels);
    answer = [Array.from(shares.data), Array.from(hole.data)];"""
    for (height, width), pixels in (((1, 1), 3), ((70, 91), 1), ((70, 91), 13), ((33, 200), 64)):
        mask = rng.random((height, width)) < 0.004
        mask[0, -1] = True
        shares, hole = node(script, mask, {"height": height, "width": width, "pixels": pixels})
        weights = np.clip(1 - distance_transform_edt(~mask).astype(np.float32) / np.float32(pixels + 1), 0, 1)
        np.testing.assert_array_equal(np.reshape(hole, mask.shape), weights > 0)
        np.testing.assert_array_equal(np.reshape(shares, mask.shape), np.rint(weights * 255))
