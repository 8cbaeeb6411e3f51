"""Checkpoints as far as models are concerned: what they hold, and how weights pass on."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from beit.checkpoints.errors import DamagedCheckpoint
from beit.checkpoints.file import CheckpointFile
from beit.checkpoints.header import Entry
from beit.errors import UserError
from beit.files import local_path
from beit.interop.fields import Fields
from beit.models.transfer import TransferReport, adapt_backbone
from beit.models.vit import VisionTransformer
from beit.sizes import patch_grid

log = logging.getLogger(__name__)

_WEIGHTS = "state_dict"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file of a run. Tensors are read, and verified, when they are asked for."""

    path: str
    config: dict[str, Any]  # the run's config, every interpolation resolved
    composed: dict[str, Any]  # the same with its interpolations, so that a change reaches all
    classes: list[str] | None  # class names, where the run had labels
    entry: dict[str, Any]  # all that the run recorded of itself, these three included
    stored: dict[str, Entry]  # where the weights lie: `backbone.*` and `head.*`, or `tokenizer.*`
    _names: dict[str, str]  # the weights' names in the file
    _read: Callable[[list[str]], dict[str, Tensor]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights; no tensor is read for this."""
        return {key: entry.shape for key, entry in self.stored.items()}

    @functools.cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """All weights. Raises DamagedCheckpoint, a UserError."""
        return self.tensors(list(self.stored))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one child, `backbone` say, under the child's own names.

        Nothing else is read. Raises UserError where there are none, or where they are damaged.
        """
        start = f"{prefix}."
        keys = [key for key in self.stored if key.startswith(start)]
        if not keys:
            children = sorted({key.split(".")[0] for key in self.stored})
            raise UserError(f"{self.path} has no {prefix}: it holds {', '.join(children)}")
        return {key[len(start) :]: value for key, value in self.tensors(keys).items()}

    def tensors(self, keys: list[str]) -> dict[str, Tensor]:
        """These weights and no others. Raises DamagedCheckpoint, a UserError."""
        found = self._read([self._names[key] for key in keys])
        return {key: found[self._names[key]] for key in keys}


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of ours: the weights follow when they are asked for.

    Raises UserError where the file is missing, is damaged, may hold code, or is not one of ours.
    """
    path = local_path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: the path must name a file that exists")
    return as_checkpoint(CheckpointFile.open(path))


def as_checkpoint(file: CheckpointFile) -> Checkpoint:
    """The same of a file that is open. Raises UserError where it is of something else."""
    tree = file.tree(lambda name: (name, file.entries[name]))
    entry = tree.get("beit") if isinstance(tree, dict) else None
    if not isinstance(entry, dict) or _WEIGHTS not in tree:
        keys = list(tree)[:5] if isinstance(tree, dict) else type(tree).__name__
        raise UserError(
            f"{file.path} is not a checkpoint of a run: expected the entries 'state_dict' and "
            f"'beit', found {keys}"
        )
    try:
        return Checkpoint(
            path=str(file.path),
            config=entry["config"],
            composed=entry["composed"],
            classes=entry["classes"],
            entry=entry,
            stored={key: found for key, (_, found) in tree[_WEIGHTS].items()},
            _names={key: name for key, (name, _) in tree[_WEIGHTS].items()},
            _read=file.read,
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{file.path} is not a checkpoint of a run: its record is incomplete ({error})"
        ) from error


def load_part(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    """Load one child strictly: a missing, unexpected or ill-shaped tensor is a UserError.

    The positions of a backbone for images of another size are resized to its grid.
    """
    tensors = checkpoint.part(prefix)
    if isinstance(module, VisionTransformer):
        grid = _grid_of(checkpoint)
        if grid not in (None, module.grid):
            resized, report = adapt_backbone(tensors, module, source_grid=grid)
            tensors |= resized
            told = *grid, *module.grid, len(report.resized)
            log.info("positions resized from %dx%d to %dx%d patches (%d tensors)", *told)
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
    """Start a task from the weights of another run, or of another library's file or folder.

    Returns what was and was not carried over.

    Of the backbone everything: bias tables and position embeddings are resized to the new grid, a
    shared table is copied into each block. Of the rest (heads, their norms) what has the same name
    and shape, as the released code does. The report names the tensors as the checkpoint does.

    Raises:
        UserError: the architectures differ, in sizes or in parts (LayerScale, positions).
    """
    from beit.interop.convert import any_checkpoint  # which builds on this module

    checkpoint = any_checkpoint(path, tell="remarks", config=False)
    backbone = task.get_submodule("backbone")
    tensors, report = adapt_backbone(
        checkpoint.part("backbone"),
        backbone,  # type: ignore[arg-type]
        source_grid=_grid_of(checkpoint),
    )
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


def _grid_of(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Patch grid (h, w) of the weights: their number of positions alone fits (w, h) as well."""
    node = Fields(checkpoint.config, checkpoint.path).inner("task").inner("backbone")
    if "image_size" not in node or "patch_size" not in node:
        return None
    return patch_grid(node.size("image_size"), node.whole("patch_size"))


def _carry_heads(task: nn.Module, checkpoint: Checkpoint, report: TransferReport) -> None:
    ours = {k: v for k, v in task.state_dict().items() if not k.startswith("backbone.")}
    theirs = {k: v for k, v in checkpoint.shapes.items() if not k.startswith("backbone.")}
    fitting = [k for k, shape in theirs.items() if k in ours and shape == tuple(ours[k].shape)]
    task.load_state_dict(checkpoint.tensors(fitting), strict=False)
    report.loaded += fitting
    report.unexpected += [key for key in theirs if key not in fitting]
    report.missing += [key for key in ours if key not in fitting]
