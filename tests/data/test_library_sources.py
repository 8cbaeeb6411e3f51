import io
import os
import pathlib
import pickle

import numpy as np
import PIL.Image
import pytest
from PIL import Image
from torchvision import datasets as torchvision_datasets

from beit.data.sources import Digits, ParquetSource, TorchvisionSource, UnreadableImage
from beit.errors import UserError


def row_bytes(i):
    """A PNG that says which row it is; row 6 is broken."""
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), (i, 2 * i, 9)).save(buffer, "PNG")
    return buffer.getvalue() if i != 6 else b"broken"


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """Seven training and three test rows in the Hugging Face layout; training in two files."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "word": datasets.Value("string"),
        }
    )

    def write(name, rows):
        data = {
            "image": [{"bytes": row_bytes(i), "path": None} for i in rows],
            "label": [i % 2 for i in rows],
            "word": [f"w{i % 3}" for i in rows],
        }
        path = tmp_path / "pack" / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(data, features=features).to_parquet(path)

    write("train-00000-of-00002.parquet", range(4))
    write("train-00001-of-00002.parquet", range(4, 7))
    write("test-00000-of-00001.parquet", range(10, 13))
    return tmp_path / "pack"


def test_parquet_rows_by_random_access(pack):
    source = ParquetSource(pack, "train")
    assert len(source) == 7
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    for index in (5, 0, 3):
        image, label = source.load(index)
        assert image.getpixel((1, 1)) == (index, 2 * index, 9)
        assert label == index % 2
    with pytest.raises(UnreadableImage, match="train row 6"):
        source.load(6)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.load(4)[0].getpixel((0, 0)) == (4, 8, 9)


def test_a_small_pack_is_read_as_it_lies_and_a_large_one_mapped(pack, tmp_path):
    small = ParquetSource(pack, "train")
    assert not (tmp_path / "cache").exists()
    large = ParquetSource(pack, "train", max_memory_gb=0)
    assert list((tmp_path / "cache").rglob("*.arrow"))
    for index in range(6):
        assert small.load(index)[0].tobytes() == large.load(index)[0].tobytes()
        assert small.load(index)[1] == large.load(index)[1]
    assert (small.classes, small.labels.tolist()) == (large.classes, large.labels.tolist())
    copy = pickle.loads(pickle.dumps(large))
    assert copy.load(4)[0].getpixel((0, 0)) == (4, 8, 9)
    for source in (large, ParquetSource(pack, "train", max_memory_gb=0, label_column="")):
        assert row_bytes(5) not in pickle.dumps(source)  # a worker gets the path, not the rows


def test_parquet_labels_may_be_words_or_absent(pack):
    words = ParquetSource(pack, "test", label_column="word")
    assert (words.classes, words.labels.tolist()) == (["w0", "w1", "w2"], [1, 2, 0])
    unlabelled = ParquetSource(pack, "test", label_column="")
    assert unlabelled.classes is None
    assert unlabelled.load(0)[1] is None


def test_parquet_mistakes(pack, tmp_path):
    with pytest.raises(UserError, match="no split 'val'; there are test, train"):
        ParquetSource(pack, "val")
    with pytest.raises(UserError, match="no column 'picture'; there are image, label, word"):
        ParquetSource(pack, "test", image_column="picture")
    with pytest.raises(UserError, match="max_memory_gb 'all': expected a number"):
        ParquetSource(pack, "test", max_memory_gb="all")
    (pack / "data" / "odd.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"odd\.parquet: not a parquet file"):
        ParquetSource(pack, "odd")
    with pytest.raises(UserError, match="no such folder"):
        ParquetSource(tmp_path / "none", "train")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no parquet files"):
        ParquetSource(tmp_path / "bare", "train")


def test_digits_are_the_scans_split_for_good():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    scans = sklearn_datasets.load_digits()
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test), len(Digits("all"))) == (1437, 360, 1797)
    assert sorted([*train.indices, *test.indices]) == list(range(1797))
    share = np.bincount(test.labels) / np.bincount(scans.target)
    assert np.abs(share - 0.2).max() < 0.005
    for source, index in ((train, 700), (test, 13)):
        image, label = source.load(index)
        scan = scans.images[source.indices[index]]
        assert label == scans.target[source.indices[index]]
        assert (image.mode, image.size) == ("RGB", (8, 8))
        np.testing.assert_allclose(np.asarray(image)[:, :, 1], scan * 255 / 16, atol=0.5)
    # written down: results of different machines and years are of the same images
    assert test.indices[:5].tolist() == DIGITS_TEST_BEGINS
    with pytest.raises(UserError, match="no split 'val'; there are train, test, all"):
        Digits("val")


DIGITS_TEST_BEGINS = [6, 7, 10, 13, 17]


class TinyPictures:
    """Stands for a torchvision data set: switches, labels, class names."""

    classes = ("cat", "dog")

    def __init__(self, root, train=True, download=False):
        if not download:
            raise RuntimeError("Dataset not found.\nYou can use download=True")
        self.root, self.targets = root, [0, 1, 1] if train else [1]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.new("L", (5, 3), index), self.targets[index]


def test_torchvision_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision_datasets, "CIFAR10", TinyPictures)
    source = TorchvisionSource("CIFAR10", tmp_path, train=True, download=True)
    assert (source.classes, source.labels.tolist()) == (["cat", "dog"], [0, 1, 1])
    image, label = source.load(2)
    assert (image.mode, image.getpixel((0, 0)), label) == ("RGB", (2, 2, 2), 1)
    assert len(TorchvisionSource("CIFAR10", tmp_path, train=False, download=True)) == 1
    with pytest.raises(UserError, match=r"not found.*download=true fetches it"):
        TorchvisionSource("CIFAR10", tmp_path, train=True)
    with pytest.raises(UserError, match="no option 'split'; it has root, train"):
        TorchvisionSource("CIFAR10", tmp_path, split="train")
    with pytest.raises(UserError, match="'CIFAR11': no such class; did you mean CIFAR10"):
        TorchvisionSource("CIFAR11", tmp_path)


class OpensThem(TinyPictures):
    """Opens its files itself, as half of torchvision's data sets do."""

    def __getitem__(self, index):
        path = f"{self.root}/{index}.jpg"
        if index == 1:
            with open(path, "rb") as file:
                return PIL.Image.open(file).convert("RGB"), 1
        if index == 2:
            return Image.open(io.BytesIO(pathlib.Path(path).read_bytes()), "r").copy(), 1
        return Image.open(path), 0


