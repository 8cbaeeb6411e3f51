"""What a checkpoint says about the run that wrote it, so that it can be used alone and told apart.

The entry `beit`: plain data, small, the same in every checkpoint of a run but for `progress`.
"""

import secrets
from typing import Any

import lightning as L

from beit import __version__
from beit.checkpoints.header import SCHEMA


class RunRecord(L.Callback):
    """Adds the entry `beit` to every checkpoint.

    Args:
        config: the resolved config.
        composed: the same with its interpolations.
        run_id: of the run, kept through every resume.
        data: fingerprint of the training data, see `beit.data.fingerprint`.
        environment: versions, machine and commit.
        global_batch_size: images of an optimizer step.
    """

    def __init__(
        self,
        config: dict[str, Any],
        composed: dict[str, Any],
        *,
        run_id: str,
        data: dict[str, Any],
        environment: dict[str, Any],
        global_batch_size: int,
    ) -> None:
        self.run_id = run_id
        self.global_batch_size = global_batch_size
        self.entry = {
            "schema": SCHEMA,
            "version": __version__,
            "run_id": run_id,
            "config": config,
            "composed": composed,
            "data": data,
            "environment": environment,
        }

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["beit"] = {
            **self.entry,
            "classes": getattr(trainer.datamodule, "classes", None),
            "palette": _palette(trainer.datamodule),
            "progress": {
                "steps": trainer.global_step,
                # a step of fewer images, at the end of an epoch that keeps them, counts as a whole
                "samples": trainer.global_step * self.global_batch_size,
                "world_size": trainer.world_size,
                "accumulate": trainer.accumulate_grad_batches,
            },
        }


def _palette(data: Any) -> list[list[int]] | None:
    """The colours [red, green, blue] of the classes, where they have some."""
    palette = getattr(data, "palette", None)
    return None if palette is None else [[int(value) for value in colour] for colour in palette]


def new_run_id() -> str:
    return secrets.token_hex(8)


def run_id_of(trainer: L.Trainer) -> str:
    """The run's id, "" where no record is kept."""
    callbacks: list[L.Callback] = trainer.callbacks
    return next((c.run_id for c in callbacks if isinstance(c, RunRecord)), "")
