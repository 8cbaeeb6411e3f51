"""A run that is killed and goes on sees the samples, pixels and masks of one that was not."""

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn

from beit.data.batches import PixelBatch
from beit.data.loading import LoaderSettings
from beit.data.modules import TokenizerData
from beit.data.views import PixelTransform

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    # not so: the loader reads its position from Lightning's own counters
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
EPOCHS, BATCH, ACCUMULATE = 3, 4, 2
MICRO_BATCHES = 6  # an epoch: 27 // (4 * 2) = 3 steps of 2


class Pictures:
    """27 noise images."""

    classes = labels = None

    def __len__(self):
        return 27

    def load(self, index):
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)), None

    def name(self, index):
        return f"picture {index}"


class Log(L.LightningModule):
    """Writes a line for each micro-batch: its number, its samples, a hash of its pixels."""

    def __init__(self, path, kill_at=-1):
        super().__init__()
        self.path, self.kill_at = path, kill_at
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: PixelBatch, batch_idx):
        number = self.current_epoch * MICRO_BATCHES + batch_idx
        if number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        pixels = hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()[:12]
        with open(self.path, "a") as file:
            file.write(f"{number} {batch.indices.tolist()} {pixels}\n")
        return self.weight * batch.images.mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder, *, workers=0, resume=None, kill_at=-1, validate=False, **checkpoint):
    torch.set_num_threads(1)
    loader = LoaderSettings(
        global_batch_size=BATCH * ACCUMULATE, batch_size_per_device=BATCH, num_workers=workers,
        seed=5, timeout_seconds=60.0, check_images=0,
    )  # fmt: skip
    views = PixelTransform(image_size=(8, 12))
    data = TokenizerData(Pictures(), Pictures() if validate else None, views=views, loader=loader)
    keep = ModelCheckpoint(
        dirpath=folder, filename="{step}", save_top_k=-1, save_last=True, **checkpoint
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, accumulate_grad_batches=ACCUMULATE, callbacks=[keep],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Log(folder / "log", kill_at), datamodule=data, ckpt_path=resume, weights_only=True)


def in_a_child(folder, **options):
    """Exit code of a run in a process of its own; a fork, for imports take longer than the run."""
    child = multiprocessing.get_context("fork").Process(
        target=train, args=(folder,), kwargs=options
    )
    child.start()
    child.join()  # no timeout: that would wait for the workers that a killed run leaves
    return child.exitcode


def lines(folder):
    return (folder / "log").read_text().splitlines()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder, every_n_train_steps=1)
    assert len(lines(folder)) == EPOCHS * MICRO_BATCHES
    return folder


def test_no_two_epochs_are_alike(uninterrupted):
    batches = [line.split(" ", 1)[1] for line in lines(uninterrupted)]
    assert len(set(batches)) == len(batches)
    first = [line.split("[")[1].split("]")[0] for line in lines(uninterrupted)[:MICRO_BATCHES]]
    samples = ", ".join(first).split(", ")
    assert len(set(samples)) == MICRO_BATCHES * BATCH


@pytest.mark.parametrize("step", range(1, EPOCHS * MICRO_BATCHES // ACCUMULATE))
def test_going_on_from_any_step(uninterrupted, tmp_path, step):
    train(tmp_path, resume=uninterrupted / f"step={step}.ckpt", every_n_train_steps=1)
    assert lines(tmp_path) == lines(uninterrupted)[step * ACCUMULATE :]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_resumed_with_other_numbers_of_workers(uninterrupted, tmp_path, workers):
    code = in_a_child(tmp_path, workers=workers, kill_at=9, every_n_train_steps=1)
    assert code == -signal.SIGKILL
    assert lines(tmp_path) == lines(uninterrupted)[:9]
    (tmp_path / "log").unlink()
    options = {"workers": 2 - workers, "resume": tmp_path / "last.ckpt", "every_n_train_steps": 1}
    assert in_a_child(tmp_path, **options) == 0
    assert lines(tmp_path) == lines(uninterrupted)[8:]  # from the last whole step


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("validate", [False, True])
def test_killed_after_an_epochs_checkpoint(uninterrupted, tmp_path, workers, validate):
    options = {"every_n_epochs": 1, "save_on_train_epoch_end": True, "validate": validate}
    code = in_a_child(tmp_path, workers=workers, kill_at=MICRO_BATCHES + 3, **options)
    assert code == -signal.SIGKILL
    (tmp_path / "log").unlink()
    resume = tmp_path / "last.ckpt"
    assert in_a_child(tmp_path, workers=workers, resume=resume, **options) == 0
    assert lines(tmp_path) == lines(uninterrupted)[MICRO_BATCHES:]


def test_saved_after_validation(uninterrupted, tmp_path):
    options = {"every_n_epochs": 1, "save_on_train_epoch_end": False, "validate": True}
    assert in_a_child(tmp_path, kill_at=MICRO_BATCHES + 3, **options) == -signal.SIGKILL
    (tmp_path / "log").unlink()
    assert in_a_child(tmp_path, resume=tmp_path / "last.ckpt", **options) == 0
    assert lines(tmp_path) == lines(uninterrupted)[MICRO_BATCHES:]


def test_checkpoints_hold_no_data(uninterrupted):
    assert Path(uninterrupted / "last.ckpt").stat().st_size < 20_000
