import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from beit.data.images import UnreadableImage
from beit.data.label_maps import LabelIds, read_label_map
from beit.errors import UserError

VALUES = np.array([[0, 1, 2, 255, 3], [3, 3, 0, 1, 255], [2, 2, 2, 2, 0]], dtype=np.uint8)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def palette_image(values):
    image = Image.fromarray(values).convert("P")
    image.putdata(values.ravel().tolist())
    # colours that are not the numbers, the first of them transparent
    image.putpalette([(7 * n + channel) % 256 for n in range(256) for channel in range(3)])
    image.info["transparency"] = 0
    return image


def forms():
    """The same numbers in every kind of file that is read."""
    grey = Image.fromarray(VALUES)
    yield "L", encoded(grey)
    yield "L bmp", encoded(grey, "BMP")
    yield "L webp", encoded(grey.convert("RGB"), "WEBP", lossless=True)
    yield "P", encoded(palette_image(VALUES))
    yield "RGB of equal channels", encoded(grey.convert("RGB"))
    alpha = Image.fromarray(np.full_like(VALUES, 90))
    yield "RGBA", encoded(Image.merge("RGBA", (grey, grey, grey, alpha)))
    yield "LA", encoded(Image.merge("LA", (grey, alpha)))
    yield "I;16", encoded(Image.fromarray(VALUES.astype(np.uint16)))
    yield "I;16 tiff", encoded(Image.fromarray(VALUES.astype(np.uint16)), "TIFF")
    yield "I tiff", encoded(Image.fromarray(VALUES.astype(np.int32)), "TIFF")
    yield "F tiff", encoded(Image.fromarray(VALUES.astype(np.float32)), "TIFF")


@pytest.mark.parametrize(("form", "data"), list(forms()), ids=lambda value: str(value)[:20])
def test_numbers_are_read_from_every_kind_of_file(form, data):
    labels = read_label_map(data, "file", LabelIds(4))
    assert labels.dtype == np.int16
    assert labels.tolist() == np.where(VALUES == 255, -1, VALUES.astype(int)).tolist()


def test_one_bit():
    bits = np.array([[True, False, True]])
    labels = read_label_map(encoded(Image.fromarray(bits)), "file", LabelIds(2))
    assert labels.tolist() == [[1, 0, 1]]


def grey_png(rows, bits):
    """A grey PNG of so many bits, as programs that make PNGs small write them; Pillow cannot."""

    def chunk(kind, data):
        data = kind + data
        return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))

    lines = ("".join(f"{value:0{bits}b}" for value in row) for row in rows)
    packed = [int(line, 2).to_bytes(len(line) // 8, "big") for line in lines]
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + line for line in packed))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("bits", [2, 4])
def test_two_and_four_bits_are_not_stretched(bits):
    rows = [[0, 1, 2, 3], [2**bits - 1, 0, 1, 1]]
    labels = read_label_map(grey_png(rows, bits), "file", LabelIds(150))
    assert labels.tolist() == rows


def test_sixteen_bits_are_not_scaled():
    values = np.array([[0, 300, 1000, 65535]], dtype=np.uint16)
    ids = LabelIds(1001, ignore=65535)
    labels = read_label_map(encoded(Image.fromarray(values)), "file", ids)
    assert labels.tolist() == [[0, 300, 1000, -1]]


def test_reduce_zero_label_is_mmsegmentations():
    values = np.arange(256, dtype=np.uint8)
    theirs = values.copy()
    theirs[theirs == 0] = 255
    theirs = theirs - 1
    theirs[theirs == 254] = 255
    ids = LabelIds("ade20k", reduce_zero_label=True)
    allowed = np.concatenate([values[:151], values[255:]])
    expected = np.where(theirs[allowed] == 255, -1, theirs[allowed].astype(int))
    assert ids(allowed[None], "file").tolist() == [expected.tolist()]
    with pytest.raises(UserError, match=r"value 151, 152;.*are 1 to 150"):
        ids(np.array([[5, 152, 151]], dtype=np.uint8), "file")


def test_id_map():
    values = np.array([[7, 8, 11, 0, 255, 7]], dtype=np.uint8)
    ids = LabelIds(2, id_map={7: 1, 8: 0, 11: 1})
    assert ids(values, "file").tolist() == [[1, 0, 1, -1, -1, 1]]
    strict = LabelIds(2, id_map={7: 1, 8: 0, 11: 1}, unlisted="error")
    with pytest.raises(UserError, match=r"file: value 0; the 2 classes are 7, 8, 11;"):
        strict(values, "file")
    assert strict(values[:, [0, 4]], "file").tolist() == [[1, -1]]


