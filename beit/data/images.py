"""Image files to upright RGB, whatever their mode; and the one error for unreadable ones."""

import errno
import functools
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from beit.data.opening import decode, open_header, read_file
from beit.printable import printable

# what Pillow's readers raise on broken files (tried on its own collection of them)
BROKEN_FILE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    RuntimeError,  # AVIF
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    ImageCms.PyCMSError,
)
# not the image's fault: it would be counted as broken in this run and not in the next
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class UnreadableImage(Exception):
    """An image that cannot be decoded: its name, and what the reader said, fit to be printed."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it survives the way out of a worker
        self.name = printable(name)
        self.reason = printable(reason)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def open_rgb(file: str | Path | bytes, name: str) -> Image.Image:
    """A file or its bytes as an upright RGB image of at least 1x1 pixels.

    Raises:
        UnreadableImage: missing, broken, truncated, empty, or beyond the limits of `opening`.
    """
    try:
        data = file if isinstance(file, bytes) else read_file(file)
        with open_header(data) as opened:
            # load before the EXIF is touched: on a broken PNG getexif() raises first, and the next
            # load() of the same object then passes
            decode(opened)
            ImageOps.exif_transpose(opened, in_place=True)
            return to_rgb(opened)
    except BROKEN_FILE_ERRORS as error:
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            raise
        raise UnreadableImage(name, _reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits a channel.

    Transparency is dropped and the colour beneath it kept, Pillow's and torchvision's convention.
    16-bit grey is scaled to 8 bits, where Pillow clips it to white; so is 32-bit integer grey,
    which in files is 16-bit grey under another name. Lab goes through the colour profile.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        levels += 128  # in place: four bytes a pixel are enough
        levels //= 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        converted = ImageCms.applyTransform(image, _lab_to_srgb())
        assert converted is not None  # None only in place
        return converted
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")  # resolves the palette without Pillow's warning
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the name is told already
    return " ".join(str(error).split()) or type(error).__name__


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(*profiles, "LAB", "RGB")
