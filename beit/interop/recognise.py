"""Which layout a file or folder has, by its content."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from beit.checkpoints.header import HEADER_LIMIT
from beit.errors import UserError
from beit.files import local_path
from beit.interop.fields import Fields
from beit.interop.files import CONTAINERS, read_tensors, weights_in
from beit.interop.weights import shown
from beit.models.transfer import INDEX

LAYOUTS = {
    "ours": "ours (a checkpoint of a run)",
    "unilm": "unilm, the official release (cls_token, patch_embed.proj.weight, "
    "blocks.0.attn.q_bias; bare or under model, module or state_dict)",
    "segmentation": "unilm segmentation (backbone.*, decode_head.*)",
    "timm": "timm (unilm's names, with or without a config.json)",
    "huggingface": "Hugging Face (embeddings.*, encoder.layer.0.* or layers.0.*, and a config.json "
    "of model_type beit)",
}


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
        # a pickle or a zip file has no such length: its first bytes make a far larger number
        length = int.from_bytes(file.read(8), "little")
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
    if not path.exists():
        raise UserError(f"nothing at {path}: the path must name a file or folder that exists")
    file = weights_in(path) if path.is_dir() else path
    tensors, content = read_tensors(file)
    config = _config_beside(file, required=path.is_dir())
    return Found(_layout(tensors, content, config, file), file, tensors, content, config)


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
            said = "no config.json" if config is None else "the config.json of another model"
            raise UserError(
                f"{path} has the names of Hugging Face's BEiT, and beside it lies {said}: give the "
                "folder with a config.json of model_type beit"
            )
        return "huggingface"
    if "backbone.patch_embed.proj.weight" in tensors:
        return "segmentation"
    # a plain vision transformer has a bias of q, k and v together
    released = {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.q_bias"}
    if released <= set(tensors):
        if config is not None and "architecture" in config:
            return "timm"
        theirs = isinstance(content, dict) and any(key in content for key in CONTAINERS)
        indexed = any(key.endswith(INDEX) for key in tensors)
        pretraining = "lm_head.weight" in tensors
        trained_by_timm = isinstance(content, dict) and "arch" in content
        return "unilm" if indexed or pretraining or (theirs and not trained_by_timm) else "timm"
    raise UserError(
        f"{path} has no layout that is known; its first tensors are "
        f"{shown(list(tensors)[:6]) or 'none'}. Known are: {'; '.join(LAYOUTS.values())}"
    )
