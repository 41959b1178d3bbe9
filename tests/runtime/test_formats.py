"""Formats by their bytes: HEIC, JPEGs of odd coding, WebP frames, files without a suffix."""

from __future__ import annotations

import io
import logging
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, JpegImagePlugin

from misf.plugins.shared.extras import is_installed
from misf.runtime import Inpainter
from misf.runtime.pictures import image_io
from misf.runtime.pictures.image_io import looks_like_picture, open_picture
from misf.runtime.run_cli import main

from ..support.tiny_models import constant_fill, mean_fill

HOLE = np.zeros((64, 96), np.bool_)
HOLE[20:36, 40:64] = True


@pytest.fixture(scope="module")
def inpaint(tmp_path_factory: pytest.TempPathFactory) -> Inpainter:
    return Inpainter(constant_fill(tmp_path_factory.mktemp("model") / "c.onnx", 1.0), backend="onnxruntime")


@pytest.fixture
def photo() -> Image.Image:
    """Smooth in three colours, so that a lossy format keeps it nearly."""
    y, x = np.mgrid[:64, :96]
    return Image.fromarray(np.stack([2 * x, 3 * y, 255 - x - y], axis=-1).astype(np.uint8))


def saved(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def check(photo: Image.Image, result: bytes, tolerance: float) -> Image.Image:
    """White in the hole, and else the picture."""
    filled = Image.open(io.BytesIO(result))
    pixels = np.asarray(filled.convert("RGB"), float)
    assert pixels[24:32, 46:58].min() > 245
    far = ~HOLE
    far[12:44, 32:72] = False  # a block of a JPEG reaches so far
    assert np.abs(pixels - np.asarray(photo, float))[far].mean() < tolerance
    return filled


@pytest.mark.skipif(not is_installed("pillow_heif"), reason="NOT PROVED: HEIC needs the extra heic")
def test_heic_in_and_out(photo: Image.Image, inpaint: Inpainter) -> None:
    image_io._readable()
    exif = Image.Exif()
    exif[271] = "Maker"
    filled = check(photo, inpaint.inpaint_file(saved(photo, "HEIF", quality=95, exif=exif), HOLE), 3)
    assert filled.format == "HEIF"
    assert filled.getexif()[271] == "Maker"


def test_heic_without_its_library_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(image_io, "is_installed", lambda _name: False)
    image_io._readable.cache_clear()
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(ValueError, match=r"is a HEIC picture, which needs pillow-heif: pip install .*\[heic\]"):
        open_picture(tmp_path / "x.heic")
    image_io._readable.cache_clear()


def test_a_jpeg_stored_as_rgb_stays_rgb(photo: Image.Image, inpaint: Inpainter) -> None:
    result = inpaint.inpaint_file(saved(photo, "JPEG", quality=95, keep_rgb=True), HOLE)
    filled = check(photo, result, 3)
    assert isinstance(filled, JpegImagePlugin.JpegImageFile)
    assert bytes(layer[0] for layer in filled.layer) == b"RGB"
    if shutil.which("identify"):
        said = subprocess.run(["identify", "-verbose", "jpeg:-"], input=result, capture_output=True, check=True).stdout
        assert b"jpeg:colorspace: 2" in said  # JCS_RGB


def test_odd_numbers_of_quantization_tables(photo: Image.Image, inpaint: Inpainter) -> None:
    """Tables 0 and 1 become 1 and 3, in their definitions and in the frame's components."""
    data = bytearray(saved(photo, "JPEG", quality=90))
    position = 2
    while data[position + 1] != 0xDA:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDB:
            at = position + 4
            while at < position + 2 + length:
                data[at] = 2 * data[at] + 1
                at += 65
        if marker == 0xC0:
            for component in range(3):
                at = position + 4 + 6 + 3 * component + 2
                data[at] = 2 * data[at] + 1
        position += 2 + length
    original = Image.open(io.BytesIO(bytes(data)))
    assert isinstance(original, JpegImagePlugin.JpegImageFile)
    assert set(original.quantization) == {1, 3}
    filled = check(photo, inpaint.inpaint_file(bytes(data), HOLE), 3)
    assert isinstance(filled, JpegImagePlugin.JpegImageFile)
    assert list(filled.quantization.values()) == list(original.quantization.values())


def test_cmyk_jpegs_of_every_kind_keep_their_inks(photo: Image.Image, inpaint: Inpainter) -> None:
    """Adobe's, without a mark, and YCCK by its definition (libjpeg, jccolor.c)."""
    inks = np.asarray(photo.convert("CMYK")).copy()
    inks[..., 3] = np.arange(96) * 2
    adobe = saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=95, subsampling=0)
    at = adobe.index(b"\xff\xee\x00\x0eAdobe")
    plain = saved(Image.fromarray(255 - inks, "CMYK"), "JPEG", quality=95, subsampling=0)
    plain = plain[:at] + plain[at + 16 :]
    luma = np.asarray(Image.fromarray(np.ascontiguousarray(inks[..., :3])).convert("YCbCr"))
    stored = 255 - np.dstack([luma, 255 - inks[..., 3]])
    ycck = saved(Image.fromarray(stored, "CMYK"), "JPEG", quality=95, subsampling=0)
    ycck = ycck[: at + 15] + b"\x02" + ycck[at + 16 :]
    for name, data, transform in (("adobe", adobe, 0), ("plain", plain, 0), ("ycck", ycck, 2)):
        result = inpaint.inpaint_file(data, HOLE)
        assert result[result.index(b"\xff\xee\x00\x0eAdobe") + 15] == transform, name
        with Image.open(io.BytesIO(result)) as filled:
            difference = np.abs(np.asarray(filled, float) - inks)
        assert difference[:, :24].mean() < 4, name
        assert np.asarray(filled)[24:32, 46:58, :3].max() < 16, name  # white is no ink


