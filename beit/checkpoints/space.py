"""Whether the disk can hold the checkpoints of a run, known before its first step."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim import Optimizer

from beit.checkpoints.errors import NoSpace


def check_space(trainer: L.Trainer, folder: Path, present: Sequence[Path], *, files: int) -> None:
    """Raises NoSpace where `files` checkpoints, and one more while it is written, do not fit.

    Args:
        present: files of this run, whose space will be used again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = [path.stat() for path in present]
    again = {(fact.st_dev, fact.st_ino): fact.st_size for fact in facts}  # the best has two names
    needed = checkpoint_size(trainer) * (files + 1) - sum(again.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpace(folder, needed, free)


def checkpoint_size(trainer: L.Trainer) -> int:
    """Bytes of a checkpoint's tensors: weights, and what the optimizer will hold for each."""
    module = trainer.lightning_module
    size = sum(_bytes(value) for value in module.state_dict().values())
    if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
        size *= 2
    return size + sum(_optimizer_size(optimizer) for optimizer in trainer.optimizers)


def _optimizer_size(optimizer: Optimizer) -> int:
    moments = _moments(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return moments * sum(_bytes(p) for p in parameters if p.requires_grad)


def _moments(optimizer: Optimizer) -> int:
    """Tensors of a parameter's size that the optimizer keeps: two for Adam, one for momentum."""
    defaults = optimizer.defaults
    if "betas" in defaults:
        return 2 + bool(defaults.get("amsgrad"))
    return int(bool(defaults.get("momentum")))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
