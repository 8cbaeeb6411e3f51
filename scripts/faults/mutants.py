"""Image files that are broken on purpose: real encodings mutated, and crafted by hand."""

import functools
import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features


@functools.cache
def encodings() -> dict[str, bytes]:
    """Small pictures, one in each encoding that is read."""
    rng = np.random.default_rng(5)
    low = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    rgb = low.resize((96, 72), Image.Resampling.BICUBIC)
    rgba, palette = rgb.copy(), rgb.quantize(31)
    rgba.putalpha(rgb.convert("L"))
    grey16 = Image.fromarray((np.asarray(rgb)[..., 0].astype(np.uint16) << 8) + 7)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    frames = {"save_all": True, "append_images": [rgb.rotate(angle) for angle in (90, 180)]}
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (rgb, "JPEG", {"quality": 90}),
        "jpeg-progressive": (rgb, "JPEG", {"progressive": True, "subsampling": 0}),
        "jpeg-grey-exif": (rgb.convert("L"), "JPEG", {"exif": exif.tobytes()}),
        "jpeg-cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "png": (rgb, "PNG", {"exif": exif}),
        "png-rgba": (rgba, "PNG", {}),
        "png-palette": (palette, "PNG", {"transparency": 3}),
        "png-16": (grey16, "PNG", {}),
        "gif-animated": (rgb, "GIF", frames),
        "tiff-raw": (rgb, "TIFF", {}),
        "tiff-lzw": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "tiff-deflate-16": (grey16, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff-jpeg": (rgb, "TIFF", {"compression": "jpeg"}),
        "tiff-g4": (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        "bmp": (rgb, "BMP", {}),
        "bmp-palette": (palette, "BMP", {}),
        "ppm": (rgb, "PPM", {}),
    }
    if features.check("webp"):
        made |= {
            "webp": (rgb, "WEBP", {"quality": 80, "exif": exif.tobytes()}),
            "webp-lossless": (rgba, "WEBP", {"lossless": True}),
            "webp-animated": (rgb, "WEBP", frames),
        }
    if features.check("avif"):
        made["avif"] = (rgb, "AVIF", {"quality": 60, "speed": 10})
    return {name: encoded(image, form, **options) for name, (image, form, options) in made.items()}


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four mutations, half of them near the beginning, where the headers are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if len(changed) > 8:
            _MUTATIONS[rng.randrange(len(_MUTATIONS))](changed, rng)
    return bytes(changed)


def _place(data: bytearray, rng: random.Random) -> int:
    return rng.randrange(min(len(data), 96) if rng.random() < 0.5 else len(data))


def _flip(data: bytearray, rng: random.Random) -> None:
    data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, rng: random.Random) -> None:
    data[_place(data, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    value = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.randrange(2**32)))
    data[at : at + 4] = struct.pack(rng.choice("<>") + "I", value)


def _overwrite(data: bytearray, rng: random.Random) -> None:
    at, count = _place(data, rng), rng.randrange(1, 64)
    data[at : at + count] = rng.randbytes(count)


def _insert(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    data[at:at] = rng.randbytes(rng.randrange(1, 64))


def _delete(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    del data[at : at + rng.randrange(1, 64)]


def _repeat(data: bytearray, rng: random.Random) -> None:
    at, count = _place(data, rng), rng.randrange(1, 512)
    data[at:at] = data[at : at + count] * rng.randrange(1, 5)


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[_place(data, rng) :]


_MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip, _flip, _byte, _number, _overwrite, _insert, _delete, _repeat, _truncate,
)  # fmt: skip


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"", bits: int = 8) -> bytes:
    """A grey PNG that claims this size, whatever its pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            *chunks,
            png_chunk(b"IDAT", zlib.compress(pixels, 1)),
            png_chunk(b"IEND", b""),
        )
    )


def tiff(width: int, height: int, *extra: tuple[int, int, int, int], pixels: bytes = b"") -> bytes:
    """A grey TIFF of one strip; `extra` entries (tag, type, count, value) go before or instead."""
    entries = {
        256: (256, 4, 1, width), 257: (257, 4, 1, height), 258: (258, 3, 1, 8),
        259: (259, 3, 1, 1), 262: (262, 3, 1, 1), 273: (273, 4, 1, 8),
        277: (277, 3, 1, 1), 278: (278, 4, 1, height), 279: (279, 4, 1, len(pixels)),
    }  # fmt: skip
    entries |= {entry[0]: entry for entry in extra}
    table = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", *entry) for _, entry in sorted(entries.items())
    )
    padded = pixels + b"\0" * (len(pixels) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(padded)) + padded + table + b"\0\0\0\0"


def scan_bomb(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last, almost empty scan is repeated."""
    data = encoded(Image.new("L", (side, side), 100), "JPEG", progressive=True)
    last, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:end] + data[last:end] * scans + b"\xff\xd9"


