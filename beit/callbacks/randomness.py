"""Dropout and stochastic depth as a function of (seed, epoch, micro-batch, rank)."""

from typing import Any

import lightning as L
import torch

from beit.data.randomness import sample_key


class KeyedRandomness(L.Callback):
    """Seeds torch before each training batch, so that a resumed run drops what the whole run drops.

    Each rank has draws of its own. Samples, masks and mixing have their own keys (`beit.data`).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        position = batch_idx * trainer.world_size + trainer.global_rank
        key = sample_key(self.seed, trainer.current_epoch, position, "dropout")
        torch.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
