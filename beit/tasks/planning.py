"""How many optimizer steps a run has, and the optimizer that is planned on it.

Worked out from the data and the config: asking Lightning for `estimated_stepping_batches` makes
2.6 drop the saved loader state on resume without a word.
"""

from typing import Any

import lightning as L
from torch import nn

from beit.optim.recipe import AdamWRecipe


def planned_steps(trainer: L.Trainer) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the whole run)."""
    steps_per_epoch = trainer.datamodule.steps_per_epoch(
        world_size=trainer.world_size, accumulate=trainer.accumulate_grad_batches
    )
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(steps_per_epoch * trainer.max_epochs)
    if trainer.max_steps > 0:
        limits.append(trainer.max_steps)
    return steps_per_epoch, min(limits)


def configure_adamw(task: L.LightningModule, recipe: AdamWRecipe, **modules: nn.Module) -> Any:
    """What `configure_optimizers` returns: AdamW, and its schedule taken once per step."""
    steps_per_epoch, total_steps = planned_steps(task.trainer)
    depth = max(getattr(module, "depth", 0) for module in modules.values())
    optimizer, schedule = recipe.build(
        modules, steps_per_epoch=steps_per_epoch, total_steps=total_steps, depth=depth
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
    }
