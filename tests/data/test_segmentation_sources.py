import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from beit.data import fingerprint
from beit.data.images import UnreadableImage
from beit.data.label_maps import LabelIds
from beit.data.segmentation_sources import (
    FolderPairs,
    HubPairs,
    PairsSubset,
    ParquetPairs,
    TorchvisionPairs,
    few_pairs,
)
from beit.errors import UserError

IDS = LabelIds(["paper", "ink", "blot"])
SIZE = 9, 13


def labels_of(number, size=SIZE):
    return np.random.default_rng(number).choice([0, 1, 2, 255], size=size).astype(np.uint8)


def expected_of(number):
    values = labels_of(number).astype(int)
    return np.where(values == 255, -1, values).tolist()


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def write_image(path, number, size=SIZE, **options):
    write(path, Image.new("RGB", size[::-1], (number, 2 * number, 9)), **options)


def write_labels(path, number, size=SIZE):
    image = Image.fromarray(labels_of(number, size))
    write(path, image.convert("P") if path.suffix == ".gif" else image)


def folders(root, count=5):
    for number in range(count):
        write_image(root / "images" / f"{number}.png", number)
        write_labels(root / "annotations" / f"{number}.png", number)
    return root / "images", root / "annotations"


def check(source, count):
    """Each image is of the number that its name says, and its label map is the same number's."""
    assert len(source) == count
    for index in range(count):
        image, labels = source.load(index)
        number = image.getpixel((0, 0))[0]
        assert image.getpixel((3, 3)) == (number, 2 * number, 9)
        assert image.mode == "RGB"
        assert labels.dtype == np.int16
        assert labels.tolist() == expected_of(number)
        assert source.label_map(index).tolist() == expected_of(number)
        assert f"{number}" in os.path.basename(source.name(index))
    assert source.labels is None
    assert source.classes == ["paper", "ink", "blot"]


def test_folders_of_the_same_names(tmp_path):
    images, annotations = folders(tmp_path)
    # ADE20K's images are JPEGs; deep folders go along; what is no image is passed over
    write_image(images / "deep" / "7.bmp", 7)
    write_labels(annotations / "deep" / "7.tif", 7)
    (annotations / "0.txt").write_text("0.png")
    write_labels(annotations / "99.png", 99)  # a label map too many
    source = FolderPairs(images, annotations, ids=IDS)
    check(source, 6)
    copy = pickle.loads(pickle.dumps(source))
    check(copy, 6)
    assert [source.name(i) for i in range(6)] == sorted(source.name(i) for i in range(6))
    with pytest.raises(IndexError):
        source.load(6)


def cityscapes(root, numbers=(0, 1, 2), suffix="labelIds"):
    for number in numbers:
        city = ("aachen", "ulm")[number % 2]
        name = f"{city}_{number}_0"
        write_image(root / "leftImg8bit/train" / city / f"{name}_leftImg8bit.png", number)
        folder = root / "gtFine/train" / city
        write_labels(folder / f"{name}_gtFine_{suffix}.png", number)
        write_image(folder / f"{name}_gtFine_color.png", 5)


def test_names_that_differ_at_their_ends(tmp_path):
    cityscapes(tmp_path, suffix="labelTrainIds")
    options = {"ids": IDS, "image_suffix": "_leftImg8bit", "label_suffix": "_gtFine_labelTrainIds"}
    roots = tmp_path / "leftImg8bit/train", tmp_path / "gtFine/train"
    check(FolderPairs(*roots, **options), 3)
    for number in (3, 4):
        write_image(tmp_path / "one" / f"{number}.jpg", number, quality=100)
        write_image(tmp_path / "two" / f"{number}.bmp", number)
        for folder, end in (("one", ".png"), ("two", "_L.png")):
            write_labels(tmp_path / folder / f"{number}{end}", number)
    one, two = tmp_path / "one", tmp_path / "two"
    source = FolderPairs(one, one, ids=IDS, image_suffix=".jpg", label_suffix=".png")
    assert [source.label_map(i).tolist() for i in (0, 1)] == [expected_of(3), expected_of(4)]
    check(FolderPairs(two, two, ids=IDS, label_suffix="_L"), 2)


def test_folder_mistakes_are_named(tmp_path):
    images, annotations = folders(tmp_path, count=7)
    with pytest.raises(
        UserError, match="nowhere: no such folder; give the folder that holds the label maps"
    ):
        FolderPairs(images, tmp_path / "nowhere", ids=IDS)
    with pytest.raises(UserError, match=r"images: no images \*_x.EXTENSION found"):
        FolderPairs(images, annotations, ids=IDS, image_suffix="_x")
    for number in (1, 3, 4, 6):
        (annotations / f"{number}.png").unlink()
    with pytest.raises(UserError, match=(
        r"images: no label map for 4 of 7 images: 1\.png, 3\.png, 4\.png, \.\.\. "
        r"\(looked for .*annotations/1\.png; see image_suffix"
    )) as error:  # fmt: skip
        FolderPairs(images, annotations, ids=IDS)
    assert "\n" not in str(error.value)
    for number in (1, 3, 4, 6):
        write_labels(annotations / f"{number}.png", number)
    write_labels(annotations / "3.bmp", 3)
    with pytest.raises(UserError, match=r"annotations: 3\.bmp, 3\.png are label maps of one name"):
        FolderPairs(images, annotations, ids=IDS)
    (annotations / "3.bmp").unlink()
    write_image(images / "5.bmp", 5)
    with pytest.raises(UserError, match=r"images: 5\.bmp, 5\.png are images of one name"):
        FolderPairs(images, annotations, ids=IDS)


