"""Lists, folders and tables that somebody else made, with what they should not hold."""

import errno
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from beit.data import paths
from beit.data.images import UnreadableImage
from beit.data.sources import ClassFolder, FlatFolder, ListFile, ParquetSource
from beit.data.views import EvalTransform
from beit.errors import UserError


@pytest.fixture
def picture():
    stream = io.BytesIO()
    Image.new("RGB", (5, 3), (9, 8, 7)).save(stream, "PNG")
    return stream.getvalue()


def one_line(raised, *, longest=1500):
    text = str(raised.value)
    assert len(text) < longest
    assert text.isprintable()
    return text


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", b"path,label\nx\x1b[2J.png,0\n", r"line 2: .*x\\x1b\[2J\.png does not exist"),
        ("a.csv", b"path\n" + b"y" * 10_000_000 + b"\n", "field larger than field limit"),
        ("a.csv", b"path\n\xff\xfe\n", "can't decode.*expected UTF-8 text"),
        ("a.csv", b"x" * 10_000_000 + b"\n", "(header|field larger)"),
        ("a.csv", b"path\n\0\n", "does not exist"),
        ("a.csv", b"path\n../../etc\n", "does not exist or is no file"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"path": ' + b"9" * 10_000 + b"}", "line 1: not JSON"),
        ("a.jsonl", b'{"path": 7}', "line 1: no path in this row"),
        ("a.jsonl", b'{"path": "' + b"z" * 10_000_000 + b'"}', r"\.\.\.\(9,\d\d\d,\d+ char"),
        ("a.jsonl", b'["' + b"z" * 10_000_000 + b'"]', "expected"),
        ("a.jsonl", b"\xff\n", "can't decode"),
    ],
)
def test_a_hostile_list_is_refused_in_one_line(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match) as raised:
        ListFile(tmp_path / name)
    one_line(raised)


def pack(folder, value):
    """One row, whose image is this."""
    (folder / "pack").mkdir(exist_ok=True)
    table = pa.table({"image": [value]})
    pq.write_table(table, folder / "pack" / "train.parquet")
    return ParquetSource(folder / "pack", "train", label_column="")


@pytest.mark.parametrize("kind", ["dict", "text"])
@pytest.mark.parametrize("name", ["{out}", "../out.png", "link.png", "/etc/passwd", "x\0", "~/x"])
def test_a_row_names_no_file_outside_of_its_pack(tmp_path, picture, name, kind):
    (tmp_path / "out.png").write_bytes(picture)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "link.png").symlink_to(tmp_path / "out.png")
    path = name.format(out=tmp_path / "out.png")
    source = pack(tmp_path, {"bytes": None, "path": path} if kind == "dict" else path)
    with pytest.raises(UnreadableImage, match=r"outside of the data set|null byte|No such file"):
        source.load(0)


def test_a_row_may_name_one_of_its_pack(tmp_path, picture):
    (tmp_path / "pack" / "images").mkdir(parents=True)
    (tmp_path / "pack" / "images" / "a.png").write_bytes(picture)
    for path in ("images/a.png", str(tmp_path / "pack" / "images" / "a.png")):
        for value in (path, {"bytes": None, "path": path}, {"bytes": b"", "path": path}):
            assert pack(tmp_path, value).load(0)[0].getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("label", ['"a\\nb\\u001b[1m"', '"' + "q" * 10_000_000 + '"', "-3"])
def test_a_hostile_label_is_refused_in_one_line(tmp_path, picture, label):
    (tmp_path / "x.png").write_bytes(picture)
    (tmp_path / "a.jsonl").write_text(f'{{"path": "x.png", "label": {label}}}')
    with pytest.raises(UserError, match="label") as raised:
        ListFile(tmp_path / "a.jsonl", classes=["a", "b"])
    one_line(raised)


