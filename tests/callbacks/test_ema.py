"""The average of the weights, as configured: its numbers, and what a checkpoint holds of it."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from beit import config
from beit.checkpoints.file import read_file
from beit.checkpoints.keeper import CheckpointKeeper
from beit.checkpoints.plugin import CheckpointFiles

DECAY, STEPS = 0.9999, 7
WORDS = ["task=mim", "data=digits", "tokenizer=dvae_tiny", "model=micro", "callbacks=[mim,ema]"]


class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("index", torch.arange(3000))  # as of relative positions
        self.register_buffer("large", torch.tensor([8106479329266893]))  # no float32 holds it
        self.register_buffer("running", torch.zeros(()))
        self.history = []

    def training_step(self, batch, batch_idx):
        self.running += 1.5
        return self.layer(batch).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.history.append(self.layer.weight.detach().clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder, node, task=None, **options):
    torch.manual_seed(0)
    task = task or Task()
    trainer = L.Trainer(
        accelerator="cpu", callbacks=[config.instantiate(node), CheckpointKeeper(folder)],
        plugins=[CheckpointFiles()], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit_loop.max_epochs = 1
    data = torch.randn(STEPS, 3, generator=torch.Generator().manual_seed(1))
    trainer.fit(task, DataLoader(data, batch_size=1), **options)
    return task


@pytest.fixture(scope="module")
def node():
    cfg = config.compose([*WORDS, "batch.global_size=8", "batch.per_device=8"])
    assert cfg.callbacks.checkpoints is not None  # beside the others
    return cfg.callbacks.ema


def test_average_in_the_checkpoint_is_the_closed_form(node, tmp_path):
    assert node.decay == DECAY
    task = train(tmp_path, node)
    file = read_file(tmp_path / "last.safetensors")
    average = task.history[0]
    for weight in task.history[1:]:
        average = DECAY * average + (1 - DECAY) * weight
    torch.testing.assert_close(file["state_dict"]["layer.weight"], average, rtol=0, atol=1e-7)
    assert torch.equal(file["current_model_state"]["layer.weight"], task.history[-1])
    assert not torch.equal(average, task.history[-1])
    assert file["averaging_state"]["n_averaged"] == STEPS
    # what is left in the task at the end is the average, which evaluate and predict then see
    torch.testing.assert_close(task.layer.weight.detach(), average, rtol=0, atol=1e-7)


@pytest.mark.parametrize("changes", [{}, {"use_buffers": True}])
def test_buffers_are_copied_and_not_averaged(node, tmp_path, changes):
    use_buffers = bool(changes)
    task = train(tmp_path, {**node, **changes})
    held = read_file(tmp_path / "last.safetensors")["state_dict"]
    intact = torch.equal(held["index"], torch.arange(3000)) and int(held["large"]) == int(
        Task().large
    )
    assert intact is not use_buffers  # Lightning's default cuts whole numbers
    assert (float(held["running"]) == 1.5 * STEPS) is not use_buffers
    assert torch.equal(task.index, held["index"])