def test_files_that_torchvision_opens_are_opened_with_caution(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision_datasets, "Kitti", OpensThem)
    source = TorchvisionSource("Kitti", tmp_path, train=True, download=True)
    plain = Image.open
    picture, exif = Image.new("RGB", (5, 3), (9, 8, 7)), Image.Exif()
    exif[0x0112] = 6  # lies on its side
    for index in range(3):
        picture.save(tmp_path / f"{index}.jpg", exif=exif)
        assert source.load(index)[0].size == (3, 5)
        picture.save(tmp_path / f"{index}.jpg", "EPS")  # Pillow would start Ghostscript
        with pytest.raises(UnreadableImage, match="no image of a known format"):
            source.load(index)
    (tmp_path / "0.jpg").unlink()
    os.mkfifo(tmp_path / "0.jpg")
    with pytest.raises(UnreadableImage, match="a named pipe"):
        source.load(0)
    assert Image.open is plain


def test_what_no_data_set_can_be_made_of(tmp_path):
    for name in ("wrap_dataset_for_transforms_v2", "folder", "VisionDatase"):
        with pytest.raises(UserError, match="no such class"):
            TorchvisionSource(name, tmp_path)
    with pytest.raises(UserError, match="torchvision Flickr8k: 'ann_file' has no value"):
        TorchvisionSource("Flickr8k", tmp_path)


def test_torchvision_fake_data_runs_through():
    source = TorchvisionSource("FakeData", "", size=5, image_size=(3, 8, 8), num_classes=4)
    assert len(source) == 5
    image, label = source.load(1)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert label == source.labels[1]
    assert len(source.classes) <= 4


@pytest.mark.parametrize("name", ["LSUN", "LSUNClass"])
def test_a_data_set_that_unpickles_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"'{name}' keeps a pickle"):
        TorchvisionSource(name, tmp_path)
