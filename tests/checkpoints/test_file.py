"""The file format: an exact round trip, nothing but data, nothing damaged is taken for whole."""

import hashlib
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from beit.checkpoints import file as files
from beit.checkpoints import header as headers
from beit.checkpoints.errors import DamagedCheckpoint, NewerSchema, NoSpace
from beit.checkpoints.file import CheckpointFile, read_file, verify, write_file
from beit.checkpoints.plugin import CheckpointFiles, NonFiniteWeights
from beit.errors import UserError
from beit.files import local_path, remove_leftovers, replace_text
from beit.interop.recognise import is_ours


def tree():
    shared = torch.arange(15.0).reshape(3, 5)
    return {
        "state_dict": OrderedDict({"backbone.a": shared, "backbone.b": shared.t(), "c": shared[1]}),
        "numbers": {1: (1, -2.5, [math.inf, -math.inf, -0.0]), None: 2**70, False: 1e-310},
        "text": ["", "ä\n\x00", b"\x00\xff", {"$tuple": [1], "": {}}, []],
        "tensors": [
            torch.tensor(7),
            torch.tensor([True, False]),
            torch.empty(0, 3),
            torch.tensor([1.5, math.nan, -0.0], dtype=torch.bfloat16),
            torch.tensor([1 - 2j], dtype=torch.complex64),
            torch.arange(5, dtype=torch.uint8)[::2],
            torch.tensor(2.5).to(torch.float8_e4m3fn),
            nn_parameter(),
        ],
        "a": {"b.c": torch.ones(1), "b": {"c": torch.zeros(1)}},
    }


def nn_parameter():
    return torch.nn.Parameter(torch.full((2,), 3.0))


def same(a, b):
    """The same values of the same types; NaN is NaN and -0.0 is not 0.0."""
    if isinstance(a, torch.Tensor):
        raw = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, dict):
        keys = [(type(x), x) for x in a] == [(type(x), x) for x in b]
        return type(b) is dict and keys and all(same(a[k], b[k]) for k in a)
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return struct.pack("d", a) == struct.pack("d", b) if isinstance(a, float) else a == b


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.safetensors"
    write_file(path, tree())
    return path


def test_round_trip(path):
    assert same(tree(), read_file(path))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_it_is_a_safetensors_file(path):
    found = load_file(path)
    assert torch.equal(found["state_dict.backbone.b"], tree()["state_dict"]["backbone.b"])
    assert found["tensors.0"].item() == 7
    with safe_open(path, "pt") as opened:
        assert len(opened.keys()) == len(CheckpointFile.open(path).entries) == 13


