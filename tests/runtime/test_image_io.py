"""Pictures through files: what comes back outside the hole is what went in, judged by Pillow and NumPy."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from scipy.ndimage import distance_transform_edt

from misf.runtime.pictures import masks as mask_module
from misf.runtime.pictures import png16
from misf.runtime.pictures.canvas import ArrayCanvas, PillowCanvas
from misf.runtime.pictures.geometry import Box
from misf.runtime.pictures.image_io import open_mask, open_picture, output_format
from misf.runtime.pictures.masks import check_mask, grown_mask, mask_from_array, mask_from_image, resized_mask
from misf.runtime.pictures.metadata import add_to_png

HEIGHT, WIDTH = 24, 40
BOX = Box(4, 6, 20, 16)
HOLE = np.zeros((HEIGHT, WIDTH), np.bool_)
HOLE[BOX.slices] = True
ORANGE = np.array([1.0, 0.5, 0.0], np.float32)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _rgb(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """A smooth picture with some noise, so that JPEG keeps it."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng([height, width])
    planes = np.stack([x * 5, y * 9, (x + y) * 3], axis=-1) + rng.integers(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(planes, 0, 255).astype(np.uint8))


def _fill(path: Path, output: Path | None = None) -> Path:
    """Return the file written after an orange fill of BOX in the picture as it is displayed."""
    output = output or path.with_name(f"out{path.suffix}")
    picture = open_picture(path, output_format(output))
    picture.canvas.paste(BOX, np.broadcast_to(ORANGE, (*BOX.size, 3)).astype(np.float32), np.ones(BOX.size, np.bool_))
    picture.save(output)
    return output


def _loaded(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *((suffix, mode) for suffix in (".png", ".tif") for mode in ("1", "L", "LA", "RGB", "RGBA")),
        *((".bmp", mode) for mode in ("1", "L", "RGB")),  # Pillow reads no alpha from a BMP
        *((".webp", mode) for mode in ("RGB", "RGBA")),  # WebP has no grey
    ],
)
def test_lossless_formats_keep_mode_and_known_pixels(
    tmp_path: Path, mode: str, suffix: str, rng: np.random.Generator
) -> None:
    path = tmp_path / f"in{suffix}"
    image = _rgb().convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)))
    image.save(path, **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    result = _loaded(_fill(path))
    assert result.mode == mode
    before, after = np.array(image), np.array(result)
    np.testing.assert_array_equal(after[~HOLE], before[~HOLE])
    colour = {"1": [True], "L": [151], "LA": [151], "RGB": [255, 128, 0], "RGBA": [255, 128, 0]}[mode]
    assert np.all(after[HOLE].reshape(HOLE.sum(), -1)[:, : len(colour)] == colour)
    if mode in ("LA", "RGBA"):
        np.testing.assert_array_equal(after[..., -1], before[..., -1])


@pytest.mark.parametrize("transparent", [None, 3, bytes([255] * 8 + [0, 128])], ids=["opaque", "one index", "alphas"])
def test_a_palette_becomes_rgb_with_the_same_colours(tmp_path: Path, transparent: Any) -> None:
    image = _rgb().quantize(32)
    image.save(tmp_path / "in.png", **({} if transparent is None else {"transparency": transparent}))
    before = _loaded(tmp_path / "in.png").convert("RGBA")
    result = _loaded(_fill(tmp_path / "in.png"))
    assert result.mode == ("RGB" if transparent is None else "RGBA")
    np.testing.assert_array_equal(np.array(result.convert("RGBA"))[~HOLE], np.array(before)[~HOLE])


def test_a_gif_keeps_its_palette_and_never_fills_with_the_transparent_colour(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    image = Image.fromarray(rng.integers(0, 3, (HEIGHT, WIDTH), dtype=np.uint8))
    image.putpalette([0, 0, 0, 255, 128, 0, 250, 120, 10])
    image.save(tmp_path / "in.gif", transparency=1)
    before = np.array(_loaded(tmp_path / "in.gif").convert("RGBA"))
    after = np.array(_loaded(_fill(tmp_path / "in.gif")).convert("RGBA"))
    np.testing.assert_array_equal(after[~HOLE], before[~HOLE])
    assert np.all(after[HOLE] == (250, 120, 10, 255))  # (255, 128, 0) is nearer, and transparent


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path, channels: int, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 65536, (HEIGHT, WIDTH, channels), dtype=np.uint16)
    plain = io.BytesIO()
    Image.new("L", (1, 1)).save(plain, "PNG", dpi=(300, 300), icc_profile=SRGB)
    extra = [one for one in png16.chunks(plain.getvalue()) if one[0] in (b"iCCP", b"pHYs")]
    (tmp_path / "in.png").write_bytes(add_to_png(png16.encode(pixels), extra))
    output = _fill(tmp_path / "in.png")
    result = _decode_16_bit_png(output.read_bytes())
    np.testing.assert_array_equal(result[~HOLE], pixels[~HOLE])
    colour = [round(65535 * (0.299 + 0.587 * 0.5))] if channels < 3 else [65535, 32768, 0]
    assert np.all(result[HOLE][:, : len(colour)] == colour)
    if channels in (2, 4):
        np.testing.assert_array_equal(result[..., -1], pixels[..., -1])
    info = _loaded(output).info
    assert info["icc_profile"] == SRGB
    assert round(info["dpi"][0]) == 300


def test_sixteen_bit_grey_is_what_pillow_reads(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
    for suffix in (".png", ".tif"):
        Image.fromarray(pixels).save(tmp_path / f"in{suffix}")
        result = np.array(_loaded(_fill(tmp_path / f"in{suffix}")))
        assert result.dtype == np.uint16
        np.testing.assert_array_equal(result[~HOLE], pixels[~HOLE])


def test_sixteen_bits_are_reduced_with_a_warning_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rng: np.random.Generator
) -> None:
    pixels = rng.integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    path = tmp_path / "in.png"
    path.write_bytes(png16.encode(pixels))
    with caplog.at_level(logging.WARNING, "misf"):
        assert _loaded(_fill(path, tmp_path / "out.webp")).mode == "RGB"
    assert "16 bits a channel and WEBP holds 8" in caplog.text
    with pytest.raises(ValueError, match=r"16 bits a channel, which are kept in a \.png only, not as BMP"):
        _fill(path, tmp_path / "out.bmp")


def test_a_deep_tiff_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.random((4, 4)).astype(np.float32)).save(tmp_path / "in.tif")
    with pytest.raises(ValueError, match="cannot be kept: convert it"):
        open_picture(tmp_path / "in.tif")
    (tmp_path / "rgb16.tif").write_bytes(_rgb16_tiff())
    with pytest.raises(ValueError, match="has 16 bits a channel in mode RGB, which cannot be kept"):
        open_picture(tmp_path / "rgb16.tif")


