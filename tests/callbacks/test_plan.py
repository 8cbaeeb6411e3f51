"""What a run that reached its end says of itself; each fault is put in and found."""

import logging

import lightning as L
import pytest
from PIL import Image
from torch import nn

from beit.callbacks.plan import OffPlan, PlanCheck, conclude
from beit.checkpoints.keeper import CheckpointKeeper
from beit.checkpoints.plugin import CheckpointFiles
from beit.data.loading import LoaderSettings
from beit.data.modules import TokenizerData
from beit.data.sampler import GlobalBatchSampler
from beit.data.views import PixelTransform
from beit.job.exits import Exit
from beit.optim.recipe import AdamWRecipe
from beit.tasks.planning import configure_adamw

EPOCHS = 3


class Pictures:
    classes = labels = None

    def __len__(self):
        return 27

    def load(self, index):
        return Image.new("RGB", (12, 8), (index, 0, 0)), None

    def name(self, index):
        return str(index)


class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.tokenizer = nn.Linear(2, 2)
        self.optim = AdamWRecipe(lr=1e-2, min_lr=1e-4, weight_decay=0.1, warmup_steps=2)

    def training_step(self, batch, batch_idx):
        return self.tokenizer.weight.sum() * batch.images.mean()

    def configure_optimizers(self):
        return configure_adamw(self, self.optim, tokenizer=self.tokenizer)


def train(folder, *, callbacks=(), resume=None, last_batch="drop", **options):
    loader = LoaderSettings(
        global_batch_size=8, batch_size_per_device=4, num_workers=0, seed=5, check_images=0,
        last_batch=last_batch,
    )  # fmt: skip
    data = TokenizerData(Pictures(), None, views=PixelTransform(image_size=(8, 12)), loader=loader)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, accumulate_grad_batches=2, logger=False,
        callbacks=[*callbacks, PlanCheck(), CheckpointKeeper(folder, every_n_steps=1, keep=-1)],
        plugins=[CheckpointFiles()], enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(Task(), datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "as planned: 9 of 9 optimizer steps, 72 images, learning rate 0.0001 at the end"),
        ({"last_batch": "keep"}, "12 of 12 optimizer steps, 81 images, learning rate 0.0001"),
        ({"limit_train_batches": 3}, "6 of 6 optimizer steps, 36 images, learning rate 0.0001"),
        ({"max_steps": 4}, "as planned: 4 of 4 optimizer steps, 32 images"),
    ],
)
def test_a_run_as_planned_says_so(tmp_path, caplog, options, expected):
    caplog.set_level(logging.INFO, logger="beit")
    conclude(train(tmp_path, **options))
    assert expected in caplog.text


def test_a_resumed_run_counts_what_was_left(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="beit")
    train(tmp_path / "whole")
    file = next((tmp_path / "whole").glob("*step0000005.safetensors"))
    conclude(train(tmp_path / "resumed", resume=file))
    assert "9 of 9 optimizer steps, 32 images since step 5, learning rate" in caplog.text
    assert "must have changed" not in caplog.text


class Stop(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 4


class OtherRate(L.Callback):
    def on_train_end(self, trainer, *_):
        trainer.optimizers[0].param_groups[0]["lr"] *= 1.001


def test_a_run_that_is_stopped_early_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="beit")
    conclude(train(tmp_path, callbacks=[Stop()]))
    assert "stopped early: 4 of 9 optimizer steps, 32 images, learning rate" in caplog.text


def test_a_sample_that_is_left_out_is_found(tmp_path, monkeypatch):
    whole = GlobalBatchSampler._batches

    def short(self, epoch, start):
        for i, batch in enumerate(whole(self, epoch, start)):
            yield batch[:-1] if (epoch, i) == (1, 2) else batch

    monkeypatch.setattr(GlobalBatchSampler, "_batches", short)
    with pytest.raises(OffPlan, match="71 images where 72 were planned") as raised:
        conclude(train(tmp_path))
    assert raised.value.code == Exit.FAULT


def test_another_learning_rate_is_found(tmp_path):
    with pytest.raises(OffPlan, match=r"0.0001001 final learning rate where 0.0001 were planned"):
        conclude(train(tmp_path, callbacks=[OtherRate()]))


def test_a_skipped_epoch_is_found(tmp_path, caplog):
    train(tmp_path / "whole")
    file = next((tmp_path / "whole").glob("*step0000003.safetensors"))

    class Skips(L.Callback):
        def on_train_start(self, trainer, *_):
            trainer.fit_loop.epoch_progress.current.processed += 1
            trainer.fit_loop.epoch_progress.current.started += 1

    with pytest.raises(OffPlan, match="6 optimizer steps where 9 were planned; 24 images where 48"):
        conclude(train(tmp_path / "resumed", resume=file, callbacks=[Skips()]))
    assert "what an epoch is must have changed" in caplog.text


def test_nothing_is_said_of_a_run_that_never_trained(caplog):
    caplog.set_level(logging.INFO, logger="beit")
    PlanCheck().conclude()
    assert not caplog.records
