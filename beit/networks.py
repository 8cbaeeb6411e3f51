"""Networks of checkpoints, rebuilt from the file alone."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from beit import config
from beit.checkpoints.models import Checkpoint, load_part
from beit.interop.convert import any_checkpoint
from beit.security import targets


def load_model(path: str | Path) -> torch.nn.Module:
    """The network of a checkpoint, rebuilt from the file alone, in eval mode on the CPU.

    A whole task (backbone and head) where there is a backbone, else the tokenizer. Files of other
    libraries are read as checkpoints of the task that they are of.
    """
    task = network_of(any_checkpoint(path))
    network = task if hasattr(task, "backbone") else task.tokenizer
    return network.eval()


def network_of(checkpoint: Checkpoint, *, weights: bool = True) -> Any:
    """The task of a checkpoint, rebuilt from its config; without `weights` as a run begins it.

    Those are drawn from torch's generator.
    """
    targets.check_only(checkpoint.config.get("task"), targets.NETWORKS, "network")
    task = config.instantiate(checkpoint.config["task"])
    if weights:
        load_children(task, checkpoint)
    return task


def load_children(task: L.LightningModule, checkpoint: Checkpoint) -> None:
    """Load the weights of each network of a task; every one must fit."""
    for name, child in task.named_children():
        if child.state_dict():
            load_part(child, checkpoint, name)
