"""Masks: the area is what the band says, the generator alone decides, and mask files mean what the flags say."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from misf.plugins.shared.errors import MisfError
from misf.runtime.pictures.masks import MaskSettings
from misf.training.mask_drawing import BANDS, KINDS, MaskFolder, RandomMasks, band_of, mask_of_kind, random_mask

# The middle ones have no whole ring of pixels to grow or erode by: single pixels must make the area.
SIZES = [(128, 128), (96, 160), (4, 4), (5, 7), (1, 50), (3, 1000)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("band", BANDS)
def test_the_area_is_in_the_band(height: int, width: int, band: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(60):
        mask = random_mask(rng, height, width, band)
        assert (mask.dtype, mask.shape) == (np.bool_, (height, width))
        assert mask.any()
        assert band[0] <= mask.mean() <= band[1]
        shares.append(mask.mean())
    if height * width > 1000:  # not all alike: the band is used from end to end
        assert max(shares) - min(shares) > 0.75 * (band[1] - band[0])


def test_narrow_bands_are_met() -> None:
    rng = np.random.default_rng(1)
    for low in np.linspace(0.001, 0.95, 40):
        band = (float(low), float(low) + 0.001)
        assert band[0] <= random_mask(rng, 64, 64, band).mean() <= band[1]


def test_masks_are_shapes_not_noise_and_differ_in_kind() -> None:
    rng = np.random.default_rng(2)
    masks = [random_mask(rng, 128, 128) for _ in range(150)]
    edges = np.array([mask[[0, -1]].any() or mask[:, [0, -1]].any() for mask in masks])
    assert 0.3 < edges.mean() < 1.0
    for mask in masks:
        # Salt and pepper of the same area would be thousands of pieces.
        assert ndimage.label(mask)[1] < 40
    # Strokes are thin for their area, boxes and blobs are not: the widest disc tells them apart.
    radius = np.array([ndimage.distance_transform_edt(mask).max() for mask in masks])
    roundness = np.pi * radius**2 / np.array([mask.sum() for mask in masks])
    assert np.quantile(roundness, 0.1) < 0.2
    assert np.quantile(roundness, 0.9) > 0.5


def masks_of(kind: str, height: int = 120, width: int = 160) -> list[np.ndarray]:
    return [mask_of_kind(np.random.default_rng([4, i]), height, width, kind) for i in range(80)]


def straight_share(mask: np.ndarray) -> float:
    """Return the share of the outlines' length that lies in horizontal and vertical lines of 3 pixels and more."""
    straight = length = 0.0
    for contour in cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[0]:
        steps = np.abs(np.diff(contour[:, 0], axis=0, append=contour[:1, 0]))
        straight += steps[(steps.min(axis=1) == 0) & (steps.max(axis=1) >= 3)].sum()
        length += np.hypot(*steps.T).sum()
    return straight / length


def test_kinds_have_one_area_and_differ_in_shape() -> None:
    masks = {kind: masks_of(kind) for kind in KINDS}
    for found in masks.values():
        shares = [mask.mean() for mask in found]
        assert 0.2 <= min(shares) <= max(shares) <= 0.3
        assert np.mean(shares) == pytest.approx(0.25, abs=0.01)
    # Outlines of boxes are straight, those of objects and strokes are not.
    straight = {kind: [straight_share(mask) for mask in found] for kind, found in masks.items()}
    assert min(straight["boxes"] + straight["centre box"]) > 0.95  # OpenCV cuts inner corners
    assert max(np.median(straight[kind]) for kind in ("strokes", "outlines")) < 0.5
    # The middle of a stroke is near its edges; boxes and outlines are thick.
    radius = {
        kind: np.median([ndimage.distance_transform_edt(mask).max() for mask in found]) for kind, found in masks.items()
    }
    assert radius["strokes"] < 0.7 * min(radius["boxes"], radius["outlines"])


