"""Pictures in and out of files: format, quality, orientation, profile, resolution, EXIF, alpha and depth stay.

What happens to each kind (known pixel: one outside the hole):

    grey, grey + alpha, RGB, RGBA, 1 bit   stay as they are; alpha is not touched
    palette                                written as RGB(A), known pixels have the same colours; in a GIF the palette
                                           stays and the hole gets the nearest of its colours
    a transparent colour (PNG)             becomes an alpha channel
    16-bit grey (PNG, TIFF)                stays 16 bits
    16-bit colour PNG                      stays 16 bits, written as PNG; as JPEG or WebP it is reduced, with a warning
    16-bit colour TIFF, 32-bit numbers     refused: Pillow would drop bits without a word
    CMYK (JPEG, TIFF)                      stays CMYK, filled through its profile; as another format it becomes RGB
    rotated by EXIF                        filled as it is displayed, stored turned as before (TIFF, BMP: upright)
    JPEG                                   written with the tables and the subsampling it had, as RGB, CMYK or YCCK if
                                           it was; other input: quality 95
    WebP                                   lossless stays lossless; else quality 95
    AVIF, HEIC                             quality 95, stored upright; HEIC needs the extra heic
    several frames or pages                refused (of an MPO, a phone's JPEG with extras, the main picture is taken)

What the file says about its picture is carried by metadata.py, without previews: they would show what was removed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, JpegImagePlugin, UnidentifiedImageError

from ...plugins.shared.command import one_line
from ...plugins.shared.extras import is_installed, pip_install
from ...plugins.shared.files import written_whole
from . import jpeg, metadata, png16
from .canvas import ArrayCanvas, PillowCanvas, cmyk_to_srgb
from .geometry import Mask, Size
from .masks import note_depth
from .metadata import Metadata
from .previews import without_jpegs
from .tiff import ORIENTATION, without_orientation

log = logging.getLogger(__name__)

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".avif": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
}
READABLE = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM", b"GIF87a", b"GIF89a")
BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heif", b"mif1", b"msf1")
"""Of the ISO media files that are pictures; the last five are HEIF's."""
NO_ALPHA = ("JPEG", "BMP", "GIF")
KEEPS_ORIENTATION = ("PNG", "JPEG", "WEBP")
LOSSLESS_TIFF = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "lzma", "zstd", "group4")
# EXIF orientation to what turns the stored picture into the displayed one; only 6 and 8 are not their own inverse.
DISPLAYS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INVERSE = {6: 8, 8: 6}


