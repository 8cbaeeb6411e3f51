import contextlib
import errno
import io
import os
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from beit.data import images, opening
from beit.data.images import UnreadableImage, open_rgb, to_rgb


def encoded(image, fmt, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def picture(width=5, height=3):
    pixels = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3) * 5
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.asarray(picture())
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    result = open_rgb(encoded(image, "PNG", exif=exif), "x")
    np.testing.assert_array_equal(np.asarray(result), upright)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I"])
def test_every_mode_becomes_rgb(mode):
    result = to_rgb(picture().convert("L" if mode == "I" else "RGB").convert(mode))
    assert result.mode == "RGB"
    assert result.size == (5, 3)


def test_16_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    image = open_rgb(encoded(Image.fromarray(levels), "PNG"), "x")
    np.testing.assert_array_equal(np.asarray(image)[0, :, 0], [0, 1, 128, 255])
    as_32_bit = to_rgb(Image.fromarray(levels.astype(np.int32)))
    np.testing.assert_array_equal(np.asarray(as_32_bit), np.asarray(image))


def test_transparency_is_dropped_and_the_colour_beneath_kept():
    rgba = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
    assert open_rgb(encoded(rgba, "PNG"), "x").getpixel((0, 0)) == (200, 100, 50)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    data = encoded(palette, "PNG", transparency=bytes([255, 0]))
    assert open_rgb(data, "x").getpixel((0, 0)) == (10, 20, 30)


def test_lab_goes_through_the_colour_profile():
    grey = Image.new("RGB", (1, 1), (119, 119, 119))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(grey, *profiles, outputMode="LAB")
    np.testing.assert_allclose(np.asarray(to_rgb(lab)), np.asarray(grey), atol=2)


def test_cmyk_jpeg():
    cmyk = Image.new("RGB", (16, 16), (250, 10, 20)).convert("CMYK")
    pixel = open_rgb(encoded(cmyk, "JPEG", quality=95), "x").getpixel((8, 8))
    np.testing.assert_allclose(pixel, (250, 10, 20), atol=6)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_rgb(data, "x").getpixel((0, 0)) == (255, 0, 0)


def broken_files():
    png, jpeg = encoded(picture(40, 40), "PNG"), encoded(picture(64, 64), "JPEG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    return list(
        {
            "empty": b"",
            "html": b"<html>404</html>",
            "truncated png": png[: len(png) // 2],
            "bad crc": png[:60] + bytes([png[60] ^ 255]) + png[61:],
            "truncated jpeg": jpeg[: len(jpeg) // 2],
            "postscript named .jpg": eps,
            "header only": png[:16],
        }.items()
    )


@pytest.mark.parametrize(("what", "data"), broken_files())
def test_broken_files_are_named(what, data):
    with pytest.raises(UnreadableImage, match=r"cats/7\.jpg: ."):
        open_rgb(data, "cats/7.jpg")


def test_missing_file_and_bomb(tmp_path, monkeypatch):
    with pytest.raises(UnreadableImage, match="No such file"):
        open_rgb(tmp_path / "none.jpg", "none.jpg")
    monkeypatch.setattr(opening, "MAX_PIXELS", 0)  # put back in the end
    opening.limit_pixels(100)
    expected = r"40x40 pixels exceed the limit of 100 \(loader\.max_image_pixels\)"
    with pytest.raises(UnreadableImage, match=expected):
        open_rgb(encoded(picture(40, 40), "PNG"), "bomb.png")


def test_a_larger_limit_lets_longer_files_in(monkeypatch):
    monkeypatch.setattr(opening, "MAX_FILE_BYTES", 1000)
    data = encoded(picture(40, 40), "BMP")
    monkeypatch.setattr(opening, "MAX_PIXELS", 1600)  # 4.8 KB of pixels, 6.4 are allowed
    assert open_rgb(data, "x.bmp").size == (40, 40)
    monkeypatch.setattr(opening, "MAX_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="bytes, more than 4,000"):
        open_rgb(data, "x.bmp")


@pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="needs /proc")
def test_a_file_that_claims_nothing_and_never_ends():
    """A list, a table or a link of a stranger's may name it; it would fill the memory."""
    assert opening.read_file("/proc/self/pagemap") == b""
    with pytest.raises(UnreadableImage, match="no image of a known format"):
        open_rgb("/proc/self/pagemap", "x.jpg")


def test_unreadable_image_survives_pickling():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "truncated")))
    assert str(error) == "a.jpg: truncated"
    assert (error.name, error.reason) == ("a.jpg", "truncated")


