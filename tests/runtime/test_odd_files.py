"""Files that are sound and rare: what decoders do not tell, or tell wrong, must not reach the result."""

from __future__ import annotations

import io
import logging
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from misf.runtime.pictures import png16
from misf.runtime.pictures.image_io import open_mask, open_picture
from misf.runtime.pictures.masks import MaskSettings
from misf.runtime.pictures.previews import iptc_without_previews, xmp_without_previews

PATH = Path("picture")
RNG = np.random.default_rng(0)


def saved(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def reopened(data: bytes, format_: str, write_as: str | None = None) -> Image.Image:
    """Return what Pillow reads of what we write of a file."""
    image = Image.open(io.BytesIO(open_picture(PATH, write_as, data).encoded(write_as or format_)))
    image.load()
    return image


@pytest.mark.parametrize("more", [b" " * 40, b'{"prompt": "a cat"}' * 3, b"some text that was appended\n"])
def test_what_follows_a_png_is_no_part_of_it(more: bytes) -> None:
    pixels = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    written = open_picture(PATH, None, saved(Image.fromarray(pixels), "PNG") + more).encoded("PNG")
    assert np.array_equal(cv2.imdecode(np.frombuffer(written, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], pixels)
    assert more not in written


def test_a_mask_is_turned_as_its_picture_is() -> None:
    """Pillow does not know an orientation in a PNG's XMP, nor in ImageMagick's raw profile."""
    alpha = np.full((32, 32), 255, np.uint8)
    alpha[2:10, 5:9] = 0
    image = Image.fromarray(np.dstack([RNG.integers(0, 256, (32, 32, 3), np.uint8), alpha]))
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n"
    for key, text in (("XML:com.adobe.xmp", "<x:xmpmeta tiff:Orientation = '6'/>"), ("Raw profile type exif", raw)):
        said = PngInfo()
        said.add_itxt(key, text)
        data = saved(image, "PNG", pnginfo=said)
        picture = open_picture(PATH, None, data)
        assert picture.orientation == 6
        hole = MaskSettings(from_alpha=True).hole(open_mask(PATH, data))
        assert np.array_equal(hole, np.asarray(picture.canvas.image.getchannel("A")) == 0)  # type: ignore[union-attr]


@pytest.mark.timeout(30)
def test_long_texts_take_no_time_squared() -> None:
    xmp = b"<x " + b"a" * 3_000_000 + b"/>"
    assert xmp_without_previews(xmp) == xmp
    assert xmp_without_previews(b'<x a:image = "abc"/>') == b'<x a:image = ""/>'
    iptc = b"\x1c\x02\x05\x00\x00" * 400_000
    assert iptc_without_previews(iptc) == iptc


@pytest.mark.parametrize("key", [0, 1234])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_16_bits(key: int, channels: int) -> None:
    pixels = RNG.integers(key + 1, 65536, (16, 24, channels), np.uint16)
    pixels[:4] = key + 200  # equal to the key in 8 bits, or nearly
    clear = np.zeros((16, 24), np.bool_)
    clear[6:10, 3:9] = True
    pixels[clear] = key
    plain = png16.encode(pixels if channels == 3 else pixels[..., 0])
    data = plain[:33] + png16.chunk(b"tRNS", struct.pack(">H", key) * channels) + plain[33:]
    assert np.array_equal(MaskSettings(from_alpha=True).hole(open_mask(PATH, data)), clear)
    written = open_picture(PATH, None, data).encoded("PNG")
    array = cv2.imdecode(np.frombuffer(written, np.uint8), cv2.IMREAD_UNCHANGED)
    assert array.dtype == np.uint16
    assert np.array_equal(array[..., -1] == 0, clear)
    assert np.array_equal(array[..., :1] if channels == 1 else array[..., 2::-1], pixels)
    assert np.array_equal(np.asarray(reopened(data, "PNG", "WEBP").getchannel("A")) == 0, clear)


def test_a_grey_tiff_of_16_bits_whose_white_is_0() -> None:
    pixels = RNG.integers(0, 65536, (12, 16), np.uint16)
    data = saved(Image.fromarray(pixels), "TIFF")
    is_black, is_white = (struct.pack("<HHIH", 262, 3, 1, value) for value in (1, 0))
    assert data.count(is_black) == 1
    inverted = data.replace(is_black, is_white)
    assert np.array_equal(np.asarray(reopened(inverted, "TIFF")), 65535 - pixels)
    assert np.array_equal(MaskSettings().hole(open_mask(PATH, inverted)), (65535 - pixels) >> 8 > 127)
    twelve = data.replace(struct.pack("<HHIH", 258, 3, 1, 16), struct.pack("<HHIH", 258, 3, 1, 12))
    for open_ in (open_mask, open_picture):
        with pytest.raises(ValueError, match="12 bits a pixel"):
            open_(PATH, data=twelve)


def test_a_grey_gif_keeps_its_transparent_colour() -> None:
    pixels = RNG.integers(0, 20, (16, 16), np.uint8)
    written = reopened(saved(Image.fromarray(pixels), "GIF", transparency=7), "GIF").convert("RGBA")
    assert np.array_equal(np.asarray(written)[..., 3] == 0, pixels == 7)
    assert np.array_equal(np.asarray(written)[..., 0][pixels != 7], pixels[pixels != 7])


def test_channels_of_a_tiff_that_are_not_read_are_told(caplog: pytest.LogCaptureFixture) -> None:
    data = saved(Image.new("RGBA", (8, 8)), "TIFF")
    alpha, other = (struct.pack("<HHIH", 338, 3, 1, kind) for kind in (2, 0))
    assert data.count(alpha) == 1
    with caplog.at_level(logging.WARNING):
        open_picture(PATH, None, data.replace(alpha, other))
    assert "3 of its 4 channels are read" in caplog.text


def test_a_progressive_jpeg_of_noise() -> None:
    """Pillow's room for one is 2 bytes a pixel."""
    noise = RNG.integers(0, 256, (200, 200, 3), np.uint8)
    how = [cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]
    data = cv2.imencode(".jpg", noise, how)[1].tobytes()
    assert len(data) > 2 * 200 * 200
    before = np.asarray(Image.open(io.BytesIO(data)), np.int16)
    assert np.abs(np.asarray(reopened(data, "JPEG"), np.int16) - before).max() <= 4
