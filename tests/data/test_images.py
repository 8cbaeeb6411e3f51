import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageCms

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
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="exceeds limit"):
        open_rgb(encoded(picture(40, 40), "PNG"), "bomb.png")


def test_unreadable_image_survives_pickling():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "truncated")))
    assert str(error) == "a.jpg: truncated"
    assert (error.name, error.reason) == ("a.jpg", "truncated")