def test_bad_label_maps_are_named_as_they_are_read(tmp_path):
    images, annotations = folders(tmp_path, count=4)
    write(annotations / "0.png", Image.fromarray(np.full(SIZE, 3, dtype=np.uint8)))
    write_labels(annotations / "1.png", 1, size=(9, 12))
    write_labels(annotations / "2.png", 2, size=SIZE[::-1])
    (annotations / "3.png").write_bytes(b"torn")
    source = FolderPairs(images, annotations, ids=IDS)
    for read in (source.load, source.label_map):
        with pytest.raises(UserError, match=r"annotations/0\.png: value 3; the 3 classes are 0 to"):
            read(0)
        with pytest.raises(UserError, match=(
            r"image .*images/1\.png is 13x9 and its label map .*annotations/1\.png 12x9 pixels: "
        )):  # fmt: skip
            read(1)
        with pytest.raises(UserError, match="9x13 pixels; one of them is turned"):
            read(2)
        with pytest.raises(UnreadableImage, match=r"annotations/3\.png"):
            read(3)
    (images / "3.png").write_bytes(b"torn")
    with pytest.raises(UnreadableImage, match=r"images/3\.png"):
        source.load(3)


def test_a_label_map_belongs_to_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = SIZE[::-1]  # its pixels lie on their side
    write_image(tmp_path / "i" / "4.jpg", 4, size=stored, exif=exif, quality=100)
    write_labels(tmp_path / "a" / "4.png", 4)
    source = FolderPairs(tmp_path / "i", tmp_path / "a", ids=IDS)
    image, labels = source.load(0)
    assert image.size[::-1] == labels.shape == SIZE
    assert source.label_map(0).tolist() == labels.tolist() == expected_of(4)


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """Six rows of images and label maps, in the columns `photo` and `mask`."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(numbers=range(6), without=()):
        def encoded(save, number):
            buffer = tmp_path / "a.png"
            save(buffer, number)
            return {"bytes": buffer.read_bytes(), "path": None}

        columns = {
            "photo": [encoded(write_image, n) for n in numbers],
            "mask": [None if n in without else encoded(write_labels, n) for n in numbers],
        }
        features = datasets.Features({name: datasets.Image() for name in columns})
        path = tmp_path / "pack" / "data" / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
        return tmp_path / "pack"

    return make


COLUMNS = {"image_column": "photo", "label_column": "mask"}


def check_rows(source):
    assert len(source) == 6
    for number in (5, 0, 2):
        image, labels = source.load(number)
        assert image.getpixel((0, 0)) == (number, 2 * number, 9)
        assert labels.tolist() == source.label_map(number).tolist() == expected_of(number)


def test_rows_of_a_table(pack):
    source = ParquetPairs(pack(), "train", ids=IDS, **COLUMNS)
    check_rows(source)
    check_rows(pickle.loads(pickle.dumps(source)))
    check_rows(ParquetPairs(pack(), "train", ids=IDS, max_memory_gb=0, **COLUMNS))
    assert source.name(3).endswith("pack train row 3")
    with pytest.raises(UserError, match="no column 'annotation'; there are photo, mask"):
        ParquetPairs(pack(), "train", ids=IDS, image_column="photo")
    with pytest.raises(UserError, match="train row 0: value 2; the 2 classes"):
        ParquetPairs(pack([1]), "train", ids=LabelIds(2), **COLUMNS).load(0)


def test_the_hub(pack):
    check_rows(HubPairs(str(pack()), "train", ids=IDS, **COLUMNS))


def test_rows_without_a_label_map_are_told_before_anything_is_read(pack):
    folder = pack(without=(0, 2, 3, 5))
    with pytest.raises(UserError, match=(
        r"pack train: no label map for 4 of 6 images: row 0, row 2, row 3, \.\.\.$"
    )):  # fmt: skip
        ParquetPairs(folder, "train", ids=IDS, **COLUMNS)


def voc(root, numbers):
    base = root / "VOCdevkit" / "VOC2012"
    for number in numbers:
        write_image(base / "JPEGImages" / f"2007_{number}.jpg", number, quality=100)
        image = Image.fromarray(labels_of(number)).convert("P")
        image.putdata(labels_of(number).ravel().tolist())
        write(base / "SegmentationClass" / f"2007_{number}.png", image)
    lists = base / "ImageSets" / "Segmentation" / "train.txt"
    lists.parent.mkdir(parents=True)
    lists.write_text("".join(f"2007_{number}\n" for number in reversed(numbers)))
    return base


def test_voc_through_torchvision(tmp_path):
    base = voc(tmp_path, [1, 2, 3])
    source = TorchvisionPairs(
        "VOCSegmentation", tmp_path, ids=LabelIds("voc"), year="2012", image_set="train"
    )
    assert [os.path.basename(source.name(i)) for i in range(3)] == [
        "2007_1.jpg", "2007_2.jpg", "2007_3.jpg"
    ]  # fmt: skip
    for index in range(3):
        assert source.load(index)[1].tolist() == expected_of(index + 1)
    assert len(source.classes) == 21
    (base / "SegmentationClass" / "2007_2.png").unlink()
    with pytest.raises(UserError, match=r"no label map for 1 of 3 images: .*2007_2\.png"):
        TorchvisionPairs("VOCSegmentation", tmp_path, ids=IDS, image_set="train")


def test_cityscapes_through_torchvision(tmp_path):
    cityscapes(tmp_path)
    ids = LabelIds(["paper", "ink"], id_map={1: 1, 2: 0})
    source = TorchvisionPairs("Cityscapes", tmp_path, ids=ids, split="train")
    assert len(source) == 3
    for index, number in enumerate((0, 2, 1)):  # Aachen, then Ulm
        image, labels = source.load(index)
        assert image.getpixel((0, 0))[0] == number
        mapped = {0: -1, 1: 1, 2: 0, 255: -1}
        expected = [[mapped[int(v)] for v in row] for row in labels_of(number)]
        assert labels.tolist() == expected
    assert "split=train" in repr(source)


def test_torchvision_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="'VOCDetection' has no label maps known here: did you"):
        TorchvisionPairs("VOCDetection", tmp_path, ids=IDS)
    with pytest.raises(UserError, match=r"Cityscapes in .*root\" directory$"):
        TorchvisionPairs("Cityscapes", tmp_path, ids=IDS, split="train")
    with pytest.raises(UserError, match=r"VOCSegmentation in .*\(download=true fetches it\)"):
        TorchvisionPairs("VOCSegmentation", tmp_path, ids=IDS)
    with pytest.raises(UserError, match="no option 'splitt'"):
        TorchvisionPairs("Cityscapes", tmp_path, ids=IDS, splitt="train")


def test_the_fingerprint_knows_files_and_what_numbers_mean(tmp_path):
    images, annotations = folders(tmp_path)
    same = [fingerprint.of_source(FolderPairs(images, annotations, ids=IDS)) for _ in range(2)]
    assert same[0] == same[1]
    other = LabelIds(IDS.classes, id_map={0: 1, 1: 0, 2: 2})
    hashes = {same[0]["sha256"]}
    hashes.add(fingerprint.of_source(FolderPairs(images, annotations, ids=other))["sha256"])
    (annotations / "0.png").rename(annotations / "0.bmp")
    hashes.add(fingerprint.of_source(FolderPairs(images, annotations, ids=IDS))["sha256"])
    assert len(hashes) == 3


def test_many_paths_take_little_memory(tmp_path):
    images, annotations = folders(tmp_path, count=50)
    buffer = io.BytesIO()
    pickle.dump(FolderPairs(images, annotations, ids=LabelIds(3)), buffer)
    # the table of 65,536 values, and some bytes for each path
    assert len(buffer.getvalue()) < 140_000


def test_a_part_of_the_pairs(tmp_path):
    source = FolderPairs(*folders(tmp_path, count=9), ids=IDS)
    assert few_pairs(source, images="all", seed=0) is source
    part = few_pairs(source, images=4, seed=1)
    check(part, 4)
    assert part.ids is source.ids
    drawn = [part.name(index) for index in range(4)]
    assert len(set(drawn)) == 4
    assert drawn != [source.name(index) for index in range(4)]
    assert drawn[:3] == [few_pairs(source, images=3, seed=1).name(index) for index in range(3)]
    others = [few_pairs(source, images=4, seed=seed) for seed in (2, 3)]
    assert len({tuple(one.name(i) for i in range(4)) for one in (part, *others)}) == 3
    assert fingerprint.of_source(part) != fingerprint.of_source(others[0])
    assert fingerprint.of_source(part) == fingerprint.of_source(
        PairsSubset(source, count=4, seed=1)
    )


@pytest.mark.parametrize("images", [0, 10, -1, True, 2.5, "ten", None])
def test_a_part_that_cannot_be_had(tmp_path, images):
    source = FolderPairs(*folders(tmp_path, count=9), ids=IDS)
    expected = rf"labelled_images {images}: expected a number from 1 to 9, .* or all"
    with pytest.raises(UserError, match=expected):
        few_pairs(source, images=images, seed=0)
