"""What reading weight files admits and refuses. No payload may run, in either format."""

import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from beit.errors import UserError
from beit.tokenizers.pickles import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def dall_e(monkeypatch):
    """A package laid out as the original one, with a small module of every class it pickles."""

    def define(name, body=None):
        return type(name, (nn.Module,), {"__module__": module.__name__, **(body or {})})

    modules = {}
    for part, names in {
        "encoder": ["Encoder", "EncoderBlock"],
        "decoder": ["Decoder", "DecoderBlock"],
        "utils": ["Conv2d"],
        "evil": ["Encoder"],
    }.items():
        module = modules[part] = types.ModuleType(f"dall_e.{part}")
        for name in names:
            setattr(module, name, define(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))

    def build(outer="encoder", resize=None):
        torch.manual_seed(0)
        conv = modules["utils"].Conv2d()
        conv.device = torch.device("cpu")
        conv.w = nn.Parameter(torch.randn(5, 3, 7, 7), requires_grad=False)
        conv.b = nn.Parameter(torch.randn(5), requires_grad=False)
        block = modules["encoder"].EncoderBlock()
        block.id_path = nn.Identity()
        block.res_path = nn.Sequential(OrderedDict(relu_1=nn.ReLU(), conv_1=conv))
        root = getattr(modules[outer], "Decoder" if outer == "decoder" else "Encoder")()
        root.blocks = nn.Sequential(OrderedDict(group_1=block, pool=resize or nn.ReLU()))
        return root

    return build


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("outer", "resize"), [("encoder", nn.MaxPool2d(2)), ("decoder", nn.Upsample(scale_factor=2))]
)
def test_pickled_modules_give_their_state_dict(dall_e, tmp_path, zipped, outer, resize):
    module = dall_e(outer, resize)
    torch.save(module, tmp_path / "a.pkl", _use_new_zipfile_serialization=zipped)
    tensors = read_tensors(tmp_path / "a.pkl", what="weights")
    expected = module.state_dict()
    assert (
        list(tensors)
        == list(expected)
        == [
            "blocks.group_1.res_path.conv_1.w",
            "blocks.group_1.res_path.conv_1.b",
        ]
    )
    for name, value in expected.items():
        assert torch.equal(tensors[name], value)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_only_files(tmp_path, zipped):
    tensors = {"a.w": torch.randn(3, 5), "b": torch.randn(7).half()}
    tensors |= {"c": torch.randn(2, 3).bfloat16(), "d": torch.randn(1).double()}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    torch.save(
        {"state_dict": OrderedDict(tensors)},
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=zipped,
    )
    for suffix in ("safetensors", "pt", "pth"):
        read = read_tensors(tmp_path / f"a.{suffix}", what="weights")
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[key], value) for key, value in tensors.items())


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(marker):
    command = f"touch {marker}"
    yield "os.system", Calls(os.system, command)
    yield "eval", Calls(eval, f"open({str(marker)!r}, 'w')")
    yield "partial", Calls(partial(os.system, command))
    yield "getattr", Calls(getattr, "text", "upper")
    yield "hidden", {"a.w": torch.zeros(3), "b": [Calls(os.system, command)]}
    yield "in an OrderedDict", OrderedDict(a=Calls(os.system, command))
    yield "another module", nn.Linear(3, 5)
    yield "torch.load", Calls(torch.load, str(marker))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", [name for name, _ in payloads("x")])
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, form, name):
    marker, path = tmp_path / "marker", tmp_path / "a.pkl"
    payload = dict(payloads(marker))[name]
    if form == "bare":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"a.pkl") as raised:
        read_tensors(path, what="weights")
    assert not marker.exists()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_module_of_an_unknown_class_inside_a_known_one_is_refused(dall_e, tmp_path, zipped):
    torch.save(dall_e("evil"), tmp_path / "a.pkl", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"dall_e.evil.Encoder"):
        read_tensors(tmp_path / "a.pkl", what="weights")


LEGACY_PARTS = (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}, OrderedDict(), [])


