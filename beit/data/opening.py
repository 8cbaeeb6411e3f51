"""Image files opened with caution: what is refused before memory or time is spent on it."""

import contextlib
import functools
import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

# file formats that are opened, whatever the name says: an EPS named .jpg would start Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")

# A decoded image takes up to 10 bytes a pixel on its way to RGB: 1.3 GB at most, in each worker.
# Photographs of the largest medium-format sensors but one have 102 million.
MAX_PIXELS = 128_000_000  # unless loader.max_image_pixels says otherwise
# What claims more than this must also be as long as any photograph is, and a drawing nearly always:
# one byte for 200 pixels. (A white PNG of 10,000 x 10,000 has one for 340 to 1,000.)
SPARSE_PIXELS = 50_000_000
SPARSE_PIXELS_PER_BYTE = 200
# The tables of a resize grow with the longer side; a JPEG cannot be longer either.
MAX_SIDE = 65_535
# 128 million pixels without compression, and some; all of a file is read before it is looked at
MAX_FILE_BYTES = 512 * 2**20
# Each scan of a progressive JPEG goes over the whole picture, and an empty one takes 30 bytes: a
# file of 1 MB could keep a worker busy for hours. Encoders write 10 or so.
MAX_SCANS = 100


class Refused(ValueError):
    """A file that is not decoded, and why."""


def limit_pixels(count: int) -> None:
    """From now on this process decodes no image of more pixels."""
    global MAX_PIXELS
    MAX_PIXELS = count


def read_file(path: str | Path) -> bytes:
    """All bytes of a regular file.

    Pipes, sockets and devices are refused before they are opened: they would wait for ever. The
    decoder gets bytes, not the file: it may not be mapped into memory, where a file that shrinks
    kills the process.

    Raises:
        Refused: not a regular file, or more than MAX_FILE_BYTES.
        OSError: whatever else keeps it from being read.
    """
    _check_regular(os.stat(path))
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # it may have been exchanged since
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        _check_regular(status)
        # no more than it claims: some of /proc claim nothing and go on for ever
        return file.read(status.st_size)


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = {
            stat.S_IFDIR: "a folder",
            stat.S_IFIFO: "a named pipe",
            stat.S_IFSOCK: "a socket",
        }.get(stat.S_IFMT(status.st_mode), "a device")
        raise Refused(f"{kind}, not a file")
    _check_length(status.st_size)


def _check_length(count: int) -> None:
    limit = max(MAX_FILE_BYTES, 4 * MAX_PIXELS)
    if count > limit:
        raise Refused(f"{count:,} bytes, more than {limit:,}")


def open_header(data: bytes) -> ImageFile.ImageFile:
    """The first frame of an image, of the size that its header claims, not yet decoded.

    `Image.open` without its own limit, which is the host program's, and warns where it allows.

    Raises:
        Refused: no pixels, or more than the limits of this module.
        UnidentifiedImageError: none of FORMATS.
        Exception: whatever Pillow's readers raise (see `images.BROKEN_FILE_ERRORS`).
    """
    _check_length(len(data))
    stream, said = io.BytesIO(data), ""
    for accepts, read in _readers():
        looks = accepts(data[:16])
        if not looks or isinstance(looks, str):  # a text: this Pillow was built without it
            continue
        stream.seek(0)
        try:
            image: ImageFile.ImageFile = read(stream, "")
        except SyntaxError as error:  # Pillow's word for: not mine
            said = said or str(error)
            continue
        _check_size(image.size, len(data))
        if image.format == "JPEG":
            _check_scans(data)
        return image
    raise UnidentifiedImageError(
        f"no image of a known format ({', '.join(FORMATS)}){said and ': '}{said}"
    )


def decode(image: ImageFile.ImageFile, reduced_by: int = 1) -> None:
    """Read the pixels; of a JPEG, at 1/2, 1/4 or 1/8 of each side if so asked."""
    width, height = (-(-side // reduced_by) for side in image.size)
    if reduced_by > 1:
        # Pillow takes the largest reduction that leaves at least so much
        image.draft(None, (image.width // reduced_by, image.height // reduced_by))
    with _silent_libtiff() if image.format == "TIFF" else contextlib.nullcontext():
        image.load()
    assert image.size == (width, height), "not the reduction that was asked for"


@contextlib.contextmanager
def _silent_libtiff() -> Iterator[None]:
    """It writes a line to stderr for each bad line of a fax, by itself."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed: there is nothing to keep silent
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _check_size(size: tuple[int, int], count: int) -> None:
    width, height = size
    pixels = width * height
    claims = f"{width}x{height} pixels"
    if min(size) < 1:
        raise Refused(claims)
    if max(size) > MAX_SIDE:
        raise Refused(f"{claims}, a side exceeds the limit of {MAX_SIDE:,}")
    if pixels > MAX_PIXELS:
        raise Refused(f"{claims} exceed the limit of {MAX_PIXELS:,} (loader.max_image_pixels)")
    if pixels > max(SPARSE_PIXELS, count * SPARSE_PIXELS_PER_BYTE):
        raise Refused(f"{claims} in {count:,} bytes: a decompression bomb")


def _check_scans(data: bytes) -> None:
    values = np.frombuffer(data, dtype=np.uint8)
    # within the entropy-coded data FF is followed by 00 or a restart marker, never by DA
    scans = np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA))
    if scans > MAX_SCANS:
        raise Refused(f"{scans} scans, more than {MAX_SCANS}: a decompression bomb")


@functools.cache
def _readers() -> list[tuple[Callable[[bytes], Any], Callable[..., Any]]]:
    """(whether the first 16 bytes look like it, reader) of the formats that this Pillow has."""
    Image.init()
    found: list[tuple[Callable[[bytes], Any], Callable[..., Any]]] = []
    for name in FORMATS:
        if name in Image.OPEN:
            reader, accepts = Image.OPEN[name]
            assert accepts is not None, name
            # the registered one looks for further pictures in the file
            found.append((accepts, JpegImagePlugin.JpegImageFile if name == "JPEG" else reader))
    return found
