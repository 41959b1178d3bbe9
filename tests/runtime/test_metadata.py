"""What a file says about its picture, read from the results by Pillow and by looking for the bytes that went in."""

from __future__ import annotations

import base64
import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from misf.runtime.pictures import png16
from misf.runtime.pictures.image_io import open_picture
from misf.runtime.pictures.metadata import add_to_png
from misf.runtime.pictures.previews import exif_without_previews

PIXELS = np.random.default_rng(7).integers(0, 256, (48, 64, 3), dtype=np.uint8)
FORMATS = [".jpg", ".png", ".webp", ".tif", ".avif"]
NAME = "© 2024 José 東京".encode()


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


PREVIEW = _jpeg(PIXELS[:24, :32])


def _exif(order: str, orientation: int = 1, preview: bytes = b"") -> bytes:
    """Return EXIF with an orientation, a copyright and a value of an odd type, and a preview in a second directory."""
    at = 8 + 2 + 12 * 3 + 4
    body = struct.pack(order + "d", 2.5) + NAME + b"\0" + bytes(len(NAME) % 2 + 1)
    rows = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    rows += struct.pack(order + "HHII", 0x0128, 12, 1, at)
    rows += struct.pack(order + "HHII", 0x8298, 2, len(NAME) + 1, at + 8)
    second, last = 0, b""
    if preview:
        second = at + len(body)
        start = second + 2 + 24 + 4
        last = struct.pack(order + "H", 2) + struct.pack(order + "HHII", 0x0201, 4, 1, start)
        last += struct.pack(order + "HHII", 0x0202, 4, 1, len(preview)) + bytes(4) + preview
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(order + "HIH", 42, 8, 3)
    return head + rows + struct.pack(order + "I", second) + body + last


def _result(path: Path, output: Path | None = None) -> Path:
    output = output or path.with_name(f"out{path.suffix}")
    open_picture(
        path, {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".avif": "AVIF"}[output.suffix]
    ).save(output)
    return output


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_exif_stays_to_the_byte_but_for_the_preview(tmp_path: Path, suffix: str, order: str) -> None:
    path = tmp_path / f"in{suffix}"
    plain = _exif(order, 6)
    Image.fromarray(PIXELS).save(path, exif=b"Exif\0\0" + _exif(order, 6, PREVIEW))
    data = _result(path).read_bytes()
    assert plain in data
    assert PREVIEW not in data


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", [".jpg", ".png", ".webp"])
def test_texts_and_what_is_displayed_stay_in_every_format(tmp_path: Path, source: str, target: str) -> None:
    path = tmp_path / f"in{source}"
    exif = _exif("<" if target != ".avif" else ">", 6)
    Image.fromarray(PIXELS).save(path, exif=b"Exif\0\0" + exif, quality=100, lossless=True)
    output = _result(path, tmp_path / f"out{target}")
    assert NAME in output.read_bytes()
    with Image.open(output) as image:
        image.load()
        turned = image.size if image.getexif().get(0x0112, 1) == 1 else image.size[::-1]
    assert turned == (48, 64)


def test_no_preview_is_in_any_result(tmp_path: Path) -> None:
    encoded = base64.b64encode(PREVIEW)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><xmpGImg:image>' + encoded + b"</xmpGImg:image>kept</x:xmpmeta>"
    exif = _exif(">", 1, PREVIEW)
    profile = b"\nexif\n%8d\n" % (len(exif) + 6) + (b"Exif\0\0" + exif).hex().encode() + b"\n"
    raw = (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))
    resource = b"8BIM" + struct.pack(">HHI", 1036, 0, 28 + len(PREVIEW)) + bytes(28) + PREVIEW
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[34377], tags[700] = resource, xmp
    tags.tagtype[34377], tags.tagtype[700] = 7, 1
    for name in ("a.jpg", "a.webp"):
        Image.fromarray(PIXELS).save(tmp_path / name, exif=b"Exif\0\0" + exif, xmp=xmp)
    without_orientation = exif.replace(
        struct.pack(">H", 0x0112), struct.pack(">H", 0x0100), 1
    )  # Pillow cannot write ours
    Image.fromarray(PIXELS).save(tmp_path / "a.avif", exif=without_orientation, xmp=xmp)
    assert PREVIEW in (tmp_path / "a.avif").read_bytes()
    Image.fromarray(PIXELS).save(tmp_path / "a.tif", tiffinfo=tags)
    Image.fromarray(PIXELS).save(tmp_path / "plain.png")
    plain = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "a.png").write_bytes(add_to_png(plain, [(b"eXIf", exif), raw]))
    (tmp_path / "b.png").write_bytes(add_to_png(plain, [raw]))
    (tmp_path / "deep.png").write_bytes(
        add_to_png(png16.encode(PIXELS.astype(np.uint16) * 257), [(b"eXIf", exif), raw])
    )
    for source in ("a.jpg", "a.webp", "a.avif", "a.tif", "a.png", "b.png", "deep.png"):
        for target in FORMATS if source != "deep.png" else [".png", ".jpg", ".webp"]:
            written = _result(tmp_path / source, tmp_path / f"out{target}").read_bytes()
            if target == ".png":
                bodies = [body for kind, body in png16.chunks(written) if kind == b"zTXt"]
                written += b"".join(zlib.decompress(body[body.index(b"\0") + 2 :]) for body in bodies)
            for hidden in (PREVIEW, encoded, PREVIEW.hex().encode()):
                assert hidden not in written, f"{source} as {target}"


