"""How a JPEG is stored: colour space, quantization tables, subsampling, end marker. What Pillow alone gets wrong."""

from __future__ import annotations

import io
import logging
import warnings
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

log = logging.getLogger(__name__)

END = b"\xff\xd9"
ADOBE = b"\xff\xee\x00\x0eAdobe"


def options_of(name: str, image: JpegImagePlugin.JpegImageFile) -> dict[str, Any]:
    """Return what Pillow's save() needs to store a picture as this file does.

    Beside its keyword arguments: `ycck` where four channels are YCCK, and `inks_inverted` where Pillow decodes the
    inks the wrong way round: it takes all CMYK for Adobe's, which is inverted.
    """
    adobe, transform = "adobe" in image.info, image.info.get("adobe_transform")
    # Pillow gives table i to channel i, and the last one to the channels after it.
    numbers = [layer[3] for layer in image.layer]
    found: dict[str, Any] = {"subsampling": JpegImagePlugin.get_sampling(image)}
    if all(number in image.quantization for number in numbers):
        while len(numbers) > 1 and numbers[-1] == numbers[-2]:
            numbers.pop()
        found["qtables"] = [image.quantization[number] for number in numbers]
    else:  # they come after the first scan
        found["quality"] = 95
    if len(image.layer) == 3 and _is_rgb(image):
        found["keep_rgb"] = True
        if found["subsampling"] != 0:
            log.warning("%s is stored as RGB and subsampled; it is written without subsampling", name)
            found["subsampling"] = 0
    if len(image.layer) == 4:
        found["subsampling"] = 0
        found["ycck"] = adobe and transform == 2
        found["inks_inverted"] = not adobe
    return found


def _is_rgb(image: JpegImagePlugin.JpegImageFile) -> bool:
    """Return whether three channels are RGB, by the rules of libjpeg (jdapimin.c, default_decompress_parms)."""
    if "jfif" in image.info:
        return False
    if "adobe" in image.info:
        return image.info.get("adobe_transform") == 0
    return [layer[0] for layer in image.layer] == [ord(letter) for letter in "RGB"]


def to_ycck(image: Image.Image) -> Image.Image:
    """Return a CMYK picture with channels that Pillow, storing them as CMYK, writes as YCCK's (JFIF's equations).

    YCCK takes R, G, B as the inverse of C, M, Y (libjpeg, jccolor.c). Pillow inverts all four channels when it stores
    them; so R, G, B are the inks inverted twice, and the channels returned are inverted once.
    """
    inks = np.asarray(image)
    inverted = Image.fromarray(np.ascontiguousarray(inks[..., :3]))
    channels = 255 - np.asarray(inverted.convert("YCbCr"))
    return Image.merge("CMYK", [*map(Image.fromarray, np.moveaxis(channels, -1, 0)), image.getchannel("K")])


def marked_ycck(encoded: bytes) -> bytes:
    """Return a JPEG of Adobe's CMYK with the mark that its channels are YCCK."""
    at = encoded.index(ADOBE) + 15
    return encoded[:at] + b"\x02" + encoded[at + 1 :]


def without_end(data: bytes) -> Image.Image | None:
    """Return the picture in a JPEG that lacks its end marker, decoded; None where pixels are missing too.

    Where all pixels are there, nothing that follows them can change them; a decoder makes up those that are missing
    from what follows.
    """
    body = data[:-1] if data.endswith(b"\xff") else data
    found = []
    for more in (b"", b"\xa5\x5a\x3c" * 40_000):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = Image.open(io.BytesIO(body + more + END), formats=["JPEG"])
                image.load()
        except (OSError, ValueError, SyntaxError):
            return None
        found.append(image)
    return found[0] if found[0].tobytes() == found[1].tobytes() else None
