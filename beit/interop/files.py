"""Tensors of a file of weights, or of several that one index names; nothing in them is run."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beit.errors import UserError
from beit.interop.fields import Fields
from beit.interop.weights import shown
from beit.printable import printable
from beit.tokenizers.pickles import read_inert

_INDEX = ".index.json"
# in the order in which transformers looks for them
WEIGHT_FILES = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)
CONTAINERS = ("model", "module", "state_dict")
_WRAPPERS = ("module.", "_orig_mod.")  # around every name: DistributedDataParallel, torch.compile
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors|\.bin)")
MOST_SHARDS = 1000


def weights_in(folder: Path) -> Path:
    """The file of a folder that holds its weights, or the index of those that do.

    Raises UserError where there is none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    held = shown(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
    raise UserError(
        f"{folder} holds no {' or '.join(WEIGHT_FILES[::2])} (it holds {held}): "
        "give a folder of Hugging Face's or timm's, or a file of weights"
    )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors by name, and of a pickle all that it holds, without anything that acts.

    Raises UserError: damaged, holding more than tensors, or one part of several.
    """
    if path.name.endswith(_INDEX):
        return _unwrapped(_read_shards(path)), None
    if path.suffix == ".json":
        raise UserError(f"{path} holds no weights: give its folder, or the file with the weights")
    if part := _SHARD.fullmatch(path.name):
        index = path.with_name(f"{part[1]}{part[2]}{_INDEX}")
        raise UserError(f"{path} is one part of several: give its folder, with {index.name}")
    tensors, content = _read_one(path)
    return _unwrapped(tensors), content


def _read_one(path: Path) -> tuple[dict[str, Tensor], Any]:
    if path.suffix == ".safetensors" or _is_safetensors(path):
        return _load_safetensors(path), None
    content = read_inert(path, "weights")
    return _tensors_in(content, path), content


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index of Hugging Face's names."""
    places = Fields.read(index).inner("weight_map").content
    names = sorted(set(map(str, places.values())))
    if not names or len(names) > MOST_SHARDS:
        raise UserError(f"{index} names {len(names)} files of weights; expected 1 to {MOST_SHARDS}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        # a name of a file beside the index: a path could lead anywhere
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(f"{index} names {shown([name])}, which is no file beside it")
        part, _ = _read_one(index.parent / name)
        tensors.update({key: value for key, value in part.items() if places.get(key, name) == name})
    if missing := [key for key in places if key not in tensors]:
        raise UserError(f"{index} lists {shown(missing)}, which its files do not hold")
    return tensors


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.read(9)
    length = int.from_bytes(first[:8], "little")
    return first[8:] == b"{" and length < path.stat().st_size


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged, cut short or no safetensors file ({printable(str(error))}): get it"
            " again"
        ) from error


def _tensors_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The dict of tensors, which may lie under one of the usual keys."""
    for _ in range(3):
        inner = [k for k in CONTAINERS if isinstance(content, dict) and k in content]
        if not inner or not isinstance(content[inner[0]], dict):
            break
        content = content[inner[0]]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}: expected tensors by name")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            held = f"{shown([str(key)])} is {type(value).__name__}"
            raise UserError(f"{path} holds more than tensors by name: {held}")
    return dict(content)


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key[len(prefix) :]: value for key, value in tensors.items()}
    return tensors