def test_jpeg_keeps_tables_subsampling_profile_resolution_and_exif_but_no_thumbnail(tmp_path: Path) -> None:
    path = tmp_path / "in.jpg"
    exif = Image.Exif()
    exif[0x010F] = "ACME"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    _rgb(48, 64).save(path, quality=77, subsampling=1, icc_profile=SRGB, dpi=(200, 200), exif=_with_thumbnail(exif))
    before, after = _loaded(path), _loaded(_fill(path))
    assert b"THUMBNAIL" in before.info["exif"]
    assert after.quantization == before.quantization  # type: ignore[attr-defined]
    assert after.layer == before.layer  # type: ignore[attr-defined] # component ids and sampling factors
    assert after.info["icc_profile"] == SRGB
    assert after.info["dpi"] == (200, 200)
    assert after.getexif()[0x010F] == "ACME"
    assert after.getexif().get_ifd(0x8769)[0x9003] == "2020:01:01 00:00:00"
    assert b"THUMBNAIL" not in after.info["exif"]
    far = np.array(before, np.int16)[24:, 32:] - np.array(after, np.int16)[24:, 32:]
    assert np.abs(far).max() <= 3  # the same tables on the same blocks: hardly a second loss


def test_cmyk_jpeg_stays_cmyk_and_becomes_rgb_in_a_png(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "in.jpg"
    image = _rgb().convert("CMYK")
    image.save(path, quality=100, subsampling=0)
    after = _loaded(_fill(path))
    assert after.mode == "CMYK"
    inner = np.array(after.convert("RGB"), np.int16)[9:13, 8:16]
    assert np.abs(inner - (255, 128, 0)).max() <= 4
    known = np.array(after, np.int16)[:, 32:] - np.array(_loaded(path), np.int16)[:, 32:]
    assert np.abs(known).max() <= 4
    with caplog.at_level(logging.WARNING, "misf"):
        assert _loaded(_fill(path, tmp_path / "out.png")).mode == "RGB"
    assert "CMYK, which PNG cannot hold" in caplog.text


def test_cmyk_tiff_keeps_every_known_byte(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    Image.fromarray(pixels, "CMYK").save(tmp_path / "in.tif", compression="tiff_lzw")
    after = _loaded(_fill(tmp_path / "in.tif"))
    assert after.mode == "CMYK"
    assert after.info["compression"] == "tiff_lzw"
    np.testing.assert_array_equal(np.array(after)[~HOLE], pixels[~HOLE])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_exif_orientation_is_filled_as_displayed(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = (WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH)  # so that it is displayed as HEIGHT x WIDTH
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"in{suffix}"
    options: dict[str, Any] = {".webp": {"lossless": True, "exact": True}, ".jpg": {"quality": 100, "subsampling": 0}}
    _rgb(*stored).save(path, exif=exif, **options.get(suffix, {}))
    output = _fill(path)
    before, after = _as_displayed(path), _as_displayed(output)
    slack = 4 if suffix == ".jpg" else 0
    assert before.shape == after.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(after[~HOLE] - before[~HOLE]).max() <= (30 if suffix == ".jpg" else 0)  # JPEG rings at the edge
    assert np.abs(after[9:13, 8:16] - (255, 128, 0)).max() <= slack
    if suffix != ".tif":  # Pillow turns a TIFF while it reads it
        assert _loaded(output).getexif()[0x0112] == orientation
        assert _loaded(output).size == _loaded(path).size


def test_sixteen_bit_orientation(tmp_path: Path, rng: np.random.Generator) -> None:
    for orientation in range(1, 9):
        stored = (WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH)
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(rng.integers(0, 65536, stored, dtype=np.uint16)).save(tmp_path / "in.png", exif=exif)
        before, after = _as_displayed(tmp_path / "in.png"), _as_displayed(_fill(tmp_path / "in.png"))
        np.testing.assert_array_equal(after[~HOLE], before[~HOLE])
        assert np.ptp(after[HOLE]) == 0


def test_png_keeps_text_gamma_resolution_and_webp_its_kind(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "someone")
    text.add_itxt("Title", "Grüße")
    text.add(b"gAMA", struct.pack(">I", 45455))
    _rgb().save(tmp_path / "in.png", pnginfo=text, dpi=(72, 72), icc_profile=SRGB)
    info = _loaded(_fill(tmp_path / "in.png")).info
    assert (info["Author"], info["Title"], info["gamma"]) == ("someone", "Grüße", 0.45455)
    assert round(info["dpi"][0]) == 72
    assert info["icc_profile"] == SRGB
    _rgb().save(tmp_path / "lossy.webp", quality=80)
    assert b"VP8L" not in _fill(tmp_path / "lossy.webp").read_bytes()[:40]


def test_an_mpo_is_taken_as_its_main_picture(tmp_path: Path) -> None:
    main, extra = _rgb(48, 64), _rgb(48, 64)
    main.save(tmp_path / "in.mpo", "MPO", save_all=True, append_images=[extra])
    path = (tmp_path / "in.mpo").rename(tmp_path / "in.jpg")
    assert _loaded(path).format == "MPO"
    assert _loaded(_fill(path)).format == "JPEG"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.png", b"", "is empty: expected a picture file"),
        ("text.png", b"no picture at all", "is not a picture we can read"),
        ("short.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "cannot be read as a picture: Truncated"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture we can read"),
    ],
)
def test_what_is_no_picture_is_told_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (open_picture, open_mask):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)