def claiming(width, height):
    """A grey PNG whose header says so, and nothing else."""

    def chunk(kind, content):
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ((12_000, 11_000), r"12000x11000 pixels exceed the limit of 128,000,000"),
        ((10_000, 10_000), r"10000x10000 pixels in \d+ bytes: a decompression bomb"),
        ((65_536, 2), r"65536x2 pixels, a side exceeds the limit of 65,535"),
        ((2, 65_536), r"a side exceeds"),
    ],
)
def test_bombs_are_refused_by_their_header(size, match, monkeypatch):
    monkeypatch.setattr(images, "decode", lambda image: pytest.fail("its pixels were asked for"))
    with pytest.raises(UnreadableImage, match=match):
        open_rgb(claiming(*size), "bomb.png")


def test_a_photograph_of_a_medium_format_camera_passes_the_header():
    data = claiming(11_648, 8736)  # 102 million pixels
    header = opening.open_header(data + bytes(1_000_000))
    assert header.size == (11_648, 8736)


def test_the_host_programs_limit_is_neither_used_nor_changed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_rgb(encoded(picture(40, 40), "PNG"), "x").size == (40, 40)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_jpeg_of_endless_scans():
    data = encoded(picture(40, 40).convert("L"), "JPEG", progressive=True)
    last, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    scans = data.count(b"\xff\xda")

    def repeated(times):
        return data[:end] + data[last:end] * times + b"\xff\xd9"

    assert open_rgb(repeated(opening.MAX_SCANS - scans), "x").size == (40, 40)
    with pytest.raises(UnreadableImage, match=r"101 scans, more than 100: a decompression bomb"):
        open_rgb(repeated(opening.MAX_SCANS - scans + 1), "x")


def test_what_is_no_file_is_refused_unopened(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(2**40)
    said = {
        "folder": "a folder, not a file", "pipe": "a named pipe, not a file",
        "device": "a device, not a file", "loop": "Too many levels of symbolic links",
        "sparse": r"1,099,511,627,776 bytes, more than 536,870,912",
    }  # fmt: skip
    for name, why in said.items():
        with pytest.raises(UnreadableImage, match=why):
            open_rgb(tmp_path / f"{name}.jpg", name)


def test_a_machine_that_is_short_of_something_is_not_the_images_fault(monkeypatch, tmp_path):
    def short(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    path = tmp_path / "a.png"
    path.touch()
    monkeypatch.setattr(os, "open", short)
    with pytest.raises(OSError, match="Too many open files"):
        open_rgb(path, "a.png")


def test_names_and_reasons_cannot_write_to_the_terminal():
    with pytest.raises(UnreadableImage) as raised:
        open_rgb(b"", "cats/\x1b[2J\nroot: \udcff.jpg")
    assert str(raised.value).startswith(r"cats/\x1b[2J\nroot: \udcff.jpg: no image of")


def test_a_broken_fax_is_silent(capfd):
    page = Image.fromarray(np.tril(np.full((64, 64), 255, dtype=np.uint8))).convert("1")
    data = bytearray(encoded(page, "TIFF", compression="group4"))
    with Image.open(io.BytesIO(data)) as image:
        begin = image.tag_v2[273][0]  # of the strip
    data[begin : begin + 8] = bytes.fromhex("0123456789abcdef")
    with contextlib.suppress(UnreadableImage):
        open_rgb(bytes(data), "fax.tif")
    os.write(2, b"still heard")
    assert capfd.readouterr().err == "still heard"
