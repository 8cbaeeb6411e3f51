"""Image files to upright RGB, whatever their mode; and the one error for unreadable ones."""

import contextlib
import errno
import functools
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps

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


class LazyJpeg:
    """A JPEG file whose header alone was read: its size is known, its pixels can be had fewer.

    At 1/2, 1/4 or 1/8 of each side libjpeg leaves the finest frequencies of its blocks out, which
    takes a fraction of the time. Every byte is gone through all the same: what is truncated is
    noticed at any size.
    """

    def __init__(self, opened: ImageFile.ImageFile, name: str) -> None:
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = opened.size
        self.size = (height, width) if orientation in (5, 6, 7, 8) else (width, height)  # upright
        self._opened, self._name = opened, name
        # whether the stored first column, or row, is upright the last one
        self._turned = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)

    def read(self, reduced_by: int = 1) -> Image.Image:
        """Its pixels, upright RGB: ceil(side / reduced_by) of either side. To be asked for once.

        Raises UnreadableImage.
        """
        with named_if_broken(self._name), self._opened:
            decode(self._opened, reduced_by)
            return _upright_rgb(self._opened)

    def origin(self, reduced_by: int) -> tuple[float, float]:
        """Where the upright image's left upper corner lies in the reduced one, in its pixels.

        A pixel stands for a block, counted from the stored corner. An incomplete block, the last of
        a row or column there, may be the first one of the upright image.
        """
        x, y = (
            -(-side // reduced_by) - side / reduced_by if turned else 0.0
            for side, turned in zip(self.size, self._turned, strict=True)
        )
        return x, y


def open_rgb(file: str | Path | bytes, name: str) -> Image.Image:
    """A file or its bytes as an upright RGB image of at least 1x1 pixels.

    Raises:
        UnreadableImage: missing, broken, truncated, empty, or beyond the limits of `opening`.
    """
    image = open_lazily(file, name)
    return image.read() if isinstance(image, LazyJpeg) else image


def open_lazily(file: str | Path | bytes, name: str) -> Image.Image | LazyJpeg:
    """The same, but of a JPEG only the header; what is wrong beyond it, `read` finds out."""
    with named_if_broken(name):
        data = file if isinstance(file, bytes) else read_file(file)
        opened = open_header(data)
        if opened.format == "JPEG":
            return LazyJpeg(opened, name)
        with opened:
            # load before the EXIF is touched: on a broken PNG getexif() raises first, and the next
            # load() of the same object then passes
            decode(opened)
            return _upright_rgb(opened)


def _upright_rgb(decoded: ImageFile.ImageFile) -> Image.Image:
    ImageOps.exif_transpose(decoded, in_place=True)
    return to_rgb(decoded)


@contextlib.contextmanager
def named_if_broken(name: str) -> Iterator[None]:
    try:
        yield
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
