"""A tiny masked-image task on 24x40 images with patches of 8: grid 3x5, vocabulary 13."""

from typing import NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from beit.checkpoints.plugin import CheckpointFiles
from beit.data.batches import MIMBatch

H, W, PATCH, GRID, VOCAB, BATCH = 24, 40, 8, (3, 5), 13, 7


class PaletteTokenizer(nn.Module):
    """Token i decodes to a patch of 4x4 pixels of value i / (V - 1) in every channel."""

    vocab_size, stride, value_range = VOCAB, 4, (-1.0, 1.0)

    def encode(self, images: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), self.stride)[:, 0]
        return ((means + 1) / 2 * (VOCAB - 1)).round().long()

    def decode(self, token_ids: Tensor) -> Tensor:
        values = token_ids.float() / (VOCAB - 1)
        big = values.repeat_interleave(self.stride, 1).repeat_interleave(self.stride, 2)
        return big[:, None].expand(-1, 3, -1, -1)


class Task(L.LightningModule):
    """Linear, with dropout so that a disturbed random generator shows in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.net = nn.Linear(3 * PATCH * PATCH, VOCAB)
        self.tokenizer = PaletteTokenizer()

    def logits(self, images: Tensor, mask: Tensor) -> Tensor:
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)
        return self.net(self.dropout(patches.masked_fill(mask[..., None], 0.0)))

    def predict_tokens(self, images: Tensor, mask: Tensor) -> Tensor:
        torch.rand(1)  # a careless task: it draws from the global generator
        return self.logits(images, mask).argmax(dim=-1)

    def training_step(self, batch: MIMBatch, batch_idx: int) -> Tensor:
        logits = self.logits(batch.images, batch.mask)
        loss = nn.functional.cross_entropy(logits.flatten(0, 2), batch.token_ids.flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: MIMBatch, batch_idx: int) -> None:
        self.log("val/loss", float(batch_idx + 1), batch_size=BATCH)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [{"params": [self.net.weight]}, {"params": [self.net.bias], "lr": 0.05}], lr=0.2
        )


class Data(L.LightningDataModule):
    """Batches drawn once; images are in [-1, 1]."""

    def __init__(self, num_batches: int = 4, *, validate: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.tokenizer = PaletteTokenizer()
        self.batches = [self._draw(generator) for _ in range(num_batches)]
        self.val_batches = [self._draw(generator) for _ in range(2 if validate else 0)]

    @staticmethod
    def _draw(generator: torch.Generator) -> MIMBatch:
        return MIMBatch(
            torch.rand(BATCH, 3, H, W, generator=generator) * 2 - 1,
            torch.rand(BATCH, *GRID, generator=generator) < 0.4,
            torch.randint(VOCAB, (BATCH, *GRID), generator=generator),
            torch.arange(BATCH),
        )

    def denormalize(self, images: Tensor) -> Tensor:
        return (images + 1) / 2

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self) -> DataLoader | list:
        return DataLoader(self.val_batches, batch_size=None) if self.val_batches else []


class Kit(NamedTuple):
    Task: type[Task]
    Data: type[Data]
    PaletteTokenizer: type[PaletteTokenizer]


@pytest.fixture
def kit() -> Kit:
    return Kit(Task, Data, PaletteTokenizer)


@pytest.fixture
def fit(tmp_path):
    """Train with the given callbacks and trainer arguments; returns (task, trainer)."""

    def run(*, callbacks, task=None, data=None, logger=False, resume=None, **arguments):
        torch.manual_seed(1)
        task = task or Task()
        trainer = L.Trainer(
            **{
                "max_epochs": 2,
                "accelerator": "cpu",
                "devices": 1,
                "logger": logger,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": any(
                    isinstance(callback, L.pytorch.callbacks.Checkpoint) for callback in callbacks
                ),
                "default_root_dir": tmp_path,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "log_every_n_steps": 1,
                "callbacks": list(callbacks),
                "plugins": [CheckpointFiles()],
                **arguments,
            }
        )
        trainer.fit(task, datamodule=data or Data(), ckpt_path=resume, weights_only=True)
        return task, trainer

    return run
