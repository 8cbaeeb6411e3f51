"""Data are told apart by what they are, not by where they lie."""

import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from beit.data import fingerprint
from beit.data.paths import PathTable
from beit.data.sources import ClassFolder, Digits, FlatFolder, ListFile, ParquetSource, Subset


@pytest.fixture
def folder(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        path = tmp_path / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 7)).save(path)
    return tmp_path / "a"


def sha(source):
    return fingerprint.of_source(source)["sha256"]


def test_a_folder_that_moves_is_the_same(folder, tmp_path):
    before = [sha(ClassFolder(folder)), sha(FlatFolder(folder))]
    folder.rename(tmp_path / "b")
    assert [sha(ClassFolder(tmp_path / "b")), sha(FlatFolder(tmp_path / "b"))] == before
    assert before[0] != before[1]
    assert fingerprint.of_source(FlatFolder(tmp_path / "b"))["images"] == 3


@pytest.mark.parametrize("change", ["another", "fewer", "renamed", "other class"])
def test_other_files_are_other_data(folder, change):
    before = [sha(ClassFolder(folder)), sha(FlatFolder(folder))]
    if change == "another":
        shutil.copy(folder / "cat" / "1.png", folder / "cat" / "3.png")
    elif change == "fewer":
        (folder / "cat" / "1.png").unlink()
    elif change == "renamed":
        (folder / "cat" / "1.png").rename(folder / "cat" / "0.png")
    else:
        (folder / "dog").rename(folder / "fox")
    after = [sha(ClassFolder(folder)), sha(FlatFolder(folder))]
    assert all(a != b for a, b in zip(after, before, strict=True))


def test_labels_count(tmp_path, folder):
    shas = []
    for labels in ("01", "10"):
        rows = "".join(f"cat/{i + 1}.png,{label}\n" for i, label in enumerate(labels))
        (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
        shas.append(sha(ListFile(tmp_path / "list.csv", root=str(folder))))
    assert shas[0] != shas[1]


def test_parts_are_other_data():
    whole = Digits("test")
    shas = {sha(whole), sha(Digits("all"))}
    shas |= {sha(Subset(whole, count=count, seed=seed)) for count, seed in ((7, 0), (7, 1), (8, 0))}
    assert len(shas) == 5
    assert sha(Subset(whole, count=7, seed=0)) in shas


def test_parquet_files_by_name_and_size(tmp_path):
    from pyarrow import parquet, table

    def write(folder, values):
        (tmp_path / folder).mkdir(exist_ok=True)
        content = table({"image": [bytes(values)] * 3, "other": [b"x"] * 3})
        parquet.write_table(content, tmp_path / folder / "train.parquet")
        options = {"image_column": "image", "label_column": ""}
        return sha(ParquetSource(tmp_path / folder, "train", **options))

    assert write("a", range(200)) == write("b", range(200)) != write("c", range(90))


def test_fourteen_million_names_in_seconds():
    table = PathTable([])
    table._bytes = bytes(14 * 30_000)  # a thousandth of them
    table._ends = np.arange(14_000, dtype=np.int64)

    class Source:
        classes, labels = None, np.zeros(14_000, dtype=np.int64)
        identity = staticmethod(table.blocks)

        def __len__(self):
            return 14_000

    start = time.process_time()
    sha(Source())
    assert (time.process_time() - start) * 1000 < 30


def test_weights_of_a_tokenizer():
    torch.manual_seed(0)
    module, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    assert fingerprint.of_module(module) == fingerprint.of_module(other)
    other.running_var[1] = 2
    assert fingerprint.of_module(module) != fingerprint.of_module(other)