@functools.cache
def crafted() -> dict[str, bytes]:
    """Files that ask for much more than they are, and some that are no images at all."""
    good = encodings()
    text = b"Comment\0" + b"x" * 3_000_000
    deep = b"Comment\0\0" + zlib.compress(b"\0" * 50_000_000, 1)
    icc = b"icc\0\0" + zlib.compress(b"\0" * 50_000_000, 1)
    row = b"\0" + b"\xff" * 10_000
    many = [(tag, 1, 65_000, 8) for tag in range(40_000, 45_000)]
    files = {
        "empty": b"",
        "one-byte": b"\xff",
        "zeros": bytes(4096),
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n1 1 moveto",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "zip": b"PK\x03\x04" + bytes(60),
        "ico": b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0\x28\0\0\0\x16\0\0\0" + bytes(64),
        "png-bomb-10k": png(10_000, 10_000, pixels=row * 10_000),
        "png-claims-4g": png(65_535, 65_535),
        "png-claims-max": png(2**31 - 1, 2**31 - 1),
        "png-a-line": png(100_000_000, 1),
        "png-zero": png(0, 0),
        "png-text": png(8, 8, png_chunk(b"tEXt", text), pixels=bytes(72)),
        "png-text-bomb": png(8, 8, png_chunk(b"zTXt", deep), pixels=bytes(72)),
        "png-icc-bomb": png(8, 8, png_chunk(b"iCCP", icc), pixels=bytes(72)),
        "png-pixels-bomb": png(8, 8, pixels=bytes(50_000_000)),
        "png-exif-bomb": png(8, 8, png_chunk(b"eXIf", tiff(8, 8, *many, pixels=bytes(65_000))),
                             pixels=bytes(72)),
        "tiff-claims-4g": tiff(65_535, 65_535),
        "tiff-tags": tiff(8, 8, *many, pixels=bytes(65_000)),
        "tiff-tile": tiff(8, 8, (259, 3, 1, 5), (322, 4, 1, 60_000), (323, 4, 1, 60_000),
                          (324, 4, 1, 8), (325, 4, 1, 64), pixels=bytes(64)),
        "tiff-strip": tiff(8, 8, (259, 3, 1, 5), (278, 4, 1, 2**31), pixels=bytes(64)),
        "tiff-planes": tiff(8, 8, (277, 3, 1, 65_535), pixels=bytes(64)),
        "tiff-loop": good["tiff-raw"][:4] + b"\x08\0\0\0" + b"\0\0" + b"\x08\0\0\0" + bytes(64),
        "gif-claims-4g": b"GIF89a\xff\xff\xff\xff\0\0\0" + good["gif-animated"][13:],
        "gif-zero": b"GIF89a\0\0\0\0\0\0\0;",
        "bmp-claims": b"BM" + struct.pack("<IHHI", 200, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(90),
        "ppm-claims": b"P6 60000 60000 255\n" + bytes(100),
        "ppm-number": b"P6 " + b"9" * 5000 + b" 9 255\n",
        "jpeg-scans": scan_bomb(256, 4000),
        "jpeg-claims": good["jpeg"].replace(b"\0\x48\0\x60", b"\xff\xff\xff\xff", 1),
    }  # fmt: skip
    if "webp" in good:
        files["webp-claims"] = (
            b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\xff\xff\xff\xff\xff\xff" + bytes(12)
        )
        lots = [Image.new("P", (8, 8), number % 251) for number in range(2000)]
        files["gif-2000-frames"] = encoded(lots[0], "GIF", save_all=True, append_images=lots[1:])
    return files


def awkward(folder: Path) -> list[Path]:
    """What is named like an image and is none, or cannot be opened."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "folder.jpg").mkdir(exist_ok=True)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "terminal.jpg").symlink_to("/dev/tty")
    with (folder / "sparse.jpg").open("wb") as file:
        file.truncate(2**40)
    with (folder / "sparse-100mb.png").open("wb") as file:
        file.write(png(8, 8)[:33] + struct.pack(">I", 10**8) + b"tEXt")
        file.truncate(10**8)
    return [*sorted(folder.iterdir()), folder / "vanished.jpg"]
