"""Which parts the network sees: every hole pixel once, in crops that hold it, at sizes that stay bounded."""

from __future__ import annotations

import time

import numpy as np
import pytest

from misf.runtime.pictures.crops import Crop, plan_crops
from misf.runtime.pictures.settings import ABOUT, CropSettings

Y, X = np.ogrid[:1500, :2000]


def _empty(height: int = 1500, width: int = 2000) -> np.ndarray:
    return np.zeros((height, width), np.bool_)


def _with(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = _empty()
    for top, left, height, width in boxes:
        mask[top : top + height, left : left + width] = True
    return mask


def _noise(height: int, width: int, share: float) -> np.ndarray:
    noise: np.ndarray = np.random.default_rng(5).random((height, width)) < share
    return noise


def _checked(mask: np.ndarray, **settings: object) -> list[Crop]:
    """Return the plan after checking what must hold for any."""
    crops = plan_crops(mask, CropSettings(**settings))  # type: ignore[arg-type]
    covered = np.zeros(mask.shape, np.uint8)
    for crop in crops:
        covered[crop.core.slices] += crop.hole
        assert 0 <= crop.box.left <= crop.core.left < crop.core.right <= crop.box.right <= mask.shape[1]
        assert 0 <= crop.box.top <= crop.core.top < crop.core.bottom <= crop.box.bottom <= mask.shape[0]
        assert crop.hole.shape == crop.core.size
    np.testing.assert_array_equal(covered, mask)
    return crops


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(np.ones((1, 1), np.bool_), id="one pixel"),
        pytest.param(np.ones((5, 7), np.bool_), id="5x7, full"),
        pytest.param(_noise(257, 391, 0.2), id="257x391, noise"),
        pytest.param(_noise(1500, 2000, 0.0005), id="specks"),
        pytest.param(_noise(1500, 2000, 0.1), id="dense noise"),
        pytest.param(np.abs(Y - X) < 5, id="diagonal wire"),
        pytest.param((Y - 700) ** 2 + (X - 900) ** 2 < 600**2, id="large disc"),
        pytest.param(((Y - 700) ** 2 + (X - 900) ** 2 < 400**2) | (np.abs(Y - X) < 5), id="disc on a wire"),
        pytest.param(((Y - 700) ** 2 + (X - 900) ** 2 < 40**2) | (np.hypot(Y - 700, X - 900) // 9 == 30), id="ring"),
        pytest.param(_with((0, 0, 1, 1), (1499, 1999, 1, 1), (0, 1999, 1, 1), (1499, 0, 1, 1)), id="corners"),
        pytest.param(np.ones((3, 9000), np.bool_), id="3 rows"),
    ],
)
@pytest.mark.parametrize("strategy", ["crop", "auto", "resize", "original"])
def test_every_hole_pixel_is_filled_once(mask: np.ndarray, strategy: str) -> None:
    crops = _checked(mask, strategy=strategy, working_size=256)
    if strategy in ("crop", "resize"):
        for crop in crops:  # rounding may add a row
            assert crop.size[0] * crop.size[1] <= ABOUT * 256**2 * 1.02
    if strategy == "original":
        assert [crop.size for crop in crops] == [mask.shape]


def test_an_empty_mask_needs_no_crop() -> None:
    assert plan_crops(_empty()) == []


def test_distant_holes_get_native_crops_of_their_own() -> None:
    crops = _checked(_with((100, 100, 60, 80), (1400, 1900, 50, 50)))
    assert [crop.box.size for crop in crops] == [(512, 512)] * 2
    assert [crop.size for crop in crops] == [(512, 512)] * 2  # native: no resizing
    assert crops[0].box[:2] == (0, 0)  # shifted into the picture instead of cut off


def test_near_holes_share_a_crop() -> None:
    assert len(_checked(_with((500, 500, 40, 40), (560, 700, 40, 40), (640, 520, 30, 30)))) == 1


def test_a_wide_hole_is_seen_reduced_with_context_on_every_side() -> None:
    [crop] = _checked(_with((400, 500, 700, 700)))
    assert crop.box.size == (1056, 1056)  # blocks of 8 round the hole up to 704, and a quarter of that on each side
    assert crop.size == (512, 512)


def test_a_long_thin_hole_is_walked_at_native_resolution() -> None:
    crops = _checked(_with((700, 0, 12, 2000)))
    assert len(crops) == 7
    assert {crop.size for crop in crops} == {(512, 512)}


def test_a_wire_on_a_blob_is_walked_though_the_blob_is_seen_reduced() -> None:
    crops = _checked(((Y - 1100) ** 2 + (X - 1400) ** 2 < 300**2) | (np.abs(Y - X) < 5))
    reduced = [crop for crop in crops if crop.size != crop.box.size]
    assert len(reduced) == 1
    assert reduced[0].core.size[0] < 800  # the blob and what is near it, not the picture's diagonal
    assert len(crops) >= 4


def test_five_hundred_holes_do_not_make_five_hundred_crops(rng: np.random.Generator) -> None:
    mask = _empty(4000, 6000)
    for top, left in zip(rng.integers(0, 3980, 500), rng.integers(0, 5980, 500), strict=True):
        mask[top : top + 20, left : left + 20] = True
    assert len(_checked(mask)) < 130  # 94 squares of 512 cover the picture


@pytest.mark.parametrize(
    ("working_size", "margin"), [(128, 60), (128, 220), (256, 100), (512, 220), (512, None), (1024, 520)]
)
def test_eight_thousand_specks_take_no_quadratic_time(
    working_size: int, margin: int | None, rng: np.random.Generator
) -> None:
    mask = _empty(4000, 6000)
    for top, left in zip(rng.integers(0, 3996, 8000), rng.integers(0, 5996, 8000), strict=True):
        mask[top : top + 4, left : left + 4] = True
    started = time.process_time()
    crops = plan_crops(mask, CropSettings("crop", working_size, margin))
    assert (
        time.process_time() - started < 3
    )  # 20 s at 128 and 60 without the grid, 6 s at 1024 and 520 on a grid of 1024
    assert sum(int(crop.hole.sum()) for crop in crops) == int(mask.sum())


def test_margin_and_working_size_are_honoured() -> None:
    [crop] = _checked(_with((600, 600, 40, 40)), working_size=64, margin=100)
    assert crop.box == (500, 500, 740, 740)
    assert crop.size == (64, 64)


def test_auto_runs_pictures_of_about_the_working_size_whole() -> None:
    assert CropSettings().strategy_for((512, 768)) == "original"
    assert CropSettings().strategy_for((700, 700)) == "crop"
    assert CropSettings("resize").strategy_for((9, 9)) == "resize"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "tile"}, "unknown strategy 'tile'"),
        ({"working_size": 8}, "too small"),
        ({"margin": -1}, "negative"),
    ],
)
def test_senseless_settings_are_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CropSettings(**settings)  # type: ignore[arg-type]