def test_the_parts_of_a_legacy_file(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"".join(pickle.dumps(part, 2) for part in LEGACY_PARTS))
    assert read_tensors(tmp_path / "a.pt", what="weights") == {}


@pytest.mark.parametrize("position", range(5))
def test_a_payload_in_each_part_of_a_legacy_file_is_refused(tmp_path, position):
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    parts = list(LEGACY_PARTS)
    parts[position] = Calls(os.system, f"touch {marker}")
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    with pytest.raises(UserError, match="refused"):
        read_tensors(path, what="weights")
    assert not marker.exists()


def test_what_is_compressed_is_refused(tmp_path):
    """A file of a megabyte could stand for a thousand; torch itself compresses nothing."""
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "a.pt")
    assert read_tensors(tmp_path / "a.pt", what="weights")["a"].shape == (100_000,)
    with zipfile.ZipFile(tmp_path / "a.pt") as plain:
        with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    assert torch.load(tmp_path / "b.pt", weights_only=True)["a"].shape == (100_000,)
    with pytest.raises(UserError, match="compressed, which torch"):
        read_tensors(tmp_path / "b.pt", what="weights")


class Claims(pickle.Pickler):
    """Writes a storage of a size that the file does not have."""

    def persistent_id(self, obj):
        return ("storage", torch.FloatStorage, "0", "cpu", 1 << 50, None) if obj == "it" else None


def test_a_storage_larger_than_its_file_is_refused(tmp_path):
    buffer = io.BytesIO()
    for part in (*LEGACY_PARTS[:3], {"a": "it"}, ["0"]):
        Claims(buffer, 2).dump(part)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="in a smaller file"):
        read_tensors(tmp_path / "a.pt", what="weights")


def test_many_storages_that_are_together_larger_than_their_file_are_refused(tmp_path):
    class Many(pickle.Pickler):
        def persistent_id(self, obj):
            named = isinstance(obj, str) and obj.startswith("storage-")
            key = obj[8:] if named else ""
            return ("storage", torch.FloatStorage, key, "cpu", 200, None) if named else None

    names = [f"storage-{number}" for number in range(100)]
    buffer = io.BytesIO()
    for part in (*LEGACY_PARTS[:3], {"a": names}):
        Many(buffer, 2).dump(part)
    pickle.dump([name[8:] for name in names], buffer, 2)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="a storage of 200 values in a smaller file"):
        read_tensors(tmp_path / "a.pt", what="weights")


@pytest.mark.parametrize("length", [0, 3, 100, -40])
@pytest.mark.parametrize("zipped", [True, False])
def test_cut_and_empty_files_are_refused(tmp_path, zipped, length):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.randn(50)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"a.pt"):
        read_tensors(path, what="weights")


def test_torchscript_and_other_zips_are_refused(tmp_path):
    torch.jit.script(nn.Linear(3, 5)).save(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "notes.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name in ("script.pt", "notes.pt"):
        with pytest.raises(UserError, match=name):
            read_tensors(tmp_path / name, what="weights")


def test_missing_and_false_safetensors(tmp_path):
    with pytest.raises(UserError, match="no file at"):
        read_tensors(tmp_path / "none.pkl", what="weights")
    (tmp_path / "a.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="not safetensors"):
        read_tensors(tmp_path / "a.safetensors", what="weights")


@pytest.mark.parametrize("zipped", [True, False])
def test_the_environment_cannot_allow_code(tmp_path, monkeypatch, zipped):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "ran"
    for name, payload in payloads(marker):
        path = tmp_path / f"{name}.pt"
        torch.save(payload, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="was refused"):
            read_tensors(path, what="weights")
    assert not marker.exists()


@pytest.mark.parametrize("url", ["https://example.invalid/encoder.pkl", "file:///encoder.pkl"])
def test_weights_are_not_fetched(url):
    with pytest.raises(UserError, match=r"is not fetched.*SHA-256"):
        read_tensors(url, what="weights")