@dataclass
class Picture:
    """A picture as it is displayed, on a canvas, with what its file needs to be written again."""

    canvas: PillowCanvas | ArrayCanvas
    format: str  # that of the file it came from, in Pillow's names
    orientation: int  # EXIF: 1 to 8
    metadata: Metadata
    info: dict[str, Any]
    data: bytes  # the file it came from
    name: str  # of that file, for warnings

    def make_opaque(self, mask: Mask) -> None:
        """Set alpha to opaque where `mask` is True; a picture without alpha stays as it is."""
        if isinstance(self.canvas, ArrayCanvas):
            if self.canvas.array.ndim == 3 and self.canvas.array.shape[2] in (2, 4):
                self.canvas.array[..., -1][mask] = np.iinfo(self.canvas.array.dtype).max
        elif self.canvas.image.mode in ("LA", "RGBA"):
            alpha = self.canvas.image.getchannel("A")
            alpha.paste(255, (0, 0), Image.fromarray(mask))
            self.canvas.image.putalpha(alpha)

    def save(self, path: Path, changed: bool = True, format_: str | None = None) -> None:
        """Write the picture whole or not at all. Raises OSError or ValueError.

        changed: False where nothing was filled; then a file of the same format gets the very bytes that came.
        format_: Pillow's name of the format to write; None: that of the path's suffix.
        """
        encoded = self.encoded(format_ or output_format(path), changed)
        with written_whole(path) as temporary:
            temporary.write_bytes(encoded)

    def encoded(self, format_: str, changed: bool = True) -> bytes:
        """Return the bytes of a file in a format of Pillow's name; `changed` as in `save`. Raises ValueError."""
        if not changed and format_ == self.format:
            return self.data
        said, same = self.metadata, format_ == self.format
        keeps = format_ in KEEPS_ORIENTATION
        turn_back = INVERSE.get(self.orientation, self.orientation) if keeps else 1
        if turn_back == 1:
            said = said.upright()
        self._warn_of_losses(format_)
        if isinstance(self.canvas, ArrayCanvas):
            array = _displayed(self.canvas.array, turn_back)
            if format_ == "PNG" and self.format == "PNG":
                shown = metadata.png_for_decoder(self.data)
                own = [one for one in png16.chunks(shown) if one[0] in (b"tRNS", b"pHYs")]
                return metadata.add_to_png(png16.encode(array), metadata.png_chunks(said, same) + own)
            image = Image.fromarray(array)
        else:
            image = self.canvas.image.copy()  # Pillow would write a TIFF's own tags, Photoshop's preview among them
            if turn_back in DISPLAYS:
                image = image.transpose(DISPLAYS[turn_back])
        image.info = {key: image.info[key] for key in ("transparency", "background", "comment") if key in image.info}
        buffer = io.BytesIO()
        ycck = format_ == self.format == "JPEG" and self.info.get("ycck")
        options = self._options(format_, said)
        try:
            image = jpeg.to_ycck(image) if ycck else image
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd EXIF, which Pillow reads again for AVIF and WebP
                try:
                    image.save(buffer, format_, **options)
                except OSError:
                    if not options.get("progressive"):
                        raise
                    # Pillow has room for 2 bytes a pixel only where a JPEG is progressive; the pixels are the same.
                    buffer = io.BytesIO()
                    image.save(buffer, format_, **options | {"progressive": False})
        except (OSError, ValueError, SystemError) as error:
            raise ValueError(f"the picture cannot be written as {format_}: {error}") from error
        encoded = buffer.getvalue()
        if format_ == "JPEG":
            return metadata.add_to_jpeg(self.name, jpeg.marked_ycck(encoded) if ycck else encoded, said)
        if format_ == "PNG":
            return metadata.add_to_png(encoded, metadata.png_chunks(said, same))
        return metadata.add_to_tiff(encoded, said) if format_ == "TIFF" else encoded

    def _warn_of_losses(self, format_: str) -> None:
        said = self.metadata
        lost = ["IPTC"] if said.iptc and format_ not in ("JPEG", "PNG", "TIFF") else []
        lost += ["Photoshop's resources"] if said.resources and format_ != "JPEG" else []
        if format_ in ("BMP", "GIF"):
            lost += [
                what for what, there in (("EXIF", said.exif), ("XMP", said.xmp), ("the profile", said.icc)) if there
            ]
        if format_ != "PNG":
            texts = [body for kind, body in said.chunks if kind in metadata.TEXT_CHUNKS]
            lost += [f"the text {body.split(bytes(1))[0].decode('latin-1')}" for body in texts]
        if lost:
            log.warning("%s: %s cannot be kept as %s", self.name, ", ".join(lost), format_)

    def _options(self, format_: str, said: Metadata) -> dict[str, Any]:
        """Return the keyword arguments for Pillow's save() that keep what the file had."""
        options: dict[str, Any] = {}
        same = format_ == self.format
        if said.icc and format_ in ("JPEG", "WEBP", "TIFF", "AVIF", "HEIF"):
            options["icc_profile"] = said.icc
        if _usable_resolution(self.info.get("dpi")):
            options["dpi"] = self.info["dpi"]
        if format_ in ("WEBP", "AVIF", "HEIF"):
            exif = said.exif if format_ == "WEBP" else without_orientation(said.exif)
            options |= {key: value for key, value in (("exif", exif), ("xmp", said.xmp)) if value}
        if format_ == "JPEG":
            if same:
                kept = ("qtables", "subsampling", "keep_rgb", "quality", "comment")
                options |= {key: self.info[key] for key in kept if key in self.info}
                options["progressive"] = bool(self.info.get("progressive"))
            else:
                options |= {"quality": 95, "subsampling": 0}
        if format_ == "WEBP":
            lossy = self.format in ("JPEG", "AVIF", "HEIF") or (same and b"VP8L" not in _riff_chunks(self.data))
            options |= {"quality": 95} if lossy else {"lossless": True, "exact": True}
        if format_ == "AVIF":
            options |= {"quality": 95, "subsampling": "4:4:4"}
        if format_ == "HEIF":
            options |= {"quality": 95, "chroma": 444}
        if format_ == "TIFF":
            compression = self.info.get("compression") if same else "tiff_adobe_deflate"
            options["compression"] = compression if compression in LOSSLESS_TIFF else "tiff_lzw"
        return options


