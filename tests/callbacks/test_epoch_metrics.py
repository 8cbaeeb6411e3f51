"""A cut epoch's training metrics are those of the uninterrupted run."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric

from beit.callbacks.epoch_metrics import EpochMetrics
from beit.checkpoints.file import read_file
from beit.checkpoints.keeper import CheckpointKeeper
from beit.checkpoints.plugin import CheckpointFiles
from beit.data.loading import resume_position

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BATCHES, EPOCHS = 5, 3
VALUES = torch.randn(BATCHES, 1, generator=torch.Generator().manual_seed(0)).exp()


class Batches:
    """Begins where a resumed run goes on, as ours do."""

    def __init__(self, start):
        self.start = start

    def __len__(self):
        return BATCHES

    def __iter__(self):
        start, self.start = self.start, 0
        yield from VALUES[start:]


class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.mean, self.all, self.val_mean = MeanMetric(), CatMetric(), MeanMetric()
        self.ended = {}

    def training_step(self, batch, batch_idx):
        loss = (self.weight * batch).sum()
        for reduction in ("mean", "sum", "min", "max"):
            name = f"train/{reduction}"
            self.log(name, loss, on_step=True, on_epoch=True, reduce_fx=reduction, sync_dist=True)
        self.log("train/own", loss, on_epoch=True)
        self.mean.update(loss, weight=1 + batch_idx)
        self.all.update(loss)
        self.log("train/metric", self.mean, on_epoch=True)
        return loss

    def train_dataloader(self):
        return Batches(resume_position(self.trainer, BATCHES)[1])

    def on_train_epoch_end(self):
        self.ended[self.current_epoch, "all"] = self.all.compute().tolist()
        self.log("train/count", float(len(self.ended[self.current_epoch, "all"])))
        self.all.reset()

    def validation_step(self, batch, batch_idx):
        self.val_mean.update(batch)
        self.log("val/mean", self.val_mean)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Epochs(L.Callback):
    """What the loggers are given at the end of each epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        self._keep(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self._keep(trainer, pl_module)

    def _keep(self, trainer, pl_module):
        for name, value in trainer.logged_metrics.items():
            if not name.endswith("_step"):
                pl_module.ended[trainer.current_epoch, name] = float(value)


def fit(folder, *, resume=None, carry=True, stop=None, **options):
    keeper = CheckpointKeeper(folder, every_n_epochs=0, every_n_steps=1, keep=-1)
    callbacks = [*([EpochMetrics()] if carry else []), *([stop] if stop else []), Epochs(), keeper]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, callbacks=callbacks, plugins=[CheckpointFiles()],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    task = Task()
    trainer.fit(task, val_dataloaders=DataLoader(VALUES[:2]), ckpt_path=resume)
    return task.ended


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 9}, {"val_check_interval": 2}])
def test_an_epoch_cut_anywhere(tmp_path, options):
    whole = fit(tmp_path / "whole", **options)
    names = {name for _, name in whole}
    assert {"train/mean_epoch", "train/own_epoch", "train/metric_epoch", "all"} <= names
    for step in (2, 5, 8, 10, 14):  # within epochs and at their ends
        path = next((tmp_path / "whole").glob(f"epoch*-step{step:07d}.safetensors"))
        torch.manual_seed(0)
        resumed = fit(tmp_path / f"from{step}", resume=path, **options)
        assert len(resumed) >= 7
        assert resumed == {key: whole[key] for key in resumed}, step


def test_without_it_they_are_not(tmp_path):
    whole = fit(tmp_path, carry=False)
    resumed = fit(
        tmp_path / "b", carry=False, resume=tmp_path / "epoch0001-step0000007.safetensors"
    )
    assert resumed != {key: whole[key] for key in resumed}


def test_of_a_validation_under_way_nothing_is_carried(tmp_path):
    class Save(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert pl_module.val_mean.update_called
            trainer.checkpoint_callback.save_now(trainer)

    fit(tmp_path, stop=Save(), max_steps=3, val_check_interval=2)
    found = read_file(tmp_path / "epoch0000-step0000002.safetensors")["epoch_metrics"]
    assert set(found["metrics"]) == {"mean", "all"}
    assert found["metrics"]["all"]["value"][0].numel() == 1
    assert set(found["logged"]) == {
        f"training_step.train/{name}" for name in ("mean", "sum", "min", "max", "own", "metric")
    }
