import csv
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from beit.data.file_sources import find_images, open_image
from beit.data.sources import (
    ClassFolder,
    FlatFolder,
    ListFile,
    Subset,
    UnreadableImage,
    few_labels,
)
from beit.errors import UserError


def save(path, color=(10, 20, 30), size=(5, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three classes of 4, 2 and 3 images, one of them nested, and files that are no images."""
    for name, count in (("newt", 4), ("ape", 2), ("cow", 3)):
        for i in range(count):
            save(tmp_path / "train" / name / f"{i}.png", (i, len(name), count))
    save(tmp_path / "train" / "ape" / "deep" / "9.JPG")
    (tmp_path / "train" / "ape" / "notes.txt").write_text("no image")
    save(tmp_path / "train" / ".cache" / "0.png")
    save(tmp_path / "train" / "cow" / "._0.png")
    return tmp_path / "train"


def test_class_folder_is_numbered_as_torchvisions_image_folder(folder):
    source = ClassFolder(folder)
    theirs = ImageFolder(
        folder, is_valid_file=lambda p: p.lower().endswith(("png", "jpg")) and "/." not in p,
        allow_empty=True,
    )  # fmt: skip
    assert source.classes == [name for name in theirs.classes if not name.startswith(".")]
    expected = [(path, theirs.classes[label]) for path, label in theirs.samples]
    found = [(source.name(i), source.classes[source.labels[i]]) for i in range(len(source))]
    assert found == expected
    assert len(source) == 10
    image, label = source.load(3)
    assert (image.mode, image.size, label) == ("RGB", (5, 3), 1)
    assert image.getpixel((0, 0)) == (0, 3, 3)


def test_flat_folder_needs_no_classes_and_goes_deep(folder):
    source = FlatFolder(folder)
    assert len(source) == 10
    assert source.labels is None
    assert source.load(0)[1] is None
    assert [source.name(i) for i in range(10)] == [str(path) for path in find_images(folder)]
    for name in "gcaebdf":  # made in no order, as file systems list them
        save(folder / "ape" / name / "0.png")
    nested = FlatFolder(folder / "ape")
    names = [nested.name(i) for i in range(len(nested))]
    assert names == sorted(names, key=lambda name: name.rsplit("/", 1))
    save(folder / "top.png")
    only = FlatFolder(folder, recursive=False)
    assert [only.name(i) for i in range(len(only))] == [str(folder / "top.png")]


def test_links_that_lead_back_are_not_followed(folder):
    save(folder.parent / "elsewhere" / "0.png")
    (folder / "cow" / "linked").symlink_to(folder.parent / "elsewhere")  # an honest one
    (folder / "cow" / "self").symlink_to(folder / "cow")
    (folder / "cow" / "up").symlink_to(folder.parent)
    (folder / "cow" / "across").symlink_to(folder / "ape" / "deep")
    (folder / "ape" / "deep" / "back").symlink_to(folder / "cow")
    names = [name.relative_to(folder / "cow").as_posix() for name in find_images(folder / "cow")]
    assert names == ["0.png", "1.png", "2.png", "across/9.JPG", "linked/0.png"]
    assert len(FlatFolder(folder)) == 10 + 2 + 4  # two through cow/*, four through ape/deep/back


@pytest.mark.parametrize("make", [ClassFolder, FlatFolder])
def test_sources_are_small_and_picklable(folder, make):
    source = make(folder)
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.name(i) for i in range(10)] == [source.name(i) for i in range(10)]
    assert copy.load(9)[0].tobytes() == source.load(9)[0].tobytes()
    with pytest.raises(IndexError):
        source.name(10)


def test_folder_mistakes_are_named(tmp_path, folder):
    with pytest.raises(
        UserError, match="nowhere: no such folder; give the folder that holds the images"
    ):
        ClassFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        FlatFolder(save(tmp_path / "x.png"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no images found.*jpg.*png"):
        FlatFolder(empty)
    with pytest.raises(UserError, match=r"no class folders.*data=unlabelled"):
        ClassFolder(empty)
    (folder / "zebra").mkdir()
    with pytest.raises(UserError, match="zebra: no images in this class folder"):
        ClassFolder(folder)


def test_unreadable_image_names_the_file(folder):
    (folder / "ape" / "0.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UnreadableImage, match=r"ape/0\.png"):
        ClassFolder(folder).load(0)
    with pytest.raises(UnreadableImage):
        open_image(folder / "ape" / "0.png")
    assert open_image(folder / "ape" / "1.png").size == (5, 3)


def list_file(path, rows, header=("path", "label")):
    with open(path, "w", newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows([header, *rows])
        else:
            file.writelines(json.dumps(dict(zip(header, row, strict=False))) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_list_file_with_names_numbers_or_no_labels(tmp_path, suffix):
    for i in range(3):
        save(tmp_path / "images" / f"{i}.png", (i, i, i))
    files = [f"images/{i}.png" for i in range(3)]
    path = tmp_path / f"list{suffix}"

    named = ListFile(list_file(path, list(zip(files, ["b", "a", "b"], strict=True))))
    assert (named.classes, named.labels.tolist()) == (["a", "b"], [1, 0, 1])
    assert named.load(2)[0].getpixel((0, 0)) == (2, 2, 2)
    ordered = ListFile(path, classes=["b", "a"])
    assert ordered.labels.tolist() == [0, 1, 0]
    numbered = ListFile(list_file(path, list(zip(files, [2, 0, 2], strict=True))))
    assert (numbered.classes, numbered.labels.tolist()) == (["0", "1", "2"], [2, 0, 2])
    signed = ListFile(list_file(path, list(zip(files, ["+2", " 0", "10"], strict=True))))
    assert (len(signed.classes), signed.labels.tolist()) == (11, [2, 0, 10])
    list_file(path, list(zip(files, ["-1", "1", "1"], strict=True)))
    minus = ListFile(path, classes=["-1", "1"])  # asked for by name
    assert minus.labels.tolist() == [0, 1, 1]
    unlabelled = ListFile(list_file(path, [(file,) for file in files], ("path",)))
    assert unlabelled.labels is None
    assert unlabelled.load(1)[1] is None
    rooted = ListFile(list_file(path, [("0.png",)], ("path",)), root=str(tmp_path / "images"))
    assert rooted.name(0) == str(tmp_path / "images" / "0.png")


@pytest.mark.parametrize(
    ("rows", "classes", "message"),
    [
        ([("a.png", "x"), ("", "x")], [], "line 3: no path"),
        ([("a.png", "x"), ("none.png", "x")], [], "line 3: .*none.png does not exist"),
        ([("a.png", "x"), ("a.png", "")], [], "line 3: no label"),
        ([("a.png", "x"), ("a.png", "z")], ["x", "y"], "line 3: label 'z' is not one of the 2"),
        ([("a.png", "0"), ("a.png", "2")], ["x", "y"], "line 3: label '2'.*0 to 1"),
        ([("a.png", "1"), ("a.png", "-1")], [], "line 3: label '-1'.*begin at 0"),
        ([("a.png", "x"), ("a.png", "-1")], [], "line 3: label '-1'.*begin at 0"),
        ([], [], "names no images"),
    ],
)
def test_list_file_mistakes_name_the_line(tmp_path, rows, classes, message):
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match=message):
        ListFile(list_file(tmp_path / "list.csv", rows), classes=classes)


def test_list_file_of_the_wrong_kind(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"header.*expected 'path'"):
        ListFile(list_file(tmp_path / "l.csv", [("a.png", "x")], ("file", "class")))
    (tmp_path / "l.jsonl").write_text('{"path": "a.png"}\nnonsense\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        ListFile(tmp_path / "l.jsonl")
    with pytest.raises(UserError, match="no such list file"):
        ListFile(tmp_path / "none.csv")


def test_subset_is_balanced_reproducible_and_nested(folder):
    source = ClassFolder(folder)
    two = Subset(source, per_class=2, seed=1)
    assert np.bincount(two.labels).tolist() == [2, 2, 2]
    assert [source.name(i) for i in two.indices] == [two.name(i) for i in range(6)]
    assert two.load(4)[1] == two.labels[4]
    assert two.indices.tolist() == Subset(source, per_class=2, seed=1).indices.tolist()
    orders = {tuple(Subset(source, per_class=2, seed=s).indices) for s in range(20)}
    assert len(orders) > 5
    assert Subset(source, per_class=1, seed=1).indices.tolist() == two.indices[:3].tolist()
    assert len(set(two.indices.tolist())) == 6
    counted = Subset(source, count=4, seed=1)
    assert sorted(np.bincount(counted.labels).tolist()) == [1, 1, 2]
    assert len(Subset(FlatFolder(folder), count=7, seed=1)) == 7


def test_few_labels(folder):
    source = ClassFolder(folder)
    assert few_labels(source, per_class="all", seed=0) is source
    assert len(few_labels(source, per_class=3, seed=0)) == 9


def test_subset_mistakes(folder):
    source = ClassFolder(folder)
    with pytest.raises(UserError, match="class 'ape' has only 3 images"):
        Subset(source, per_class=4, seed=0)
    with pytest.raises(UserError, match="no labels"):
        Subset(FlatFolder(folder), per_class=1, seed=0)
    with pytest.raises(UserError, match="only 10 images"):
        Subset(source, count=11, seed=0)
    with pytest.raises(UserError, match="give one of the two"):
        Subset(source, per_class=1, count=1, seed=0)
    with pytest.raises(
        UserError, match=r"labels_per_class 5: FlatFolder.* no labels.*class folders"
    ):
        few_labels(FlatFolder(folder), per_class=5, seed=0)
    with pytest.raises(UserError, match=r"labels_per_class 0.*all"):
        few_labels(source, per_class=0, seed=0)