def test_a_preview_in_a_makers_note_is_removed() -> None:
    note = b"Maker" + PREVIEW + b"end!"
    exif = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x927C, 7, len(note), 26) + bytes(4) + note
    cleaned = exif_without_previews(exif)
    assert PREVIEW[:20] not in cleaned
    assert cleaned.endswith(b"end!")
    assert len(cleaned) == len(exif)


def _note(note: bytes) -> bytes:
    """Return EXIF of a maker's note alone."""
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x927C, 7, len(note), 26) + bytes(4) + note


def test_a_preview_with_a_preview_of_its_own_is_removed_whole() -> None:
    inner = _jpeg(PIXELS[:8, :8])
    outer = PREVIEW[:2] + struct.pack(">BBH", 0xFF, 0xE1, len(inner) + 2) + inner + PREVIEW[2:]
    assert exif_without_previews(_note(b"Maker" + outer + b"end!")) == _note(b"Maker" + bytes(len(outer)) + b"end!")
    assert exif_without_previews(_note(b"Maker" + outer)) == _note(b"Maker" + bytes(len(outer)))  # nothing is cut off


def _iptc_in_photoshop(records: bytes) -> bytes:
    body = b"8BIM" + struct.pack(">HHI", 0x0404, 0, len(records)) + records + bytes(len(records) % 2)
    body = b"Photoshop 3.0\0" + body
    return struct.pack(">BBH", 0xFF, 0xED, len(body) + 2) + body


def _png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return add_to_png(buffer.getvalue(), list(chunks))


ENCODED = base64.b64encode(PREVIEW)
CAPTION = b"\x1c\x02\x78\0\x07caption"
RAW = base64.b64encode(PIXELS[:16, :16].tobytes())  # no file's first bytes: known by its tag alone
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><dc:title>kept</dc:title>%s</x:xmpmeta>'
HIDING_PLACES = {
    "IPTC.jpg": (
        _jpeg(PIXELS)[:2]
        + _iptc_in_photoshop(b"\x1c\x02\xca" + struct.pack(">H", len(PREVIEW)) + PREVIEW + CAPTION)
        + _jpeg(PIXELS)[2:]
    ),
    "comment.jpg": (
        _jpeg(PIXELS)[:2] + struct.pack(">BBH", 0xFF, 0xFE, len(PREVIEW) + 2) + PREVIEW + _jpeg(PIXELS)[2:]
    ),
    "text.png": _png_with((b"tEXt", b"Thumb::Image\0kept" + ENCODED)),
    "packed text.png": _png_with((b"zTXt", b"preview\0\0" + zlib.compress(b'{"kept": "' + ENCODED + b'"}'))),
    "international text.png": _png_with((b"iTXt", b"preview\0\1\0en\0\0" + zlib.compress(b"kept " + ENCODED))),
    "chunk.png": _png_with((b"prVw", PREVIEW)),
    "XMP tag.png": _png_with(
        (b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + XMP % (b'<g:image a="1">' + RAW + b"</g:image >"))
    ),
    "XMP attribute.png": _png_with(
        (b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + XMP % (b"<rdf:li g:image='" + RAW + b"'/>"))
    ),
}


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("place", HIDING_PLACES)
def test_a_preview_is_removed_from_wherever_it_was(tmp_path: Path, place: str, target: str) -> None:
    source = tmp_path / place
    source.write_bytes(HIDING_PLACES[place])
    written = _result(source, tmp_path / f"out{target}").read_bytes()
    if target == ".png":
        for kind, body in png16.chunks(written):
            start = {b"zTXt": body.find(b"\0") + 2, b"iTXt": body.find(b"en\0\0") + 4}.get(kind)
            if start is not None and body[start : start + 1] == b"\x78":
                written += zlib.decompress(body[start:])
        written += b"".join(bytes.fromhex(word.decode()) for word in written.split() if word[:8] == CAPTION.hex()[:8])
        if "text" in place:
            assert b"kept" in written
    for hidden in (PREVIEW[40:], PREVIEW[40:].hex().encode(), ENCODED[60:], RAW[60:]):
        assert hidden not in written


