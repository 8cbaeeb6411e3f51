"""The network's own randomness as a function of keys, so that nothing of it has to be stored."""

from typing import Any

import lightning as L
import torch

from beit.data.randomness import sample_key
from beit.models.drop_path import sample_keys


class KeyedRandomness(L.Callback):
    """Before each training batch: stochastic depth gets its keys, and torch its seed.

    A resumed run thus drops what the uninterrupted one drops. What depends on what:

    - stochastic depth: (seed, epoch, index of the sample), and so neither on the ranks nor on the
      accumulation that a global batch is spread over;
    - dropout: (seed, epoch, micro-batch, rank). Spread otherwise, the same batch drops otherwise.

    Samples, masks, mixing and the tokenizer's noise have keys of their own (`beit.data`,
    `beit.tasks`). Mixing pairs the images of a micro-batch, and the dVAE's batch norm and balance
    are of one: like dropout these follow the way in which a global batch is spread.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        epoch = trainer.current_epoch
        position = batch_idx * trainer.world_size + trainer.global_rank
        key = sample_key(self.seed, epoch, position, "dropout")
        torch.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
        backbone: Any = getattr(pl_module, "backbone", None)
        if hasattr(backbone, "sample_keys"):
            key = sample_key(self.seed, epoch, 0, "drop_path")
            backbone.sample_keys = sample_keys(key, batch.indices)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        backbone: Any = getattr(pl_module, "backbone", None)
        if hasattr(backbone, "sample_keys"):
            backbone.sample_keys = None  # of this batch alone