def test_the_checksums_are_sha256_of_what_they_say(path):
    entry = CheckpointFile.open(path).entries["tensors.0"]
    facts = json.dumps(["tensors.0", "I64", []]).encode() + b"\n"
    assert entry.digest == hashlib.sha256(facts + np.int64(7).tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Path("x"), "PosixPath"),
        (np.float64(1), "float64"),
        (np.ones(2), "ndarray"),
        ({1, 2}, "set"),
        (torch.Size([1]), "Size"),
        (torch.float32, "dtype"),
        (print, "function"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.empty(1, device="meta"), "meta"),
        ({(1, 2): 3}, "tuple"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_data_is_refused_by_its_place(tmp_path, value, named):
    with pytest.raises(UserError, match=rf"a\.1\.b.*{named}|{named}.*a\.1\.b"):
        write_file(tmp_path / "x.safetensors", {"a": [0, {"b": value}]})
    assert not list(tmp_path.iterdir())


def test_what_holds_itself_is_refused(tmp_path):
    loop = {}
    loop["again"] = loop
    with pytest.raises(UserError, match="holds itself"):
        write_file(tmp_path / "x.safetensors", loop)


def test_a_flipped_bit_anywhere_is_noticed(path):
    """In the header, in each tensor and between them."""
    good = path.read_bytes()
    data = 8 + int.from_bytes(good[:8], "little")
    for place in [*range(8), *range(8, data, 23), *range(data, len(good), 5)]:
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        if bad[8:data].strip(b" ") == good[8:data].strip(b" ") and place < data:
            continue  # blanks at the end of the header
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_file(path)
    for length in (0, 7, 8, 100, data - 1, data, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedCheckpoint, match=str(path)):
            verify(path)
    path.write_bytes(good + b"\x00")
    with pytest.raises(DamagedCheckpoint, match="bytes and should have"):
        verify(path)


def test_a_part_is_read_and_verified_alone(path):
    file = CheckpointFile.open(path)
    damaged = bytearray(path.read_bytes())
    damaged[file.entries["state_dict.c"].begin] ^= 1
    path.write_bytes(damaged)
    found = file.read(["state_dict.backbone.a"])["state_dict.backbone.a"]
    assert torch.equal(found, torch.arange(15.0).view(3, 5))
    with pytest.raises(DamagedCheckpoint, match=r"state_dict\.c"):
        file.read(["state_dict.c"])
    with pytest.raises(DamagedCheckpoint, match=r"state_dict\.c"):
        read_file(path)


def test_a_file_that_is_replaced_while_it_is_read_is_not_damaged(path):
    """As `last` and `best` are, by a run that goes on."""
    file = CheckpointFile.open(path)
    write_file(path, {"state_dict": {"c": torch.zeros(5)}, "more": torch.ones(99)})
    assert torch.equal(file.read(["state_dict.c"])["state_dict.c"], torch.arange(5.0, 10.0))
    descriptor = file.descriptor
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_writers_of_two_machines_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    """Where file systems have no locks, and processes in containers have the same numbers."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with files.replacing(tmp_path / "a") as first, files.replacing(tmp_path / "a") as second:
        assert first.name != second.name


def test_small_texts_are_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.txt"
    replace_text(path, "ä\r\n")
    assert path.read_bytes() == b"\xc3\xa4\r\n"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "b")
    assert path.read_text() == "ä\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_schema_of_thousands_of_digits_is_refused(path, monkeypatch):
    monkeypatch.setattr(headers, "SCHEMA", "9" * 5000)
    monkeypatch.setattr(files, "verify", lambda path: None)
    write_file(path, {"x": 1})
    monkeypatch.undo()
    with pytest.raises(NewerSchema):
        read_file(path)


def test_two_tensors_that_changed_places_are_noticed(tmp_path):
    a, b = torch.randn(4), torch.randn(4)
    write_file(tmp_path / "a.safetensors", {"a": a, "b": b})
    good = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(good[:-32] + good[-16:] + good[-32:-16])
    with pytest.raises(DamagedCheckpoint):
        read_file(tmp_path / "a.safetensors")


def test_a_newer_schema_is_refused(path, monkeypatch):
    monkeypatch.setattr(headers, "SCHEMA", 2)
    write_file(path, {"x": 1})
    monkeypatch.setattr(headers, "SCHEMA", 1)
    with pytest.raises(NewerSchema, match=r"newer version of beit \(schema 2.*update beit"):
        read_file(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    torch.save({"a": 1}, path)
    with pytest.raises(UserError, match="may hold code, and was not opened"):
        read_file(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(UserError, match="not a checkpoint of beit"):
        read_file(path)
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="cut short"):
        read_file(path)
    with open(path, "wb") as file:  # a sparse file of 33 MB
        file.write((headers.HEADER_LIMIT + 1).to_bytes(8, "little"))
        file.truncate(headers.HEADER_LIMIT + 100)
    with pytest.raises(UserError, match="are allowed"):
        read_file(path)
    path.write_bytes(b"\x10\x27\x00\x00\x00\x00\x00\x00" + b"[" * 10000)
    with pytest.raises(UserError, match="cannot be read"):
        read_file(path)
    for url in ("s3://bucket/x.safetensors", "https://host/x.safetensors"):
        with pytest.raises(UserError, match="local files"):
            read_file(url)
        with pytest.raises(UserError, match="local files"):
            local_path(url)


@pytest.mark.parametrize(
    "change",
    [{"shape": [2**61, 2**61, 0]}, {"dtype": "I16"}, {"shape": [-1]}, {"shape": [True, 2]}],
)
def test_a_header_that_lies_is_refused(tmp_path, monkeypatch, change):
    """Also one whose author knows how to compute checksums."""
    write_file(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["a"].update(change)
    changed = json.dumps(header).encode()
    content = len(changed).to_bytes(8, "little") + changed + content[8 + length :]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DamagedCheckpoint):
        read_file(tmp_path / "x.safetensors")


def test_a_save_that_fails_leaves_what_was(path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace, match=r"a\.safetensors.*are needed.*are free") as raised:
        write_file(path, {"x": torch.ones(1000)})
    assert raised.value.needed == 4000
    monkeypatch.undo()
    assert same(tree(), read_file(path))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_disk_that_gives_back_other_bytes_leaves_what_was(path, monkeypatch):
    monkeypatch.setattr(files, "_write", lambda file, *rest: file.write(b"\x20" * 100))
    with pytest.raises(DamagedCheckpoint):
        write_file(path, {"x": torch.ones(1000)})
    assert same(tree(), read_file(path))


def test_leftovers_go_unless_they_are_being_written(tmp_path):
    mine = tmp_path / ".a.safetensors.1.part"
    mine.write_bytes(b"half")
    names = ("a.part", ".a.part", ".a.safetensors.x.part", "a.1.part")
    others = [tmp_path / name for name in names]
    for other in others:
        other.write_bytes(b"")
    busy = tmp_path / ".b.safetensors.2.part"
    code = "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.flock(f,2); print(1,flush=True)"
    code += "; input()"
    writer = subprocess.Popen(
        [sys.executable, "-c", code, busy], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    writer.stdout.readline()
    assert remove_leftovers(tmp_path) == [mine]
    writer.communicate(b"\n")
    assert remove_leftovers(tmp_path) == [busy]
    assert sorted(tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("place", ["state_dict", "optimizer_states", "current_model_state"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, place, value):
    path = tmp_path / "x.safetensors"
    good = {"state_dict": {"w": torch.ones(3)}, "callbacks": {"score": torch.tensor(math.nan)}}
    CheckpointFiles().save_checkpoint(good, path)
    bad = torch.ones(5, 7, dtype=torch.bfloat16)
    bad[3, 2] = value
    with pytest.raises(NonFiniteWeights, match=rf"{place}\.0\.exp_avg"):
        CheckpointFiles().save_checkpoint({**good, place: {0: {"exp_avg": bad}}}, path)
    assert same(good, read_file(path))


def test_what_is_loaded_passes_through_on_load(path):
    plugin = CheckpointFiles(on_load=lambda checkpoint: {**checkpoint, "rescaled": True})
    assert plugin.load_checkpoint(path)["rescaled"]
    plugin.remove_checkpoint(path)
    assert not path.exists()


def test_lengths_of_headers_that_look_like_a_pickle(path):
    # one_in_32 headers has a length whose first byte is a pickle's
    first = set()
    for padding in range(0, 256, 8):
        write_file(path, {"x": torch.ones(2), "text": "a" * padding})
        first.add(path.read_bytes()[0])
        assert read_file(path)["text"] == "a" * padding
        assert is_ours(path)
    assert 0x80 in first


def test_a_refusal_on_one_rank_can_be_told_to_the_others():
    for error in (NoSpace("x", 5, 3), NonFiniteWeights("x", ["a"]), DamagedCheckpoint("x")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)


def test_tensors_keep_their_order_in_memory(path):
    plain = torch.arange(24.0).view(2, 3, 4, 1)
    tree = {
        "channels_last": plain.contiguous(memory_format=torch.channels_last),
        "transposed": torch.arange(6).view(2, 3).T,
        "turned": plain.permute(3, 1, 0, 2),
        "slice": plain[:, 1:],
        "expanded": torch.ones(1).expand(3),
        "plain": plain,
    }
    write_file(path, tree)
    found = read_file(path)
    for name, tensor in tree.items():
        assert torch.equal(found[name], tensor), name
        if name in ("slice", "expanded"):
            assert found[name].is_contiguous()
        else:
            sizes = [size for size in tensor.shape if size > 1]
            assert len(sizes) == 3 or name == "transposed"
            for i, size in enumerate(tensor.shape):
                assert size == 1 or found[name].stride(i) == tensor.stride(i), name


def test_a_fused_optimizer_goes_on_with_moments_in_channels_last(path):
    def stepped(parameter, optimizer, number):
        generator = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(4, 3, 2, 2, generator=generator)
        parameter.grad = parameter.grad.contiguous(memory_format=torch.channels_last)
        optimizer.step()

    def fresh():
        weight = torch.ones(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        parameter = torch.nn.Parameter(weight)
        return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)

    whole, optimizer = fresh()
    stepped(whole, optimizer, 1)
    write_file(path, {"weight": whole.detach(), "optimizer": optimizer.state_dict()})
    stepped(whole, optimizer, 2)
    resumed, optimizer = fresh()
    content = read_file(path)
    with torch.no_grad():
        resumed.copy_(content["weight"])
    optimizer.load_state_dict(content["optimizer"])
    stepped(resumed, optimizer, 2)
    assert torch.equal(resumed, whole)