def test_damaged_huge_and_moving_pictures_are_told(tmp_path: Path) -> None:
    whole = io.BytesIO()
    _rgb(200, 200).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:2000])
    with pytest.raises(ValueError, match=r"cut.jpg is damaged and cannot be decoded"):
        open_picture(tmp_path / "cut.jpg")
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(bomb + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with pytest.raises(ValueError, match="refused as a decompression bomb"):
        open_picture(tmp_path / "bomb.png")
    frames = [_rgb().quantize(8), _rgb().rotate(180).quantize(16)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="has 2 frames or pages: expected a single picture"):
        open_picture(tmp_path / "moving.gif")
    with pytest.raises(ValueError, match="is a folder: expected a picture file"):
        open_picture(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "nowhere.png")


def test_alpha_is_not_dropped_without_a_word(tmp_path: Path) -> None:
    _rgb().convert("RGBA").save(tmp_path / "in.png")
    for suffix, format_ in ((".jpg", "JPEG"), (".bmp", "BMP"), (".gif", "GIF")):
        with pytest.raises(ValueError, match=f"has transparency, which {format_} cannot hold"):
            _fill(tmp_path / "in.png", tmp_path / f"out{suffix}")
    with pytest.raises(ValueError, match=r"cannot write out.psd: expected a name that ends in .png"):
        output_format(Path("out.psd"))


# Masks


def test_masks_of_every_mode_mean_the_same(tmp_path: Path) -> None:
    grey = Image.fromarray(HOLE.astype(np.uint8) * 255)
    black_and_white = {mode: grey.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")}
    strokes = Image.new("RGBA", grey.size, (255, 255, 255, 0))  # a paint program's layer: white where it is not clear
    strokes.paste((255, 255, 255, 255), (0, 0), grey)
    masks = {**black_and_white, "strokes": strokes, "I;16": Image.fromarray(HOLE.astype(np.uint16) * 65535)}
    for name, mask in masks.items():
        path = tmp_path / ("mask.tif" if mask.mode == "CMYK" else "mask.png")
        mask.save(path)
        np.testing.assert_array_equal(mask_from_image(open_mask(path)), HOLE, err_msg=name)
        np.testing.assert_array_equal(mask_from_image(open_mask(path), invert=True), ~HOLE, err_msg=name)


def test_mask_thresholds_and_noise(caplog: pytest.LogCaptureFixture) -> None:
    grey = Image.fromarray(np.array([[0, 1, 127, 128, 255]], np.uint8))
    assert mask_from_image(grey).tolist() == [[False, False, False, True, True]]
    assert mask_from_image(grey, threshold=0).tolist() == [[False, True, True, True, True]]
    jpeg = io.BytesIO()
    Image.fromarray(HOLE.astype(np.uint8) * 255).resize((400, 240), Image.Resampling.NEAREST).save(jpeg, "JPEG")
    clean = np.array(Image.fromarray(HOLE).resize((400, 240), Image.Resampling.NEAREST))
    with caplog.at_level(logging.INFO, "misf"):
        np.testing.assert_array_equal(mask_from_image(Image.open(jpeg)), clean)
    assert "the mask has grey levels" in caplog.text
    with caplog.at_level(logging.WARNING, "misf"):
        assert not mask_from_image(Image.fromarray(HOLE.astype(np.uint8))).any()
    assert "brightest value is 1 and only over 127 is hole" in caplog.text


def test_alpha_as_mask(caplog: pytest.LogCaptureFixture) -> None:
    image = _rgb().convert("RGBA")
    image.putalpha(Image.fromarray((~HOLE).astype(np.uint8) * 255))
    np.testing.assert_array_equal(mask_from_image(image, from_alpha=True), HOLE)
    np.testing.assert_array_equal(mask_from_image(image, from_alpha=True, invert=True), ~HOLE)
    with caplog.at_level(logging.WARNING, "misf"):
        mask_from_image(image)
        assert caplog.text == ""
        for mode in ("RGBA", "LA"):
            strokes = Image.new(mode, (WIDTH, HEIGHT), 0)  # black on a clear layer
            strokes.putalpha(Image.fromarray(HOLE))
            assert not mask_from_image(strokes).any()
            np.testing.assert_array_equal(mask_from_image(strokes, from_alpha=True, invert=True), HOLE)
            assert "--mask-from-alpha: clear is hole; with --invert-mask: painted is hole" in caplog.text
            caplog.clear()
        assert not mask_from_image(Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 255))).any()
        assert caplog.text == ""
    with pytest.raises(ValueError, match=r"alpha channel, and the picture \(RGB\) has none"):
        mask_from_image(_rgb(), from_alpha=True)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((HEIGHT, WIDTH), np.bool_), "the mask is empty"),
        (np.ones((HEIGHT, WIDTH), np.bool_), "covers the whole picture"),
        (np.random.default_rng(11).random((HEIGHT, WIDTH)) < 0.9, "is it inverted"),
    ],
)
def test_suspicious_masks_are_told(mask: np.ndarray, message: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "misf"):
        check_mask(mask, (HEIGHT, WIDTH))
    assert message in caplog.text


