"""Writes into each checkpoint what is needed to use it alone: the config and the class names."""

from typing import Any

import lightning as L

from beit.checkpoint import record


class ConfigRecord(L.Callback):
    """Adds the entry `beit` to every checkpoint: plain data, loadable with `weights_only=True`."""

    def __init__(self, config: dict[str, Any], composed: dict[str, Any]) -> None:
        self.config = config
        self.composed = composed

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        classes = getattr(trainer.datamodule, "classes", None)
        checkpoint["beit"] = record(self.config, self.composed, classes)
