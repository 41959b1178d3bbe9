"""Training data: finding, decoding and cropping pictures; samples depend on the seed and the index only."""

from __future__ import annotations

import json
import logging
import struct
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from misf.plugins.shared.errors import MisfError
from misf.runtime.checks.accuracy import load_photographs
from misf.runtime.pictures.image_io import open_mask
from misf.runtime.pictures.masks import mask_from_image
from misf.training.dataset import Pictures, TrainingSamples, picture_paths, read_picture
from misf.training.mask_drawing import MaskFolder, RandomMasks


def save(path: Path, height: int = 40, width: int = 50, seed: int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]
    return path


def turned_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    return exif


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Six pictures in a folder tree, among other files."""
    for number, name in enumerate(("b.png", "a.JPG", "deep/c.png", "deep/er/d.webp", "e.bmp", "f.tif")):
        save(tmp_path / "data" / name, 40 + number, 50, number)
    (tmp_path / "data" / "notes.md").write_text("none")
    save(tmp_path / "data" / ".hidden.png")
    save(tmp_path / "data" / ".cache" / "thumb.png")
    return tmp_path / "data"


def names(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_a_folder_tree_is_searched_in_order(tree: Path) -> None:
    expected = ["a.JPG", "b.png", "deep/c.png", "deep/er/d.webp", "e.bmp", "f.tif"]
    assert names(picture_paths(tree), tree) == expected
    (tree / "deep" / "loop").symlink_to(tree)  # a link to a parent must not cause an endless loop
    assert {Path(name).name for name in names(picture_paths(tree), tree)} == {Path(name).name for name in expected}


@pytest.mark.parametrize("style", ["official", "lines", "windows"])
def test_lists(tree: Path, style: str) -> None:
    """The official lists are JSON arrays in .txt files; paths are relative to the list, or absolute."""
    entries = ["deep/c.png", str(tree / "b.png"), "./e.bmp"]
    path = tree / "list.txt"
    if style == "official":
        path.write_text(json.dumps(entries))
    else:
        path.write_bytes(
            ("\ufeff" + "\r\n".join(entries) + "\r\n\r\n").encode()
            if style == "windows"
            else ("\n".join(entries) + "\n").encode()
        )
    assert names(picture_paths(path), tree) == ["deep/c.png", "b.png", "e.bmp"]
    assert all(path.is_file() for path in picture_paths(path))


def test_a_list_of_names_in_brackets(tree: Path) -> None:
    for name in ("[a].png", "{b}.png", "[1].png"):
        (tree / name).write_bytes((tree / "b.png").read_bytes())
        (tree / "list.txt").write_text(f"{name}\nb.png\n")
        assert names(picture_paths(tree / "list.txt"), tree) == [name, "b.png"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'["a.png", ', "a syntax error in line 1"),
        (b'{"train": ["a.png"]}', "JSON array of paths"),
        (b"[1, 2]", "JSON array of paths"),
        (b"[]", "empty"),
        (b"\n \n", "empty"),
        (b"\xff\xfe\x00\x01", "UTF-8"),
        (
            b'["/home/someone/else/a.png", "b.png"]',
            "none of its first 2 files exists, such as /home/someone/else/a.png",
        ),
    ],
)
def test_a_file_that_is_no_list(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(MisfError, match=complaint) as caught:
        picture_paths(tmp_path / "list.txt")
    assert "list.txt" in str(caught.value)


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(MisfError, match="no pictures in"):
        picture_paths(tmp_path)
    with pytest.raises(MisfError, match="found nothing"):
        picture_paths(tmp_path / "missing")
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(MisfError, match="expected a folder, or a list"):
        picture_paths(tmp_path / "weights.pt")


def test_pictures_are_decoded_as_pillow_does(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain.png")
    assert np.array_equal(read_picture(plain), np.asarray(Image.open(plain)))
    turned = save(tmp_path / "turned.jpg", exif=turned_exif())
    assert np.array_equal(read_picture(turned), np.asarray(ImageOps.exif_transpose(Image.open(turned))))
    assert read_picture(turned).shape == (50, 40, 3)
    for mode in ("L", "P", "RGBA", "1"):
        Image.open(plain).convert(mode).save(tmp_path / "mode.png")
        expected = np.asarray(Image.open(tmp_path / "mode.png").convert("RGB"))
        assert np.array_equal(read_picture(tmp_path / "mode.png"), expected)
    grey16 = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32
    Image.fromarray(grey16).save(tmp_path / "deep.png")
    assert np.abs(read_picture(tmp_path / "deep.png")[:, :, 0] - grey16 / 257).max() <= 0.51


def test_large_pictures_are_shrunk_to_the_short_side_and_small_ones_kept(tmp_path: Path) -> None:
    photograph = Image.fromarray(skimage.data.coffee())  # 400 rows, 600 columns
    path = tmp_path / "large.jpg"
    photograph.save(path, quality=95)
    expected = np.asarray(photograph.resize((96, 64), Image.Resampling.LANCZOS), float)
    shrunk = read_picture(path, 64)
    assert shrunk.shape == expected.shape
    # Not equal, because the JPEG decoder has already reduced the size, but nearly so.
    assert np.abs(shrunk - expected).mean() < 2
    save(path, 300, 410, exif=turned_exif())
    assert read_picture(path, 64).shape == (87, 64, 3)  # 64 * 410 / 300, although the decoder quartered it to 75 x 103
    assert read_picture(path, 300).shape == read_picture(path, 500).shape == (410, 300, 3)


def test_corrupt_pictures_are_reported_once_and_skipped(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = save(tree / "z_truncated.jpg", 100, 100).read_bytes()
    (tree / "z_truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tree / "y_empty.png").write_bytes(b"")
    paths = picture_paths(tree)
    with caplog.at_level(logging.WARNING, "misf"):
        pictures = Pictures(paths)
        assert pictures.preload() == 6
        samples = TrainingSamples(pictures, RandomMasks(), crop=16, seed=1)
        crops = [samples.sample_bytes(index)[0] for index in range(64)]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all("\n" not in line for line in lines)
    assert {path.name for path in pictures.bad} == {"y_empty.png", "z_truncated.jpg"}
    # There is no grey or partly filled crop: every row of the pictures is noise.
    assert min(crop.std(axis=(1, 2)).min() for crop in crops) > 20
    # The replacement of a bad picture depends only on seed and index, not on the cache or the order.
    fresh = TrainingSamples(Pictures(paths, cache_bytes=0), RandomMasks(), crop=16, seed=1)
    for index in reversed(range(64)):
        assert np.array_equal(fresh.sample_bytes(index)[0], crops[index])


def test_only_corrupt_pictures_end_in_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    samples = TrainingSamples(Pictures([tmp_path / "a.png"]), RandomMasks(), crop=16)
    with pytest.raises(MisfError, match=r"none of .* a\.png|none of .*a\.png"):
        samples.sample(0)
    with pytest.raises(MisfError, match="no pictures"):
        TrainingSamples(Pictures([]), RandomMasks())


def test_a_sample_is_a_crop_of_the_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "one.png", 48, 61)
    truth = np.asarray(Image.open(path))
    samples = TrainingSamples(Pictures([path]), RandomMasks(), crop=24, seed=3)
    windows = np.lib.stride_tricks.sliding_window_view(truth, (24, 24), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    flips, corners = 0, set()
    for index in range(40):
        image, mask = samples.sample(index)
        assert (image.dtype, image.shape, mask.dtype, mask.shape) == (
            torch.float32,
            (3, 24, 24),
            torch.float32,
            (1, 24, 24),
        )
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        assert torch.equal(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255, image)
        for flipped in (False, True):
            found = np.argwhere((windows == (pixels[:, ::-1] if flipped else pixels)).all(axis=(2, 3, 4)))
            if len(found):
                flips += flipped
                corners.add(tuple(found[0]))
                break
        else:
            pytest.fail(f"sample {index} is not a crop of the picture")
    assert 8 < flips < 32
    assert len(corners) > 25


def test_every_picture_once_per_epoch_in_another_order(tmp_path: Path) -> None:
    paths = []
    for number in range(20):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
        paths.append(tmp_path / f"{number:02}.png")
    samples = TrainingSamples(Pictures(paths), RandomMasks(), crop=16)
    epochs = [[int(samples.sample_bytes(20 * epoch + i)[0][0, 0, 0]) for i in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_seed_and_index_decide_so_a_run_resumes_exactly(tree: Path) -> None:
    def samples(seed: int = 5) -> TrainingSamples:
        return TrainingSamples(Pictures(picture_paths(tree)), RandomMasks(), crop=32, seed=seed, zoom_out=1.2)

    whole = list(DataLoader(samples(), batch_size=4, sampler=range(24)))
    rest = list(DataLoader(samples(), batch_size=4, sampler=range(12, 24), num_workers=2))
    assert len(rest) == 3
    for resumed, straight in zip(rest, whole[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(resumed, straight, strict=True))
    assert not torch.equal(samples(6).sample(0)[0], whole[0][0][0])
    with pytest.raises(IndexError):
        samples().sample(-1)


def test_zoom_and_small_pictures(tmp_path: Path) -> None:
    """A ramp stays a ramp when it is cropped and resized, and its slope shows the zoom."""
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 100, axis=0).repeat(3, axis=2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    slopes = []
    for zoom_out in (1.0, 2.0):
        samples = TrainingSamples(
            Pictures([tmp_path / "ramp.png"]), RandomMasks(), crop=40, zoom_out=zoom_out, flip=False
        )
        rows = [samples.sample_bytes(i)[0][20, :, 0].astype(float) for i in range(30)]
        slopes.append([np.polyfit(np.arange(5, 35), row[5:35], 1)[0] for row in rows])
    assert np.allclose(slopes[0], 1.0)
    assert 0.97 < min(slopes[1]) < 1.2
    assert 1.8 < max(slopes[1]) < 2.03
    enlarged = TrainingSamples(Pictures([tmp_path / "ramp.png"]), RandomMasks(), crop=200, flip=False)
    row = enlarged.sample_bytes(0)[0][20, :, 0].astype(float)
    assert np.polyfit(np.arange(10, 190), row[10:190], 1)[0] == pytest.approx(0.5, abs=0.01)


def test_shuffled_colors_are_all_six_orders_and_nothing_else(tmp_path: Path) -> None:
    path = save(tmp_path / "one.png", 48, 61)

    def samples(shuffle: bool) -> TrainingSamples:
        return TrainingSamples(Pictures([path]), RandomMasks(), crop=48, flip=False, shuffle_colors=shuffle)

    orders = set()
    for index in range(40):
        picture, _ = samples(True).sample_bytes(index)
        plain, _ = samples(False).sample_bytes(index)
        orders |= {order for order in permutations(range(3)) if np.array_equal(picture, plain[:, :, order])}
    assert orders == set(permutations(range(3)))


def test_whole_pictures(tmp_path: Path) -> None:
    path = save(tmp_path / "one.png", 48, 61)
    square = Image.open(path).crop((6, 0, 54, 48)).resize((32, 32), Image.Resampling.LANCZOS)
    samples = TrainingSamples(Pictures([path]), RandomMasks(), crop=32, whole=True)
    seen = {samples.sample_bytes(index)[0].tobytes() for index in range(12)}
    assert seen == {np.asarray(square).tobytes(), np.asarray(ImageOps.mirror(square)).tobytes()}


def test_settings_are_checked(tmp_path: Path) -> None:
    pictures = Pictures([save(tmp_path / "a.png")])
    for settings in ({"crop": 4}, {"zoom_out": 0.5}):
        with pytest.raises(ValueError, match="expected a crop"):
            TrainingSamples(pictures, RandomMasks(), **settings)  # type: ignore[arg-type]


def test_masks_of_a_folder(tree: Path, tmp_path: Path) -> None:
    grey = np.zeros((8, 8), np.uint8)
    grey[:4] = 255
    Image.fromarray(grey).save(tmp_path / "mask.png")
    samples = TrainingSamples(Pictures(picture_paths(tree)), MaskFolder([tmp_path / "mask.png"]), crop=32)
    for index in range(8):
        mask = samples.sample(index)[1]
        assert mask.mean() == 0.5
        assert (mask == mask[:, :, :1]).all()


def test_the_cache_has_a_limit(tree: Path) -> None:
    paths = picture_paths(tree)
    sizes = [read_picture(path).nbytes for path in paths]
    pictures = Pictures(paths, cache_bytes=sizes[0] + sizes[1] + 10)
    assert pictures.preload(threads=1) == 6
    kept = [pictures.get(index) is pictures.get(index) for index in range(6)]
    assert kept == [True, True, False, False, False, False]


def test_a_mask_file_is_the_same_hole_for_training_as_for_filling(tmp_path: Path) -> None:
    """The same rules apply to white paint on a transparent layer, 16 bits, a transparent colour and EXIF rotation."""
    hole = np.zeros((30, 40), np.bool_)
    hole[4:11, 20:33] = True
    white = np.full_like(hole, 255, np.uint8)
    painted = hole * white
    Image.fromarray(np.dstack([white] * 3 + [painted])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([white, painted])).save(tmp_path / "la.png")
    sixteen = painted.astype(np.uint16) * 257
    sixteen[0] = 600  # of 65535: nearly black
    Image.fromarray(sixteen).save(tmp_path / "sixteen.png")
    turned = Image.Exif()
    turned[0x112] = 6
    Image.fromarray(painted).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    for path in sorted(tmp_path.glob("*.png")):
        assert np.array_equal(MaskFolder([path]).read(0), hole), path.name
        assert np.array_equal(mask_from_image(open_mask(path)), hole), path.name


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pictures_of_32_bit_numbers_are_reported_not_black(
    tmp_path: Path, kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(np.full((8, 8), 200, kind)).save(tmp_path / "deep.tif")
    assert Pictures([tmp_path / "deep.tif"]).get(0) is None
    assert "32-bit numbers" in caplog.text


def test_a_picture_with_odd_metadata_is_read_and_turned(tmp_path: Path) -> None:
    exif = b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIHHHHIf", 0x0112, 3, 1, 6, 0, 0x0128, 11, 1, 2.5) + bytes(4)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "odd.png", exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "odd.png"), np.rot90(pixels, -1))
    np.testing.assert_array_equal(load_photographs(tmp_path)[0], np.rot90(pixels, -1))