def test_colours():
    table = [[0, 0, 0], [128, 64, 128], [0, 0, 255], [64, 64, 64]]
    numbers = np.array([[3, 0, 1], [2, 2, 1]])
    pixels = np.array(table, dtype=np.uint8)[numbers]
    data = encoded(Image.fromarray(pixels))
    labels = read_label_map(data, "file", LabelIds(3, colors=table, ignore=3))
    assert labels.tolist() == [[-1, 0, 1], [2, 2, 1]]
    # each file may have the colours in a palette of its own
    palette = Image.fromarray(pixels).quantize(4)
    assert read_label_map(encoded(palette), "file", LabelIds(4, colors=table)).tolist() == (
        numbers.tolist()
    )
    assert np.asarray(palette).tolist() != numbers.tolist()
    # all grey, and read by its colours all the same
    grey = encoded(Image.fromarray(np.full((2, 2, 3), 64, dtype=np.uint8)))
    assert read_label_map(grey, "file", LabelIds(4, colors=table)).tolist() == [[3, 3], [3, 3]]
    with pytest.raises(UserError, match=r"does not list: \[0, 0, 255\], \[128, 64, 128\]$"):
        read_label_map(data, "file", LabelIds(2, colors=[table[0], table[3]]))
    with pytest.raises(UserError, match=r"a\.png: colours where numbers.*\[0, 0, 0\], .*4 in all"):
        read_label_map(data, "a.png", LabelIds(3))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[0, 9, 4]], r"x/a\.png: value 4, 9; the 4 classes are 0 to 3, and 255 ignored; more"),
        ([[256, 0, 0]], "value 256;"),
        ([range(255)], r"value 4, 5, 6, 7, 8, 9, 10, 11, \.\.\. \(251 in all\)"),
    ],
)
def test_values_that_are_no_class_are_named(values, said):
    data = encoded(Image.fromarray(np.array(values, dtype=np.uint16)))
    with pytest.raises(UserError, match=said) as error:
        read_label_map(data, "x/a.png", LabelIds(4))
    assert "\n" not in str(error.value)


def test_what_is_no_label_map_is_refused():
    grey = Image.fromarray(VALUES)
    with pytest.raises(UserError, match="f: a JPEG, which does not keep numbers"):
        read_label_map(encoded(grey, "JPEG"), "f", LabelIds(256, ignore=[]))
    fractions = Image.fromarray(np.array([[0.5, 1.0]], dtype=np.float32))
    with pytest.raises(UserError, match="f: fractions; expected whole numbers"):
        read_label_map(encoded(fractions, "TIFF"), "f", LabelIds(4))
    with pytest.raises(UserError, match="f: pixels of mode CMYK"):
        read_label_map(encoded(grey.convert("CMYK"), "TIFF"), "f", LabelIds(4))
    negative = Image.fromarray(np.array([[-1, 1]], dtype=np.int32))
    with pytest.raises(UserError, match=r"f: values? -1"):
        read_label_map(encoded(negative, "TIFF"), "f", LabelIds(4))


@pytest.mark.parametrize("data", [b"", b"\x89PNG broken", encoded(Image.fromarray(VALUES))[:-40]])
def test_what_cannot_be_decoded_is_unreadable(data, tmp_path):
    with pytest.raises(UnreadableImage, match="a name"):
        read_label_map(data, "a name", LabelIds(4))
    with pytest.raises(UnreadableImage, match="No such file"):
        read_label_map(tmp_path / "none.png", "a name", LabelIds(4))


def test_a_label_map_is_turned_by_its_own_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    data = encoded(Image.fromarray(VALUES), exif=exif)
    expected = np.rot90(np.where(VALUES == 255, -1, VALUES.astype(int)), -1)
    assert read_label_map(data, "file", LabelIds(4)).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": 300}, r"ignore 255: it is class 255 \('255'\) of 300"),
        ({"classes": 4, "ignore": 3}, r"ignore 3: it is class 3 \('3'\) of 4"),
        ({"classes": 4, "ignore": -1}, "ignore -1: expected a whole number of at least 0"),
        ({"classes": 4, "ignore": 65536}, "values of label files go up to 65535"),
        ({"classes": 4, "id_map": {3: 4}}, "id_map 3: 4; the 4 classes are 0 to 3"),
        ({"classes": 4, "id_map": {255: 0}}, "id_map 255: 0; but 255 is ignored"),
        ({"classes": 4, "id_map": {3: 0}, "reduce_zero_label": True}, "exclude each other"),
        ({"classes": 4, "unlisted": "drop"}, "unlisted 'drop': expected ignored or error"),
        ({"classes": 4, "colors": [[1, 1, 1], [1, 1, 1]]}, "the same colour stands for two"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        LabelIds(**options)
    assert LabelIds(300, ignore=[])(np.array([[255]]), "f").tolist() == [[255]]


def test_what_the_numbers_mean_is_part_of_the_identity():
    rules = [
        LabelIds(4), LabelIds(4, reduce_zero_label=True), LabelIds(4, ignore=9),
        LabelIds(4, id_map={9: 0}), LabelIds(["a", "b", "c", "d"]), LabelIds(5),
        LabelIds(4, colors=[[0, 0, 0]]),
    ]  # fmt: skip
    assert len({ids.identity() for ids in rules}) == len(rules)
    assert LabelIds(4).identity() == LabelIds(4, palette=[[0, 0, 0]] * 4).identity()