def output_format(path: Path) -> str:
    """Return Pillow's name of the format that a path's suffix stands for; ValueError for one we do not write."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise ValueError(f"cannot write {path.name}: expected a name that ends in {' '.join(FORMATS)}") from None


def open_picture(path: Path, write_as: str | None = None, data: bytes | None = None) -> Picture:
    """Return the picture in a file, ready to be changed and written in format `write_as` (None: that of the file).

    data: the file's bytes, where they are at hand; `path` is then no more than a name for messages.

    Raises ValueError with one line for a file that is no picture, is damaged, too large, has several frames, or cannot
    be written in that format without loss of what it holds; OSError when it cannot be read.
    """
    data = _read(path) if data is None else data
    with _guarded(path), _opened(path, data) as image:
        _refuse_frames(path, image)
        format_ = "JPEG" if image.format == "MPO" else str(image.format)
        target = write_as or format_
        info: dict[str, Any] = {str(key): value for key, value in image.info.items()}
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            info |= jpeg.options_of(path.name, image)
        if format_ == "HEIF":
            _warn_of_heif(path.name, info)
        raw_mode = png16.raw_mode(image)
        _refuse_deep_tiff(path, image)
        _load(path, image, data)
        _warn_of_extra_channels(path, image)
        if info.get("inks_inverted"):
            image.paste(ImageChops.invert(image))
        said = metadata.read_metadata(image, data)
        for sentence in said.left_out:
            log.warning("%s: %s", path.name, sentence)
        orientation = _orientation_of_loaded(image, said)
        info["icc_profile"] = image.info["icc_profile"] = said.icc or None
        if isinstance(info.get("comment"), bytes):
            info["comment"] = image.info["comment"] = without_jpegs(info["comment"])
        if image.has_transparency_data and target in NO_ALPHA and not (target == format_ == "GIF"):
            raise ValueError(f"{path.name} has transparency, which {target} cannot hold: use .png, .webp or .tif")
        canvas: PillowCanvas | ArrayCanvas
        deep = _deep_samples(path, image, raw_mode, data)
        if deep is not None and "transparency" in image.info:
            deep = png16.with_alpha(deep, image.info["transparency"])
        if deep is not None and _keeps_depth(path, target, ("PNG", "TIFF") if deep.ndim == 2 else ("PNG",)):
            canvas = ArrayCanvas(_displayed(deep, orientation))
        else:
            if image.mode == "CMYK" and target not in ("JPEG", "TIFF"):
                said.icc = b""
            bits = data[24] if format_ == "PNG" else 8
            working = _working_mode(path, image, target, bits) if deep is None else _in_eight_bits(deep)
            canvas = PillowCanvas(working.transpose(DISPLAYS[orientation]) if orientation in DISPLAYS else working)
    return Picture(canvas, format_, orientation, said, info, data, path.name)


def looks_like_picture(path: Path) -> bool:
    """Return whether a file begins like a picture that we read; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False
    webp = start[:4] == b"RIFF" and start[8:] == b"WEBP"
    return start.startswith(STARTS) or webp or (start[4:8] == b"ftyp" and start[8:] in BRANDS)


