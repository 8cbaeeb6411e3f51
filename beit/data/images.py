"""Image files to upright RGB, whatever their mode; and the one error for unreadable ones."""

import functools
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

# file formats that are opened, whatever the name says: an EPS named .jpg would start Ghostscript
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
# what Pillow's readers raise on broken files (tried on its own collection of them)
BROKEN_FILE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    ImageCms.PyCMSError,
)


class UnreadableImage(Exception):
    """An image that cannot be decoded: its name, and what the reader said."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it survives the way out of a worker
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def open_rgb(file: str | Path | bytes, name: str) -> Image.Image:
    """A file or its bytes as an upright RGB image of at least 1x1 pixels.

    Raises:
        UnreadableImage: missing, broken, truncated, too large (Pillow's limit) or empty.
    """
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with Image.open(stream, formats=_formats()) as opened:
            # load before the EXIF is touched: on a broken PNG getexif() raises first, and the next
            # load() of the same object then passes
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            image = to_rgb(opened)
    except BROKEN_FILE_ERRORS as error:
        raise UnreadableImage(name, _reason(error)) from error
    if image.width < 1 or image.height < 1:
        raise UnreadableImage(name, f"{image.width}x{image.height} pixels")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits a channel.

    Transparency is dropped and the colour beneath it kept, Pillow's and torchvision's convention.
    16-bit grey is scaled to 8 bits, where Pillow clips it to white; so is 32-bit integer grey,
    which in files is 16-bit grey under another name. Lab goes through the colour profile.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        converted = ImageCms.applyTransform(image, _lab_to_srgb())
        assert converted is not None  # None only in place
        return converted
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")  # resolves the palette without Pillow's warning
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(*profiles, "LAB", "RGB")
