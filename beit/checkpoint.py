"""Checkpoints as plain data: what they hold, how they are read, how weights pass on.

A checkpoint is Lightning's file with one more entry, `beit`: the resolved config as plain dicts,
the version, and the class names. It loads with `weights_only=True`, so reading one runs no code.
"""

import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit import __version__
from beit.errors import UserError
from beit.models.transfer import TransferReport, adapt_backbone
from beit.models.vit import VisionTransformer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds, as far as models are concerned."""

    path: str
    state_dict: dict[str, Tensor]  # `backbone.*` and `head.*`, or `tokenizer.*`
    config: dict[str, Any]  # the run's resolved config
    classes: list[str] | None  # class names, where the run had labels
    step: int

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one child, `backbone` say, under the child's own names."""
        start = f"{prefix}."
        found = {k[len(start) :]: v for k, v in self.state_dict.items() if k.startswith(start)}
        if not found:
            children = sorted({key.split(".")[0] for key in self.state_dict})
            raise UserError(f"{self.path} has no {prefix}: it holds {', '.join(children)}")
        return found


def record(config: dict[str, Any], classes: list[str] | None) -> dict[str, Any]:
    """The entry `beit` of a checkpoint."""
    return {"version": __version__, "config": config, "classes": classes}


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of ours on the CPU, tensors and plain data only.

    Raises UserError where the file is missing, is damaged, holds code, or is not one of ours.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: the path must name a file that exists")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain data and was not opened: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is damaged or not a checkpoint: {str(error).splitlines()[0]}"
        ) from error
    entry = content.get("beit") if isinstance(content, dict) else None
    if entry is None or "state_dict" not in content:
        keys = list(content)[:5] if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path} is not a checkpoint of beit: expected the entries 'state_dict' and 'beit', "
            f"found {keys}"
        )
    return Checkpoint(
        path=str(path),
        state_dict=content["state_dict"],
        config=entry["config"],
        classes=entry["classes"],
        step=int(content.get("global_step", 0)),
    )


def load_part(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    """Load one child strictly: a missing, unexpected or ill-shaped tensor is a UserError."""
    tensors = checkpoint.part(prefix)
    expected = module.state_dict()
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    shapes = [
        f"{key}: {tuple(tensors[key].shape)} in the file, {tuple(expected[key].shape)} in the model"
        for key in expected
        if key in tensors and tensors[key].shape != expected[key].shape
    ]
    if missing or unexpected or shapes:
        raise UserError(
            f"{checkpoint.path} is of another {prefix} than the config describes: "
            f"missing {missing[:4]}, unexpected {unexpected[:4]}, of another shape {shapes[:4]}"
        )
    module.load_state_dict(tensors)


def initialise_backbone(backbone: VisionTransformer, path: str | Path) -> TransferReport:
    """Start a backbone from the weights of another run; returns what was and was not carried over.

    Bias tables and position embeddings are resized to the new grid, a shared table is copied into
    each block. Raises UserError where the architectures do not fit.
    """
    checkpoint = read_checkpoint(path)
    tensors, report = adapt_backbone(checkpoint.part("backbone"), backbone)
    backbone.load_state_dict(tensors, strict=False)
    return report
