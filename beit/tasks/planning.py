"""How many optimizer steps a run has, and the optimizer that is planned on it.

Worked out from the data and the config: asking Lightning for `estimated_stepping_batches` makes
2.6 drop the saved loader state on resume without a word.
"""

import math
from typing import Any

import lightning as L
from torch import nn

from beit.data.sampler import limited
from beit.optim.recipe import AdamWRecipe


def planned_steps(trainer: L.Trainer) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the whole run)."""
    accumulate = trainer.accumulate_grad_batches
    spread = {"world_size": trainer.world_size, "accumulate": accumulate}
    # Lightning turns a limit that was not given into 1.0, the whole
    return plan(
        trainer.datamodule.micro_batches(**spread),
        accumulate=accumulate,
        limit=trainer.limit_train_batches,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
    )


def plan(
    micro_batches: int,
    *,
    accumulate: int,
    limit: float | int | None,
    max_epochs: int | None,
    max_steps: int,
) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the whole run) of a Trainer with these limits.

    Args:
        micro_batches: training batches of each rank in an epoch of all the data.
        limit: Trainer's `limit_train_batches`: micro-batches, or a share in [0, 1].
        max_epochs, max_steps: -1 is no limit, and max_epochs None neither.
    """
    # Lightning also steps on the last micro-batch of an epoch, though the window be incomplete
    epoch = math.ceil(limited(micro_batches, limit) / accumulate)
    limits = [max_steps] if max_steps > 0 else []
    if max_epochs is not None and max_epochs > 0:
        limits.append(epoch * max_epochs)
    assert limits, "the config asks for one of the two"
    return epoch, min(limits)


def configure_adamw(task: L.LightningModule, recipe: AdamWRecipe, **modules: nn.Module) -> Any:
    """What `configure_optimizers` returns: AdamW, and its schedule taken once per step."""
    steps_per_epoch, total = planned_steps(task.trainer)
    depth = max(getattr(module, "depth", 0) for module in modules.values())
    optimizer, schedule = recipe.build(
        modules, steps_per_epoch=steps_per_epoch, total_steps=total, depth=depth
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
    }
