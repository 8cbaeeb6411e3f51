"""Which layout a file or folder has, by its content, and its tensors; nothing in it is run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beit.checkpoints.atomic import local_path
from beit.checkpoints.header import HEADER_LIMIT
from beit.errors import UserError
from beit.interop.fields import Fields
from beit.interop.weights import shown
from beit.models.transfer import INDEX
from beit.printable import printable
from beit.tokenizers.pickles import read_inert

LAYOUTS = {
    "ours": "ours (a checkpoint of a run)",
    "unilm": "unilm, the official release (cls_token, patch_embed.proj.weight, blocks.0.*; bare or "
    "under model, module or state_dict)",
    "segmentation": "unilm segmentation (backbone.*, decode_head.*)",
    "timm": "timm (unilm's names, with or without a config.json)",
    "huggingface": "Hugging Face (embeddings.*, encoder.layer.0.* or layers.0.*, and a config.json "
    "of model_type beit)",
}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_CONTAINERS = ("model", "module", "state_dict")
_WRAPPERS = ("module.", "_orig_mod.")  # around every name: DistributedDataParallel, torch.compile


@dataclass(frozen=True)
class Found:
    """A file that was opened: its layout, its tensors, and what was around them."""

    layout: str
    path: Path
    tensors: dict[str, Tensor]
    content: Any = None  # of a pickle: all that it holds, without anything that acts
    config: Fields | None = None  # config.json beside it


def is_ours(path: str | Path) -> bool:
    """Whether it claims to be a checkpoint of ours; reads the header alone.

    A damaged one claims it too: what cannot be told is for our own reader to refuse.
    """
    path = local_path(path)
    if path.is_dir() or not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(8)
        if first.startswith((b"PK", b"\x80")):
            return False
        length = int.from_bytes(first, "little")
        if not 2 <= length <= min(HEADER_LIMIT, path.stat().st_size - 8):
            return False
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            return path.suffix == ".safetensors"
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    known = isinstance(metadata, dict) and any(str(key).startswith("beit.") for key in metadata)
    return known or any(str(key).startswith("state_dict.") for key in header)


def open_foreign(path: str | Path) -> Found:
    """A file or folder of another library's, its layout recognised.

    Raises:
        UserError: nothing there, damaged, holding more than tensors, or of no known layout.
    """
    path = local_path(path)
    file = _weights_in(path) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"nothing at {path}: the path must name a file or folder that exists")
    content: Any = None
    if file.suffix == ".safetensors" or _is_safetensors(file):
        tensors = _load_safetensors(file)
    else:
        content = read_inert(file, "weights")
        tensors = _tensors_in(content, file)
    tensors = _unwrapped(tensors)
    config = _config_beside(file, required=path.is_dir())
    return Found(_layout(tensors, content, config, file), file, tensors, content, config)


def _weights_in(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    held = sorted(entry.name for entry in folder.iterdir())[:6]
    raise UserError(
        f"{folder} holds no {' or '.join(WEIGHT_FILES)} (it holds {shown(held) or 'nothing'}): "
        "give a folder of Hugging Face's or timm's, or a file of weights"
    )


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
        inner = [k for k in _CONTAINERS if isinstance(content, dict) and k in content]
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


def _config_beside(file: Path, *, required: bool) -> Fields | None:
    path = file.parent / "config.json"
    if not path.is_file():
        if required:
            raise UserError(f"{file.parent} has no config.json, which says what the weights are of")
        return None
    found = Fields.read(path)
    if "model_type" in found or "architecture" in found or required:
        return found
    return None  # of something else that lies in the same folder


def _layout(tensors: dict[str, Tensor], content: Any, config: Fields | None, path: Path) -> str:
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in tensors):
        if config is None or config.content.get("model_type") != "beit":
            said = "has none beside it" if config is None else "is of another model"
            raise UserError(
                f"{path} has the names of Hugging Face's BEiT, whose config.json {said}: give the "
                "folder with its config.json of model_type beit"
            )
        return "huggingface"
    if "backbone.patch_embed.proj.weight" in tensors:
        return "segmentation"
    released = {"cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight"}
    if released <= set(tensors):
        if config is not None and "architecture" in config:
            return "timm"
        theirs = isinstance(content, dict) and any(key in content for key in _CONTAINERS)
        indexed = any(key.endswith(INDEX) for key in tensors)
        pretraining = "lm_head.weight" in tensors
        trained_by_timm = isinstance(content, dict) and "arch" in content
        return "unilm" if indexed or pretraining or (theirs and not trained_by_timm) else "timm"
    raise UserError(
        f"{path} has no layout that is known; its first tensors are "
        f"{shown(list(tensors)[:6]) or 'none'}. Known are: {'; '.join(LAYOUTS.values())}"
    )