def test_masks_of_another_size_or_type() -> None:
    with pytest.raises(ValueError, match=r"the mask is 40x24 and the picture 24x40 \(width x height\)"):
        check_mask(HOLE, (WIDTH, HEIGHT))
    np.testing.assert_array_equal(resized_mask(HOLE, (48, 80)), np.kron(HOLE, np.ones((2, 2), np.bool_)))
    np.testing.assert_array_equal(mask_from_array(HOLE.astype(np.uint8)[..., None] * 255), HOLE)
    np.testing.assert_array_equal(mask_from_array(np.zeros((4, 4), np.uint8)), np.zeros((4, 4), np.bool_))
    with pytest.raises(ValueError, match="the mask holds only 0 and 1, and over 127 is hole: pass bool, or 0 and 255"):
        mask_from_array(HOLE.astype(np.uint8))
    with pytest.raises(ValueError, match="expected a mask of shape H,W and uint8"):
        mask_from_array(HOLE.astype(np.float32))


def test_a_grown_mask_reaches_so_many_pixels_and_no_further() -> None:
    rows, columns = np.mgrid[:21, :31]
    dot = (rows == 9) & (columns == 14)
    for pixels in (0, 1, 4):
        np.testing.assert_array_equal(grown_mask(dot, pixels), (rows - 9) ** 2 + (columns - 14) ** 2 <= pixels**2)
    assert not grown_mask(np.zeros((4, 4), np.bool_), 3).any()