@pytest.mark.parametrize(("height", "width"), [(120, 160), (33, 50), (5, 7)])
def test_the_centre_box_is_half_of_each_side(height: int, width: int) -> None:
    mask = mask_of_kind(np.random.default_rng(0), height, width, "centre box")
    (box,) = ndimage.find_objects(mask.astype(int))
    assert mask[box].all()
    assert mask[box].shape == (-(-height // 2), -(-width // 2))
    assert ndimage.center_of_mass(mask) == pytest.approx(((height - 1) / 2, (width - 1) / 2), abs=0.5)


def test_the_generator_alone_decides() -> None:
    first = [random_mask(np.random.default_rng([7, i]), 64, 80, BANDS[i % 3]) for i in range(12)]
    again = [random_mask(np.random.default_rng([7, i]), 64, 80, BANDS[i % 3]) for i in reversed(range(12))][::-1]
    other = [random_mask(np.random.default_rng([8, i]), 64, 80, BANDS[i % 3]) for i in range(12)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_mask_takes_milliseconds() -> None:
    """Of processor time, which other work on the machine does not count into; measured 1 ms."""
    rng = np.random.default_rng(3)
    start = time.process_time()
    for _ in range(200):
        random_mask(rng, 128, 128)
    assert time.process_time() - start < 200 * 0.01


@pytest.mark.parametrize("band", [(0.5, 0.5), (0.4, 0.2), (-0.1, 0.2), (0.5, 1.1), (0.01, 0.02)])
def test_impossible_bands_are_refused(band: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="hole of"):
        random_mask(np.random.default_rng(0), 4, 4, band)


def test_random_masks_draws_every_band() -> None:
    rng, source = np.random.default_rng(4), RandomMasks()
    drawn = [band_of(source.mask(rng, 32, 32)) for _ in range(60)]
    assert {band: drawn.count(band) > 8 for band in BANDS} == dict.fromkeys(BANDS, True)


def test_band_of_knows_the_limits() -> None:
    mask = np.zeros((10, 10), bool)
    assert band_of(mask) is None
    for pixels, band in ((1, 0), (20, 0), (21, 1), (40, 1), (41, 2), (60, 2)):
        mask[:] = False
        mask.flat[:pixels] = True
        assert band_of(mask) == BANDS[band]
    assert band_of(~np.zeros((2, 2), bool)) is None


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A grey mask, 8x6 pixels: 200 in the left 2 columns, 100 in the next 2, 0 in the rest."""
    grey = np.zeros((6, 8), np.uint8)
    grey[:, :2], grey[:, 2:4] = 200, 100
    Image.fromarray(grey).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


def test_mask_files_threshold_and_inversion(half: Path) -> None:
    def columns(**settings: object) -> list[bool]:
        mask = MaskFolder([half], MaskSettings(**settings)).read(0)  # type: ignore[arg-type]
        assert (mask == mask[:1]).all()
        return list(mask[0, ::2])

    assert columns() == [True, False, False, False]
    assert columns(threshold=0) == [True, True, False, False]
    assert columns(invert=True) == [False, True, True, True]
    # The Dunhuang masks: black marks the hole, anything else is known.
    assert columns(invert=True, threshold=0) == [False, False, True, True]


def test_mask_files_are_resized_like_pillow_does(half: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    grey = (rng.random((37, 53)) < 0.5).astype(np.uint8) * 255
    Image.fromarray(grey).convert("RGB").save(tmp_path / "rgb.png")
    masks = MaskFolder([half, tmp_path / "rgb.png"])
    for height, width in ((37, 53), (64, 64), (20, 90), (9, 11)):
        expected = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.NEAREST)) > 127
        for _ in range(2):  # the second time from the cache
            assert np.array_equal(masks.read(1, height, width), expected)


def test_mask_files_are_mirrored_at_random_but_never_changed(half: Path) -> None:
    masks, rng = MaskFolder([half], cache_bytes=0), np.random.default_rng(6)
    plain = masks.read(0)
    seen = {masks.mask(rng, 6, 8).tobytes() for _ in range(40)}
    assert seen == {plain.tobytes(), np.ascontiguousarray(plain[:, ::-1]).tobytes()}  # rows are alike, so two are left


def test_training_leaves_out_masks_that_are_broken_or_mark_no_hole(
    half: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    Image.new("L", (8, 6)).save(tmp_path / "black.png")
    paths = [tmp_path / "broken.png", half, tmp_path / "black.png"]
    masks = MaskFolder(paths)
    drawn = [masks.mask(np.random.default_rng(seed), 6, 8) for seed in range(30)]
    assert all(mask.sum() == 12 for mask in drawn)
    assert masks.bad.keys() == {paths[0], paths[2]}
    assert len(caplog.records) == 2
    # What a seed draws does not depend on what was found to be bad before.
    assert all(
        np.array_equal(MaskFolder(paths).mask(np.random.default_rng(seed), 6, 8), drawn[seed]) for seed in range(9)
    )
    with pytest.raises(MisfError, match=r"none of 2 masks is usable: mask .*(broken|black)\.png"):
        MaskFolder(paths[::2]).mask(np.random.default_rng(0), 6, 8)


def test_bad_mask_files_are_errors_that_name_them(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(MisfError, match=r"broken\.png"):
        MaskFolder([tmp_path / "broken.png"]).read(0)
    with pytest.raises(MisfError, match="no mask files"):
        MaskFolder([])
    with pytest.raises(ValueError, match="threshold must be from 0 to 254, got 255"):
        MaskSettings(255)
