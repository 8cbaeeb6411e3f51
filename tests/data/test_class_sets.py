import numpy as np
import pytest
from torchvision.datasets import Cityscapes
from torchvision.datasets.voc import VOCSegmentation

from beit.data.class_sets import class_set, voc_palette
from beit.errors import UserError


def test_cityscapes_is_torchvisions_list():
    trained = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < 255), key=lambda c: c[2])
    names, palette = class_set("cityscapes")
    assert names == [c.name for c in trained]
    assert palette.tolist() == [list(c.color) for c in trained]
    assert palette.dtype == np.uint8


def literal_voc(number):
    """The loop of VOC's development kit: bits 0, 1, 2 are the highest of red, green, blue."""
    red = green = blue = 0
    for place in range(8):
        red |= (number & 1) << (7 - place)
        green |= (number >> 1 & 1) << (7 - place)
        blue |= (number >> 2 & 1) << (7 - place)
        number >>= 3
    return [red, green, blue]


def test_vocs_colours_come_from_the_bits():
    assert voc_palette(300).tolist() == [literal_voc(number) for number in range(300)]
    assert len({tuple(colour) for colour in voc_palette(4096)}) == 4096
    names, palette = class_set("voc")
    assert len(names) == 21
    assert VOCSegmentation.__name__
    # the devkit's table, as it is printed
    assert palette[[1, 2, 8, 15, 20]].tolist() == [
        [128, 0, 0], [0, 128, 0], [64, 0, 0], [192, 128, 128], [0, 64, 128]
    ]  # fmt: skip
    assert (names[15], names[20]) == ("person", "tvmonitor")


def test_the_known_sets():
    names, palette = class_set("ade20k")
    assert len(names) == len(set(names)) == len(palette) == 150
    # the ranks that the data set's own list gives
    known = {0: "wall", 3: "floor", 12: "person", 20: "car", 115: "bag", 136: "traffic light"}
    assert {number: names[number] for number in known} == known
    assert names[-1] == "flag"
    assert palette[[0, 1, 2, 149]].tolist() == [
        [120, 120, 120], [180, 120, 120], [6, 230, 230], [92, 0, 255]
    ]  # fmt: skip
    names, palette = class_set("camvid")
    assert len(names) == len(palette) == 11
    assert dict(zip(names, palette.tolist()))["Road"] == [128, 64, 128]


def test_the_names_of_a_known_set_bring_its_colours():
    names, palette = class_set("ade20k")
    assert np.array_equal(class_set(names)[1], palette)  # as of a converted file
    assert np.array_equal(class_set([*names[:-1], "banner"])[1], voc_palette(150))


def test_any_other_set(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\ufeffpaper\nink blot\n\n", encoding="utf-8")
    for classes, expected in (
        (["paper", "ink blot"], ["paper", "ink blot"]),
        (str(file), ["paper", "ink blot"]),
        (2, ["0", "1"]),
    ):
        names, palette = class_set(classes)
        assert names == expected
        assert palette.tolist() == [[0, 0, 0], [128, 0, 0]]
    colours = [[1, 2, 3], [255, 0, 9]]
    assert class_set(2, colours).palette.tolist() == colours


@pytest.mark.parametrize(
    ("classes", "palette", "said"),
    [
        ("ade2k", "auto", "classes=ade2k: neither a known set nor a text file.*mean ade20k"),
        ([], "auto", "expected a name for each class"),
        (["a", " "], "auto", "expected a name for each class"),
        (["a", "b", "a"], "auto", "'a' stands for 0 and for 2"),
        (0, "auto", "classes 0: expected a whole number of at least 1"),
        (5000, "auto", "expected at most 4096"),
        (2, [[1, 2, 3]], "1 colours for 2 classes"),
        (1, [[1, 2]], r"\[1, 2\]; expected \[red, green, blue\]"),
        (1, [[1, 2, 256]], "each 0 to 255"),
        (1, "rainbow", "palette 'rainbow': expected auto"),
    ],
)
def test_mistakes_are_named(classes, palette, said):
    with pytest.raises(UserError, match=said):
        class_set(classes, palette)


def test_a_file_with_a_gap_is_refused(tmp_path):
    (tmp_path / "names.txt").write_text("a\n\nb\n")
    with pytest.raises(UserError, match=r"names\.txt: expected a name for each class"):
        class_set(str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        class_set(str(tmp_path / "names.txt"))
