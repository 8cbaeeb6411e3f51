"""Checkpoints as plain data: what they hold, how they are read, how weights pass on.

A checkpoint is Lightning's file with one more entry, `beit`: the resolved config as plain dicts,
the version, and the class names. It loads with `weights_only=True`, so reading one runs no code.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit import __version__
from beit.errors import UserError
from beit.models.transfer import TransferReport, adapt_backbone


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds, as far as models are concerned."""

    path: str
    state_dict: dict[str, Tensor]  # `backbone.*` and `head.*`, or `tokenizer.*`
    config: dict[str, Any]  # the run's config, every interpolation resolved
    composed: dict[str, Any]  # the same with its interpolations, so that a change reaches all
    classes: list[str] | None  # class names, where the run had labels

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one child, `backbone` say, under the child's own names."""
        start = f"{prefix}."
        found = {k[len(start) :]: v for k, v in self.state_dict.items() if k.startswith(start)}
        if not found:
            children = sorted({key.split(".")[0] for key in self.state_dict})
            raise UserError(f"{self.path} has no {prefix}: it holds {', '.join(children)}")
        return found


def record(
    config: dict[str, Any], composed: dict[str, Any], classes: list[str] | None
) -> dict[str, Any]:
    """The entry `beit` of a checkpoint."""
    return {"version": __version__, "config": config, "composed": composed, "classes": classes}


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
        composed=entry.get("composed", entry["config"]),
        classes=entry["classes"],
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


# what the next stage is known to lack or to make anew; anything else is another architecture
_STAGE_BOUND = ("mask_token", "norm.", "rel_pos_bias.")


def initialise(task: nn.Module, path: str | Path) -> TransferReport:
    """Start a task from the weights of another run; returns what was and was not carried over.

    Of the backbone everything: bias tables and position embeddings are resized to the new grid, a
    shared table is copied into each block. Of the rest (heads, their norms) what has the same name
    and shape, as the released code does. The report names the tensors as the checkpoint does.

    Raises:
        UserError: the architectures differ, in sizes or in parts (LayerScale, positions).
    """
    checkpoint = read_checkpoint(path)
    backbone = task.get_submodule("backbone")
    tensors, report = adapt_backbone(checkpoint.part("backbone"), backbone)  # type: ignore[arg-type]
    for side, keys in (("the checkpoint", report.unexpected), ("the model", report.missing)):
        strange = [key for key in keys if not key.startswith(_STAGE_BOUND)]
        if strange:
            raise UserError(
                f"{path} is of another architecture: only {side} has {', '.join(strange[:4])}; "
                "build the model with the same positions and LayerScale"
            )
    backbone.load_state_dict(tensors, strict=False)
    _carry_heads(task, checkpoint, report)
    return report


def _carry_heads(task: nn.Module, checkpoint: Checkpoint, report: TransferReport) -> None:
    ours = {k: v for k, v in task.state_dict().items() if not k.startswith("backbone.")}
    theirs = {k: v for k, v in checkpoint.state_dict.items() if not k.startswith("backbone.")}
    fitting = {k: v for k, v in theirs.items() if k in ours and v.shape == ours[k].shape}
    task.load_state_dict(fitting, strict=False)
    report.loaded += fitting
    report.unexpected += [key for key in theirs if key not in fitting]
    report.missing += [key for key in ours if key not in fitting]


def check_resumable(task: nn.Module, path: str | Path, config: dict[str, Any]) -> list[str]:
    """Whether a run can go on from a checkpoint; returns the keys of the config that differ.

    Raises UserError where it is of another task or of a network of other shapes.
    """
    checkpoint = read_checkpoint(path)
    theirs, ours = checkpoint.config.get("task_name"), config["task_name"]
    if theirs != ours:
        raise UserError(
            f"resume={path}: that is a run of task {theirs}, this one is of task {ours}; to start "
            "from its weights say init_from"
        )
    shapes = {key: tuple(value.shape) for key, value in checkpoint.state_dict.items()}
    for key, value in task.state_dict().items():
        if shapes.pop(key, None) != tuple(value.shape):
            raise UserError(
                f"resume={path}: {key} has another shape there than {tuple(value.shape)}; a run "
                "goes on with the network it began with"
            )
    if shapes:
        raise UserError(f"resume={path}: the network has no {', '.join(list(shapes)[:4])}")
    return differing(checkpoint.config, config)


def differing(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two plain configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            found += differing(old.get(key), new.get(key), f"{prefix}{key}.")
        return found
    return [] if old == new else [f"{prefix[:-1]}: {old} -> {new}"]