def written_format(output: Path, source: Path) -> str | None:
    """Return Pillow's name of the format for an output, None for that of the picture's bytes.

    The suffix says it, unless it is the source's too. Raises ValueError for a suffix of no format.
    """
    if output.suffix.lower() == source.suffix.lower():
        return None
    return output_format(output)


def open_mask(path: Path, data: bytes | None = None) -> Image.Image:
    """Return a mask's picture as it is displayed, whole in memory. Arguments and errors as in `open_picture`."""
    data = _read(path) if data is None else data
    with _guarded(path), _opened(path, data) as image:
        _refuse_frames(path, image)
        note_depth(image)
        raw_mode = png16.raw_mode(image)
        _load(path, image, data)
        orientation = _orientation_of_loaded(image, metadata.read_metadata(image, data))
        mask: Image.Image = image
        if raw_mode is not None and "transparency" in image.info:  # Pillow compares 8 bits with a colour of 16
            samples = png16.decode(metadata.png_for_decoder(data), raw_mode)
            mask = _in_eight_bits(png16.with_alpha(samples, image.info["transparency"]))
        elif (grey := _deep_samples(path, image, None, data)) is not None:
            mask = Image.fromarray(grey)
            mask.info = image.info
        return mask.transpose(DISPLAYS[orientation]) if orientation in DISPLAYS else mask


def stored_size(path: Path) -> Size:
    """Return H,W of a picture as it is stored, by its header where that will do. Errors as in `open_picture`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_readable()) as image:
                return image.height, image.width
    except Exception:  # no picture, or one that is read with what is odd in it left out
        with _guarded(path), _opened(path, _read(path)) as image:
            return image.height, image.width


def read_rgb(path: str | os.PathLike[str], short_side: int | None = None) -> NDArray[np.uint8]:
    """Return a picture to look at, not to write again: uint8 H,W,3 RGB, turned upright, 16 bits reduced to 8.

    short_side: larger pictures are shrunk to this while they are read. The format is any that Pillow reads.

    Raises ValueError, one line naming the file, when it cannot be read or decoded completely.
    """
    try:
        _readable()  # HEIC too, where it can be read
        # From memory: Pillow maps a plain grey TIFF that it opens by name, and turns it wrong.
        with Image.open(io.BytesIO(Path(path).read_bytes())) as opened:
            ratio = max(opened.size) / min(opened.size)
            if short_side:
                opened.draft("RGB", (short_side, short_side))  # lets the JPEG decoder skip detail, never below this
            picture: Image.Image = upright(opened, Path(path).name)
            if picture.mode in ("I", "F"):  # whether 1, 255 or 65535 is white nobody can tell
                raise ValueError(f"32-bit numbers (Pillow's mode {picture.mode}) are not supported: save it as 8 bits")
            if picture.mode.startswith("I;16"):  # 16 bits: Pillow's own conversion clips at 255
                picture = Image.fromarray((np.clip(np.asarray(picture), 0, 65535) / 257 + 0.5).astype(np.uint8))
            picture = picture.convert("RGB")
            if short_side and min(picture.size) > short_side:
                long_side = round(short_side * ratio)
                size = (short_side, long_side) if picture.width <= picture.height else (long_side, short_side)
                picture = picture.resize(size, Image.Resampling.LANCZOS)
            return np.asarray(picture)
    except Exception as error:  # Pillow raises many classes for broken files
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise ValueError(f"{path} cannot be read: {reason}") from error


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Turn whatever decoders raise within the block into a ValueError of one line that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # struct.error, SyntaxError, TypeError, EOFError, ...: each decoder has its own
        if isinstance(error, ValueError) and path.name in str(error):
            raise
        raise ValueError(f"{path} cannot be read as a picture: {one_line(error)}") from error


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected a picture file")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty: expected a picture file")
    return data


def _opened(path: Path, data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Of odd metadata, and from 89 megapixels; it refuses from 179, and a large photograph is no bomb.
            warnings.simplefilter("ignore")
            shown = metadata.png_for_decoder(data) if data.startswith(png16.SIGNATURE) else data
            return Image.open(io.BytesIO(shown), formats=_readable())
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is refused as a decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        if data[4:8] == b"ftyp" and data[8:12] in BRANDS[2:] and not is_installed("pillow_heif"):
            raise ValueError(f"{path} is a HEIC picture, which needs pillow-heif: {pip_install('heic')}") from error
        raise ValueError(
            f"{path} is not a picture we can read: expected PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF or HEIC"
        ) from error


@functools.cache
def _readable() -> tuple[str, ...]:
    """Return the formats to read, in Pillow's names; HEIF where pillow-heif is installed."""
    if not is_installed("pillow_heif"):
        return READABLE
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return (*READABLE, "HEIF")