@pytest.mark.parametrize("progressive", [True, False])
def test_a_jpeg_without_its_end_is_whole_or_damaged(
    progressive: bool, photo: Image.Image, inpaint: Inpainter, caplog: pytest.LogCaptureFixture
) -> None:
    data = saved(photo, "JPEG", quality=95, progressive=progressive)
    for missing in (1, 2):
        caplog.clear()
        check(photo, inpaint.inpaint_file(data[:-missing], HOLE, "x.jpg"), 3)
        assert "x.jpg: the JPEG has no end marker" in caplog.text
    for cut in (12, 400, len(data) // 3):
        with pytest.raises(ValueError, match=r"x\.jpg is damaged and cannot be decoded"):
            inpaint.inpaint_file(data[:-cut], HOLE, "x.jpg")


@pytest.mark.parametrize("lossless", [True, False])
def test_webp_of_one_frame_in_an_animation_keeps_its_coding(
    lossless: bool, photo: Image.Image, inpaint: Inpainter
) -> None:
    """A still picture within ANMF, as some encoders write it: its chunks are the frame's."""
    still = saved(photo, "WEBP", lossless=lossless, quality=90)
    coded = still[12:]
    frame = struct.pack(
        "<3s3s3s3s3sB", *[bytes(3)] * 2, *[(side - 1).to_bytes(3, "little") for side in (96, 64)], bytes(3), 0
    )
    chunk = b"ANMF" + struct.pack("<I", len(frame) + len(coded)) + frame + coded
    canvas = b"\2\0\0\0" + (95).to_bytes(3, "little") + (63).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6) + chunk
    data = b"RIFF" + struct.pack("<I", len(body)) + body
    result = inpaint.inpaint_file(data, HOLE)
    assert (b"VP8L" in image_io._riff_chunks(result)) == lossless
    if lossless:
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(result)))[~HOLE], np.asarray(photo)[~HOLE])


def test_pictures_are_known_by_their_bytes(photo: Image.Image, tmp_path: Path) -> None:
    """Without a suffix, or with a wrong one: the format that came is written. Other files without one are skipped."""
    model = mean_fill(tmp_path / "mean.onnx")
    (tmp_path / "in").mkdir()
    formats = {"plain": "PNG", "photo": "JPEG", "page": "TIFF", "wrong.jpg": "PNG"}
    for name, format_ in formats.items():
        (tmp_path / "in" / name).write_bytes(saved(photo, format_))
    (tmp_path / "in/notes").write_text("no picture")
    Image.fromarray(HOLE).save(tmp_path / "mask.png")
    places = [str(model), str(tmp_path / "in"), str(tmp_path / "mask.png"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*places, "--backend", "onnxruntime"])
    assert result.exit_code == 0, result.stderr
    written = {path.name: Image.open(io.BytesIO(path.read_bytes())).format for path in (tmp_path / "out").iterdir()}
    assert written == formats
    assert "1 files in" in result.stderr
    one = [str(model), str(tmp_path / "in/plain"), str(tmp_path / "mask.png"), "--backend", "onnxruntime"]
    assert CliRunner().invoke(main, one).exit_code == 0
    assert (tmp_path / "in/plain_inpainted").read_bytes().startswith(b"\x89PNG")
    assert not looks_like_picture(tmp_path / "in/notes")


def test_photoshops_resources_are_kept_and_extended_xmp_is_named(
    photo: Image.Image, inpaint: Inpainter, caplog: pytest.LogCaptureFixture
) -> None:
    kept = b"8BIM\x03\xed\0\0" + struct.pack(">I", 16) + bytes(range(16))  # resolution
    thumbnail = b"8BIM\x04\x0c\0\0" + struct.pack(">I", 4) + b"\xff\xd8\xff\xd9"
    segments = b""
    for marker, body in (
        (0xED, b"Photoshop 3.0\0" + kept + thumbnail),
        (0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(50)),
    ):
        segments += struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
    data = saved(photo, "JPEG")
    with caplog.at_level(logging.WARNING, "misf"):
        result = inpaint.inpaint_file(data[:20] + segments + data[20:], HOLE, "x.jpg")
    assert kept in result
    assert b"\xff\xd8\xff\xd9" not in result
    assert [record.getMessage() for record in caplog.records] == ["x.jpg: its extended XMP is left out"]


def test_a_limit_on_pixels(photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # is put back
    model = mean_fill(tmp_path / "mean.onnx")
    photo.save(tmp_path / "x.png")
    Image.fromarray(HOLE).save(tmp_path / "mask.png")
    places = [str(model), str(tmp_path / "x.png"), str(tmp_path / "mask.png"), "--backend", "onnxruntime"]
    refused = CliRunner().invoke(main, [*places, "--max-pixels", "6000"])
    assert refused.exit_code == 1
    assert "refused as a decompression bomb" in refused.stderr
    assert CliRunner().invoke(main, [*places, "--max-pixels", "6144"]).exit_code == 0