@pytest.mark.parametrize("reach", [1, 6, 40])
def test_distances_are_scipys_whatever_the_bands(reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_module, "BAND_ROWS", 7)
    for mask in np.random.default_rng(0).random((3, 61, 50)) > np.array([0.7, 0.98, 0.9995])[:, None, None]:
        mask[20:52] = False
        expected = distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)
        found = mask_module._distance(mask, reach)
        near = expected <= reach
        np.testing.assert_allclose(found[near], expected[near], rtol=1e-6)
        assert (found[~near] > reach).all()


# Canvases


def test_a_canvas_reads_grey_thrice_and_resizes_by_area(rng: np.random.Generator) -> None:
    grey = rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    for canvas in (ArrayCanvas(grey), PillowCanvas(Image.fromarray(grey))):
        part = canvas.read(BOX, BOX.size)
        assert part.dtype == np.float32
        np.testing.assert_allclose(part, np.repeat(grey[BOX.slices][..., None] / 255, 3, axis=2), atol=1e-6)
    flat = ArrayCanvas(np.full((64, 64, 3), 200, np.uint8)).read(Box(0, 0, 64, 64), (9, 13))
    assert flat.shape == (9, 13, 3)
    np.testing.assert_allclose(flat, 200 / 255, atol=1e-6)


def test_arrays_that_are_no_pictures_are_told() -> None:
    for array in (np.zeros((4, 4), np.float32), np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(ValueError, match="expected a"):
            ArrayCanvas(array)


# Referees


def _as_displayed(path: Path) -> np.ndarray:
    """Return the picture's pixels as a viewer shows them, by the definition of the tag."""
    image = _loaded(path)
    array = np.array(image, np.int32)
    turn = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
        8: lambda a: np.rot90(a, 1),
    }
    return turn.get(image.getexif().get(0x0112, 1), lambda a: a)(array)


def _decode_16_bit_png(data: bytes) -> np.ndarray:
    """Return the samples of a 16-bit PNG by the specification: filters none, sub and up, no interlace."""
    header = dict(png16.chunks(data))[b"IHDR"]
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", header)
    assert (depth, interlace) == (16, 0)
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    stream = zlib.decompress(b"".join(body for kind, body in png16.chunks(data) if kind == b"IDAT"))
    rows = np.frombuffer(stream, np.uint8).reshape(height, 1 + width * channels * 2)
    out = np.zeros((height, width * channels * 2), np.uint8)
    for y in range(height):
        assert rows[y, 0] == 2
        out[y] = rows[y, 1:] + (out[y - 1] if y else 0)
    return out.view(">u2").reshape(height, width, channels).astype(np.uint16)


def _with_thumbnail(exif: Image.Exif) -> bytes:
    """Return EXIF bytes with a thumbnail appended in IFD1, which Pillow does not write."""
    data = exif.tobytes()[6:]
    order = "<" if data[:2] == b"II" else ">"
    first = struct.unpack_from(order + "I", data, 4)[0]
    count = struct.unpack_from(order + "H", data, first)[0]
    second = len(data)
    thumbnail = b"\xff\xd8THUMBNAIL\xff\xd9"
    ifd1 = struct.pack(order + "H", 2)
    ifd1 += struct.pack(order + "HHII", 0x0201, 4, 1, second + 2 + 24 + 4)
    ifd1 += struct.pack(order + "HHII", 0x0202, 4, 1, len(thumbnail)) + struct.pack(order + "I", 0)
    link = first + 2 + 12 * count
    return b"Exif\0\0" + data[:link] + struct.pack(order + "I", second) + data[link + 4 :] + ifd1 + thumbnail


def _rgb16_tiff() -> bytes:
    """Return a 2x1 TIFF of 16 bits a channel, uncompressed, little-endian."""
    entries = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140)]
    entries += [(277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 12), (284, 3, 1, 1)]
    data = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    data += b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", 0)
    assert len(data) == 134
    return data + struct.pack("<3H", 16, 16, 16) + struct.pack("<6H", 1, 2, 3, 4, 5, 65535)