def test_the_rest_of_iptc_and_of_xmp_in_another_encoding_stays(tmp_path: Path) -> None:
    (tmp_path / "in.jpg").write_bytes(HIDING_PLACES["IPTC.jpg"])
    with Image.open(_result(tmp_path / "in.jpg")) as image:
        assert image.info["photoshop"][0x0404] == CAPTION
    packet = XMP % (b"<g:image>" + RAW + b"</g:image>")
    for encoding in ("utf-16", "utf-16-be", "utf-32-le"):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[700], tags.tagtype[700] = packet.decode().encode(encoding), 1
        Image.fromarray(PIXELS).save(tmp_path / "in.tif", tiffinfo=tags)
        with Image.open(_result(tmp_path / "in.tif", tmp_path / "out.jpg")) as image:
            assert image.info["xmp"].lstrip(b"\xef\xbb\xbf") == XMP % b"<g:image></g:image>"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"gAMA", b"\0"),
        (b"cHRM", bytes(31)),
        (b"sRGB", b""),
        (b"pHYs", bytes(8)),
        (b"tRNS", bytes(5)),
        (b"iCCP", b"profile\0\0no zlib"),
        (b"zTXt", b"Title\0\0no zlib"),
        (b"zTXt", b"Title\0\7" + zlib.compress(b"an unknown method")),
    ],
)
def test_a_damaged_chunk_is_left_out_with_a_warning(
    tmp_path: Path, kind: bytes, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in.png").write_bytes(_png_with((kind, body), (b"tEXt", b"Title\0kept")))
    for suffix in FORMATS:
        with Image.open(_result(tmp_path / "in.png", tmp_path / f"out{suffix}")) as image:
            image.load()
            if suffix == ".png":
                np.testing.assert_array_equal(np.asarray(image), PIXELS)
                assert image.info == {"Title": "kept"}
    assert f"in.png: its chunk {kind.decode()} is damaged and left out" in caplog.text


def test_a_deep_picture_opens_beside_long_texts_and_damaged_chunks(tmp_path: Path) -> None:
    long_text = (b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000))
    pixels = PIXELS.astype(np.uint16) * 257
    given = [long_text, (b"pHYs", bytes(8)), (b"gAMA", b"\0")]
    (tmp_path / "in.png").write_bytes(add_to_png(png16.encode(pixels), given))
    kept = list(png16.chunks(_result(tmp_path / "in.png").read_bytes()))
    assert [one in kept for one in given] == [True, False, False]
    assert dict(kept)[b"IDAT"] == dict(png16.chunks(png16.encode(pixels)))[b"IDAT"]


def test_damage_that_points_at_itself_takes_no_time(tmp_path: Path) -> None:
    pointers = struct.pack("<HHII", 0x8769, 4, 1, 8) * 5000
    loops = b"II*\0\x08\0\0\0" + struct.pack("<H", 5000) + pointers + bytes(4)
    starts = _note(b"\xff\xd8\xff\xe0" * 15_000)
    whole_file = b"".join(struct.pack("<HHII", tag, 7, 60_000, 8) for tag in range(0x9000, 0x9000 + 4990))
    large = b"II*\0\x08\0\0\0" + struct.pack("<H", 4990) + whole_file + bytes(4) + bytes(200)
    nested = b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x8769, 4, 1, 26, 0) + large[8:]
    for exif in (loops, starts, large, nested):
        Image.fromarray(PIXELS).save(tmp_path / "in.png")
        (tmp_path / "in.png").write_bytes(add_to_png((tmp_path / "in.png").read_bytes(), [(b"eXIf", exif)]))
        started = time.process_time()
        for suffix in (".png", ".jpg", ".tif"):
            assert len(_result(tmp_path / "in.png", tmp_path / f"out{suffix}").read_bytes()) < 1_000_000
        assert time.process_time() - started < 5


def test_a_second_directory_over_the_first_leaves_the_first_alone() -> None:
    row = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"II*\0\x08\0\0\0\x01\0" + row + struct.pack("<I", 8)
    assert exif_without_previews(exif) == b"II*\0\x08\0\0\0\x01\0" + row + bytes(4)


@pytest.mark.parametrize("garbage", [b"garbage!", b"b'Exif\\x00\\x00II*\\x00'", b"II*\0\xff\xff\xff\xff"])
def test_exif_that_is_none_is_left_out_with_a_warning(
    tmp_path: Path, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "in.png")
    (tmp_path / "in.png").write_bytes(add_to_png((tmp_path / "in.png").read_bytes(), [(b"eXIf", garbage)]))
    assert garbage not in _result(tmp_path / "in.png").read_bytes()
    assert "in.png: its EXIF data is damaged and left out" in caplog.text