def _load(path: Path, image: Image.Image, data: bytes) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd metadata; what matters is an exception
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # as above
        whole = jpeg.without_end(data) if image.format == "JPEG" else None
        if whole is not None:
            log.warning("%s: the JPEG has no end marker; its pixels are complete", path)
            image.im, image.tile = whole.im, []  # type: ignore[attr-defined]
            return
        raise ValueError(f"{path} is damaged and cannot be decoded: {error}") from error
    if image.mode in ("P", "PA") and image.palette is None:
        raise ValueError(f"{path} is damaged: its pixels are indices into a palette, and the palette is missing")


def _refuse_frames(path: Path, image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ValueError(f"{path} has {frames} frames or pages: expected a single picture")


def _warn_of_heif(name: str, info: dict[str, Any]) -> None:
    there = {"depth maps": info.get("depth_images"), "auxiliary pictures, such as gain maps": info.get("aux")}
    lost = [what for what, found in there.items() if found]
    lost += ["more than 8 bits a channel"] if info.get("bit_depth", 8) > 8 else []
    if lost:
        log.warning("%s: %s cannot be kept", name, ", ".join(lost))


def _refuse_deep_tiff(path: Path, image: Image.Image) -> None:
    bits = image.tag_v2.get(258, (8,)) if image.format == "TIFF" else (8,)  # type: ignore[attr-defined]
    if image.mode in ("I", "F") or (len(bits) > 1 and max(bits) > 8):
        raise ValueError(
            f"{path} has {max(bits)} bits a channel in mode {image.mode}, which cannot be kept: "
            "convert it to a 16-bit PNG, or to 8 bits"
        )


def _warn_of_extra_channels(path: Path, image: Image.Image) -> None:
    channels = image.tag_v2.get(277, 1) if image.format == "TIFF" else 0  # type: ignore[attr-defined]
    if channels > len(image.getbands()):
        log.warning(
            "%s: %d of its %d channels are read, the others left out", path.name, len(image.getbands()), channels
        )


def _orientation_of_loaded(image: Image.Image, said: Metadata) -> int:
    """Return EXIF's orientation, 1 to 8, of pixels in memory: Pillow turns a TIFF while it reads it."""
    return 1 if image.format == "TIFF" else said.orientation


def _deep_samples(path: Path, image: Image.Image, raw_mode: str | None, data: bytes) -> NDArray[np.uint16] | None:
    """Return uint16 H,W or H,W,C of a picture of 16 bits that is in memory, None for others."""
    if raw_mode is not None:
        return png16.decode(metadata.png_for_decoder(data), raw_mode)
    if not image.mode.startswith("I;16"):
        return None
    tags = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    if tags.get(258, (16,)) != (16,):  # Pillow does not scale them
        raise ValueError(f"{path} has {tags[258][0]} bits a pixel: convert it to 16 bits, or to 8")
    samples = np.array(image, np.uint16)
    return 65535 - samples if tags.get(262) == 0 else samples  # Pillow does not invert what has 0 for white


def _in_eight_bits(samples: NDArray[np.uint16]) -> Image.Image:
    return Image.fromarray((samples >> 8).astype(np.uint8))


def _keeps_depth(path: Path, target: str, formats: tuple[str, ...]) -> bool:
    """Return whether `target` can hold 16 bits of this picture; warn if it is lossy anyway, ValueError if it is not."""
    if target in formats:
        return True
    if target not in ("JPEG", "WEBP"):
        raise ValueError(f"{path.name} has 16 bits a channel, which are kept in a .png only, not as {target}")
    log.warning("%s has 16 bits a channel and %s holds 8: reduced", path.name, target)
    return False


def _working_mode(path: Path, image: Image.Image, target: str, bits: int) -> Image.Image:
    """Return the picture in the mode in which it is filled and written, every colour unchanged."""
    if target == "GIF" and image.mode in ("1", "L") and "transparency" in image.info:
        return image.convert("L").convert("P")  # a grey palette, and the same number is transparent
    if image.mode in ("1", "L", "RGB") and "transparency" in image.info:
        return _with_alpha(image, bits)
    if image.mode in ("P", "PA") and target != "GIF":
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode == "CMYK" and target not in ("JPEG", "TIFF"):
        log.warning("%s is CMYK, which %s cannot hold: converted to RGB", path.name, target)
        return cmyk_to_srgb(image)
    if image.mode in ("RGBX", "YCbCr") and target not in ("JPEG", "TIFF"):
        return image.convert("RGB")
    if target == "GIF" and image.mode not in ("1", "L", "P"):
        log.warning("a GIF holds 256 colours: known pixels of %s change too", path.name)
    return image


def orientation_of(image: Image.Image, name: str) -> int:
    """Return a picture's EXIF orientation, 1 to 8; 1 where it has none, or a damaged one (with a warning).

    The picture is decoded first: Pillow turns a TIFF then, and forgets its orientation. Errors are the decoder's.
    """
    image.load()
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # struct.error, SyntaxError, TypeError, ...: as many as ways to be damaged
        log.warning("%s: its EXIF is damaged, so its orientation is not known: %s", name, one_line(error))
        return 1
    return orientation if isinstance(orientation, int) and orientation in DISPLAYS else 1


def upright(image: Image.Image, name: str) -> Image.Image:
    """Return a picture as it is displayed, turned by its EXIF orientation; its `info` still says how it was stored."""
    orientation = orientation_of(image, name)
    return image.transpose(DISPLAYS[orientation]) if orientation in DISPLAYS else image


def as_stored(image: Image.Image, orientation: int) -> Image.Image:
    """Return an upright picture turned back to how one of this EXIF orientation is stored."""
    turn = INVERSE.get(orientation, orientation)
    return image.transpose(DISPLAYS[turn]) if turn in DISPLAYS else image


def _with_alpha(image: Image.Image, bits: int) -> Image.Image:
    """Return a picture with a transparent colour (PNG's tRNS, in samples of `bits`) as one with an alpha channel."""
    key = image.info["transparency"]
    if image.mode == "RGB":
        return image.convert("RGBA")
    grey = image.convert("L")
    scaled = key * 255 // (2**bits - 1) if bits in (2, 4) else key  # Pillow itself scales that of 1 bit
    result = Image.merge("LA", (grey, grey.point([0 if level == scaled else 255 for level in range(256)])))
    result.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return result


def _displayed(array: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return an array H,W or H,W,C turned as DISPLAYS turns a Pillow picture."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _usable_resolution(dpi: Any) -> bool:
    """Return whether it is two numbers that every format can hold."""
    try:
        return all(0 < float(number) < 65536 for number in dpi) and len(dpi) == 2
    except (TypeError, ValueError, ZeroDivisionError):
        return False


def _riff_chunks(data: bytes) -> set[bytes]:
    """Return the kinds of chunks of a WebP file."""
    kinds, position = set(), 12
    while position + 8 <= len(data):
        kinds.add(data[position : position + 4])
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        # A frame's header, and then its chunks.
        position += 24 if data[position : position + 4] == b"ANMF" else 8 + length + length % 2
    return kinds
