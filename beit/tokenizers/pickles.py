"""Tensors out of weight files, the original DALL-E pickles among them, without running their code.

`encoder.pkl` and `decoder.pkl` are whole module objects: plain unpickling would import `dall_e` and
run whatever a file names. Here torch's weights-only unpickler reads the zip format. It refuses
every class and function but tensors, plain containers and the few classes below, which are given
inert stand-ins. The older format goes to `LegacyUnpickler`: torch's own reads no modules from it.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beit.errors import UserError

# all that the two original files name beyond tensors and containers
ADMITTED_CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)


class InertModule:
    """Stands for a pickled module: keeps its parameters and children, does nothing."""

    def __init__(self) -> None:
        # only a hostile file calls a class instead of rebuilding an object; harmless all the same
        self.parameters: dict[str, Any] = {}
        self.children: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a module whose state is not a dictionary")
        self.parameters = _string_keyed(state.get("_parameters"))
        self.children = _string_keyed(state.get("_modules"))

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Names and values as `state_dict()` of the real module would have them."""
        for name, value in self.parameters.items():
            if isinstance(value, Tensor):
                yield prefix + name, value.detach()
        for name, child in self.children.items():
            if isinstance(child, InertModule):
                yield from child.tensors(f"{prefix}{name}.")


class InertNamespace:
    """Stands for `argparse.Namespace`, the settings of a training that released files carry."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.values = _string_keyed(state)


def _string_keyed(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise pickle.UnpicklingError("a module without parameters and children")
    return value


def read_tensors(path: str | Path, *, what: str) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, a saved state dict, or an original DALL-E pickle.

    Args:
        what: what the file should hold, for the message.

    Raises:
        UserError: no such file, damaged, or holding anything but such tensors and modules.
    """
    if "://" in str(path):
        raise UserError(
            f"{what}: {path} is not fetched: download it, compare its SHA-256 with the published "
            "one (sha256sum FILE), and give the path of the file"
        )
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{what}: no file at {path}; give the path of a file that exists")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{what}: {path} is damaged or not safetensors: {error}") from error
    return _tensors_of(read_inert(path, what), path, what)


def read_inert(path: Path, what: str) -> Any:
    """What a file of `torch.save` holds: tensors and plain containers, stand-ins for the rest.

    Raises:
        UserError: damaged, or naming a class or function that has no stand-in.
    """
    try:
        with path.open("rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
            stream.seek(0)
            return _read_zipped(path) if zipped else _read_legacy(stream)
    except pickle.UnpicklingError as error:
        reason = _reason(error)
        raise UserError(
            f"{what}: {path} was refused, it holds more than tensors and DALL-E's modules "
            f"({reason}); get it again from where it was published"
        ) from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        AssertionError,
        RecursionError,
        MemoryError,
        OSError,
        zipfile.BadZipFile,
    ) as error:
        # an unpickler fed with garbage fails in many ways, none of which runs anything
        raise UserError(
            f"{what}: {path} is damaged or not a file of weights ({_reason(error)}); get it again"
        ) from error


def _read_zipped(path: Path) -> Any:
    stand_ins: list[Any] = [(InertModule, name) for name in ADMITTED_CLASSES]
    stand_ins.append((InertNamespace, "argparse.Namespace"))
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise pickle.UnpicklingError("Unsupported: compressed, which torch.save does not do")
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


class LegacyUnpickler(pickle.Unpickler):
    """Reads the one object of a `torch.save` file from before the zip format (torch 1.6).

    Tensors come out as views of zeros: the values follow the object in the file.
    """

    def __init__(self, stream: BinaryIO, *, max_values: int) -> None:
        super().__init__(stream)
        self.values_left = max_values
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in ADMITTED_CLASSES:
            return InertModule
        if full_name == "argparse.Namespace":
            return InertNamespace
        if full_name in LEGACY_GLOBALS:
            return LEGACY_GLOBALS[full_name]
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {full_name}")

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # with the source code of the class, which nobody needs
            return pid[1]
        kind, dtype, key, _, size, view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or view is not None:
            raise pickle.UnpicklingError(f"Unsupported persistent id {kind}")
        if key not in self.storages:
            if not 0 <= size <= self.values_left:
                raise pickle.UnpicklingError(f"a storage of {size} values in a smaller file")
            self.values_left -= size
            self.storages[key] = torch.zeros(size, dtype=dtype)
        return self.storages[key]


def _rebuild_tensor(storage: Tensor, offset: int, size: Any, stride: Any, *unused: Any) -> Tensor:
    values = storage[offset : offset + math.prod(size)].view(size)
    if values.stride() != tuple(stride):
        raise pickle.UnpicklingError("a tensor that is not contiguous")
    return values


LEGACY_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "__builtin__.set": set,
    "torch.device": lambda *name: None,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *unused: data,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.HalfStorage": torch.float16,
    "torch.LongStorage": torch.int64,
}


def _read_legacy(stream: BinaryIO) -> Any:
    """torch.save's old layout: magic number, version, machine, object, storage keys, raw values."""
    size = stream.seek(0, 2)
    stream.seek(0)
    header = [LegacyUnpickler(stream, max_values=0).load() for _ in range(3)]
    if header[0] != torch.serialization.MAGIC_NUMBER or not header[2].get("little_endian"):
        raise pickle.UnpicklingError("neither a zip file nor torch's older format")
    unpickler = LegacyUnpickler(stream, max_values=size)
    content = unpickler.load()
    for key in LegacyUnpickler(stream, max_values=0).load():
        storage = unpickler.storages[key]
        count = int.from_bytes(stream.read(8), "little")
        data = bytearray(stream.read(storage.element_size() * storage.numel()))
        if count != storage.numel() or len(data) != storage.element_size() * count:
            raise pickle.UnpicklingError(f"the values of storage {key} are cut short")
        if count:
            storage.copy_(torch.frombuffer(data, dtype=storage.dtype))
    return content


def _reason(error: BaseException) -> str:
    """The first line that says something of the file, without torch's advice to trust it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "nsupported" in line]
    return (telling or lines or [type(error).__name__])[0].split(". ")[0][:200]


def _tensors_of(content: Any, path: Path, what: str) -> dict[str, Tensor]:
    if isinstance(content, InertModule):
        return dict(content.tensors())
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # as OpenMMLab wraps it
    if isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values()):
        return {str(name): value for name, value in content.items()}
    raise UserError(f"{what}: {path} holds {type(content).__name__}, expected tensors by name")
