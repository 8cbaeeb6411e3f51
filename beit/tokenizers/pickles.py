"""Tensors out of weight files, the original DALL-E pickles among them, without running their code.

`encoder.pkl` and `decoder.pkl` are whole module objects: plain unpickling would import `dall_e` and run
whatever a file names. Here torch's weights-only unpickler reads them. It refuses every class and
function but tensors and plain containers, and the few classes below, which it gets as inert stand-ins.
"""

import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

    dump_patches = False  # torch asks for it where a file carries source code

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
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{what}: no file at {path}; give the path of a file that exists")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{what}: {path} is damaged or not safetensors: {error}") from error
    return _tensors_of(_read_inert(path, what), path, what)


def _read_inert(path: Path, what: str) -> Any:
    stand_ins: list[Any] = [(InertModule, name) for name in ADMITTED_CLASSES]
    try:
        # a legacy file carries the source of its classes, which torch compares with ours
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
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
        OSError,
        zipfile.BadZipFile,
    ) as error:
        # an unpickler fed with garbage fails in many ways, none of which runs anything
        raise UserError(
            f"{what}: {path} is damaged or not a file of weights ({_reason(error)}); get it again"
        ) from error


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