def test_iptc_and_profile_go_from_one_format_to_the_others(tmp_path: Path) -> None:
    iptc = b"\x1c\x02\x78\0\x07caption"
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[33723] = iptc
    tags.tagtype[33723] = 7
    Image.fromarray(PIXELS).save(tmp_path / "in.tif", tiffinfo=tags, icc_profile=bytes(range(256)) * 1000)
    for name in ("out.jpg", "out.png", "back.tif"):
        source = tmp_path / ("in.tif" if name != "back.tif" else "out.png")
        with Image.open(_result(source, tmp_path / name)) as image:
            image.load()
            assert image.info["icc_profile"] == bytes(range(256)) * 1000
            if name == "out.jpg":
                assert image.info["photoshop"][0x0404] == iptc
            if name == "back.tif":
                assert bytes(image.tag_v2[33723]) == iptc  # type: ignore[attr-defined]


def test_png_chunks_by_the_standards_rules(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "in.png")
    long_text = b"workflow\0\0" + zlib.compress(b"x" * 3_000_000)
    given = [
        (b"zTXt", long_text),
        (b"prVt", b"safe to copy"),
        (b"prVT", b"tied to the data"),
        (b"gAMA", b"\0\0\xb1\x8f"),
    ]
    (tmp_path / "in.png").write_bytes(add_to_png((tmp_path / "in.png").read_bytes(), given))
    kept = list(png16.chunks(_result(tmp_path / "in.png").read_bytes()))
    assert [one in kept for one in given] == [True, True, False, True]


@pytest.mark.parametrize(("bits", "levels"), [(1, 1), (2, 3), (4, 15), (8, 255)])
def test_a_transparent_grey_becomes_alpha(tmp_path: Path, bits: int, levels: int) -> None:
    row = bytes([0b11110000] * 4)
    header = struct.pack(">IIBBBBB", 32 // bits, 1, bits, 0, 0, 0, 0)
    key = 0b11110000 >> (8 - bits)
    chunks = [
        (b"IHDR", header),
        (b"tRNS", struct.pack(">H", key)),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    (tmp_path / "in.png").write_bytes(png16.SIGNATURE + b"".join(png16.chunk(*one) for one in chunks))
    samples = [
        (byte >> shift) & levels for byte in row for shift in range(8 - bits, -1, -bits)
    ]  # by the specification: the leftmost sample is in the highest bits
    for suffix in (".png", ".webp", ".tif"):
        with Image.open(_result(tmp_path / "in.png", tmp_path / f"out{suffix}")) as image:
            alpha = np.asarray(image.convert("RGBA"))[0, :, 3]
        assert alpha.tolist() == [0 if sample == key else 255 for sample in samples]


def test_odd_exif_makes_no_warning_of_pillow(tmp_path: Path) -> None:
    path = tmp_path / "in.jpg"
    longer = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 270, 5, 5, 0, 0)  # five rationals, of a file that has none
    head = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(longer) + 8) + b"Exif\0\0" + longer
    path.write_bytes(head + _jpeg(PIXELS)[20:])  # without JFIF, whose resolution Pillow would take
    with pytest.warns(UserWarning, match="larger than file"), Image.open(path):
        pass
    assert open_picture(path, "JPEG").canvas.size == (48, 64)


def test_a_number_that_begins_like_a_jpeg_takes_nothing_with_it(tmp_path: Path) -> None:
    path, number, alike = tmp_path / "in.png", struct.pack("<d", 2.5), b"\xff\xd8\xff\0abcd"
    exif, plain = (_exif("<", 6, preview).replace(number, alike) for preview in (PREVIEW, b""))
    Image.fromarray(PIXELS).save(path, exif=exif)
    data = _result(path).read_bytes()
    assert plain in data
    assert PREVIEW[20:] not in data


def test_a_value_as_long_as_all_of_exif_leaves_the_orientation(tmp_path: Path) -> None:
    path = tmp_path / "in.webp"
    exif = b"II*\0" + struct.pack("<IHHHIIHHIHHI", 8, 2, 270, 3, 19, 0, 0x0112, 3, 1, 6, 0, 0)
    assert len(exif) == 38
    Image.fromarray(PIXELS).save(path, exif=exif)
    assert open_picture(path, "WEBP").canvas.size == (64, 48)


def test_odd_exif_makes_no_warning_of_pillow_when_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "in.webp"
    longer = b"II*\0" + struct.pack("<IHHHIIHHIHHI", 8, 2, 270, 3, 20, 0, 0x0112, 3, 1, 6, 0, 0)
    Image.fromarray(PIXELS).save(path, exif=longer)
    assert b"ftypavif" in open_picture(path, "AVIF").encoded("AVIF")