def test_a_list_may_name_files_anywhere(tmp_path, picture):
    (tmp_path / "x.png").write_bytes(picture)
    (tmp_path / "lists").mkdir()
    rows = [{"path": "../x.png"}, {"path": str(tmp_path / "x.png")}]
    (tmp_path / "lists" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = ListFile(tmp_path / "lists" / "a.jsonl")
    assert [source.load(index)[0].size for index in range(2)] == [(5, 3)] * 2


def test_names_of_files_that_would_act_are_shown(tmp_path, picture):
    folder = tmp_path / "cats"
    folder.mkdir()
    for name in (b"\x1b[31m.png", b"two\nlines.png", b"latin\xe9.png"):
        (folder / os.fsdecode(name)).write_bytes(picture)
    source = FlatFolder(tmp_path)
    names = [source.name(index) for index in range(3)]
    assert sorted(name.rpartition("/")[2] for name in names) == [
        r"\x1b[31m.png",
        r"latin\udce9.png",
        r"two\nlines.png",
    ]
    assert [source.load(index)[0].size for index in range(3)] == [(5, 3)] * 3


@pytest.mark.parametrize("make", [ClassFolder, FlatFolder])
def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, picture, make, monkeypatch):
    for name in ("cats", "dogs/puppies"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").write_bytes(picture)
    assert len(make(tmp_path)) == 2
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("puppies"):
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(paths.os, "scandir", locked)
    with pytest.raises(UserError, match=r"puppies: this folder cannot be read \(Permission denied"):
        make(tmp_path)


def test_what_lies_in_a_folder_beside_images(tmp_path, picture):
    """Pipes, links in circles and folders named .jpg: listed at most, and then unreadable."""
    (tmp_path / "good.png").write_bytes(picture)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "up").symlink_to("..")
    source = FlatFolder(tmp_path)
    readable = []
    for index in range(len(source)):
        try:
            source.load(index)
            readable.append(source.name(index))
        except UnreadableImage:
            pass
    assert readable == [str(tmp_path / "good.png")]
    assert len(source) == 3


def table(folder, values, kind):
    folder.mkdir()
    images = pa.array(values, kind)
    pq.write_table(pa.table({"image": images}), folder / "train-00000-of-00001.parquet")
    return ParquetSource(folder, "train", label_column="")


def test_rows_of_every_broken_kind(tmp_path, picture):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [
        {"bytes": picture, "path": None},
        {"bytes": picture[:40], "path": "half"},
        {"bytes": None, "path": None},
        {"bytes": b"", "path": ""},
        {"bytes": None, "path": "/dev/zero"},
        {"bytes": None, "path": "nowhere.png"},
        None,
    ]
    source = table(tmp_path / "a", values, struct)
    assert source.load(0)[0].size == (5, 3)
    for index in range(1, len(values)):
        with pytest.raises(UnreadableImage, match=rf"a train row {index}: ."):
            source.load(index)
    numbers = table(tmp_path / "b", [1, 2], pa.int64())
    with pytest.raises(UnreadableImage, match="no image bytes but int"):
        numbers.load(1)


def test_text_that_is_none(tmp_path):
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    source = table(tmp_path / "a", ["x"], pa.string())
    source._images = pa.chunked_array([broken])
    with pytest.raises(UnreadableImage, match="row 0"):
        source.load(0)


def test_a_table_whose_pages_are_broken(tmp_path, picture):
    table(tmp_path / "a", [picture] * 3, pa.binary())
    path = tmp_path / "a" / "train-00000-of-00001.parquet"
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"parquet: cannot be read \(") as raised:
        ParquetSource(tmp_path / "a", "train", label_column="")
    one_line(raised)


@pytest.mark.parametrize("size", [(65_535, 1), (1, 65_535), (3, 700)])
def test_a_strip_takes_no_memory_when_it_is_cut_to_its_middle(size, monkeypatch):
    asked = []
    resize = Image.Image.resize

    def watched(image, to, *arguments, **options):
        asked.append(to[0] * to[1])
        return resize(image, to, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    transform = EvalTransform(image_size=(48, 56), mean=(0.5,) * 3, std=(0.5,) * 3)
    strip = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
    assert transform(strip).shape == (3, 48, 56)
    assert max(asked) < 300_000
