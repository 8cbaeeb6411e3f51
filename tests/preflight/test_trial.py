"""A trial step of a network of two layers, one of which does nothing."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from beit.preflight import trial


class Half(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.used, self.forgotten = nn.Linear(5, 3), nn.Linear(5, 3)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return (self.used(batch) + self.frozen(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Noise(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.randn(28, 5), batch_size=7)


TRAINER = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def test_a_step_tells_what_gets_no_gradient_and_what_it_costs():
    found = trial.examine(Half(), Noise(), TRAINER, images=7)
    assert found.unused == ["forgotten.weight", "forgotten.bias"]
    # forward twice; backward of the weights alone, as noise wants no gradient
    assert found.flop == 3 * 2 * 5 * 3


def test_time_is_of_so_many_steps(monkeypatch):
    steps = []
    monkeypatch.setattr(Half, "on_train_batch_start", lambda self, *_: steps.append(1))
    assert 0 < trial.seconds_per_batch(Half(), Noise(), TRAINER, steps=2) < 60
    assert len(steps) == 3
