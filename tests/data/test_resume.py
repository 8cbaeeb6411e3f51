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
from PIL import Image
from torch import nn

from beit.checkpoints.keeper import CheckpointKeeper
from beit.checkpoints.plugin import CheckpointFiles
from beit.data.batches import PixelBatch
from beit.data.loading import LoaderSettings
from beit.data.modules import TokenizerData
from beit.data.views import PixelTransform

pytestmark = [
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
    """Writes a line for each micro-batch: its number, its samples, a hash of its pixels.

    And one for each validation and each end of an epoch. `kill_at` is the number of a micro-batch,
    or "validation E": the second batch of the validation of epoch E.
    """

    def __init__(self, path, kill_at=None):
        super().__init__()
        self.path, self.kill_at = path, kill_at
        self.weight = nn.Parameter(torch.ones(()))

    def write(self, line):
        with open(self.path, "a") as file:
            file.write(f"{line}\n")

    def training_step(self, batch: PixelBatch, batch_idx):
        number = self.current_epoch * self.trainer.num_training_batches + batch_idx
        if number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        pixels = hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()[:12]
        logged_at = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        weight = self.weight.item().hex()
        self.write(f"{number} {logged_at} {batch.indices.tolist()} {pixels} {weight}")
        return (self.weight * batch.images).square().mean()

    def validation_step(self, batch, batch_idx):
        if batch_idx == 1 and self.kill_at == f"validation {self.current_epoch}":
            os.kill(os.getpid(), signal.SIGKILL)
        self.log("val/loss", (self.weight * batch.images).mean(), batch_size=len(batch.indices))

    def on_validation_end(self):
        loss = float(self.trainer.callback_metrics["val/loss"])
        self.write(f"validated {self.global_step} {loss.hex()}")

    def on_train_epoch_end(self):
        self.write(f"ended {self.current_epoch}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(folder, *, workers=0, resume=None, kill_at=None, validate=False, keep=None, **trainer):
    torch.set_num_threads(1)
    loader = LoaderSettings(
        global_batch_size=BATCH * ACCUMULATE, batch_size_per_device=BATCH, num_workers=workers,
        seed=5, timeout_seconds=60.0, check_images=0,
    )  # fmt: skip
    views = PixelTransform(image_size=(8, 12))
    data = TokenizerData(Pictures(), Pictures() if validate else None, views=views, loader=loader)
    options = {"every_n_epochs": 0, "every_n_steps": 1, **(keep or {})}
    keeper = CheckpointKeeper(folder, keep=-1, **options)
    arguments = {"max_epochs": EPOCHS, "accumulate_grad_batches": ACCUMULATE, **trainer}
    trainer = L.Trainer(
        accelerator="cpu", callbacks=[keeper], plugins=[CheckpointFiles()],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder, num_sanity_val_steps=0, **arguments,
    )  # fmt: skip
    trainer.fit(Log(folder / "log", kill_at), datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


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


def after(text, lines):
    """What follows the line that begins with this."""
    return lines[next(i for i, line in enumerate(lines) if line.startswith(text)) + 1 :]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    assert len(micro_batches(folder)) == EPOCHS * MICRO_BATCHES
    return folder


def micro_batches(folder):
    return [line for line in lines(folder) if line[0].isdigit()]


def test_no_two_epochs_are_alike(uninterrupted):
    batches = [line.split(" ", 2)[2] for line in micro_batches(uninterrupted)]
    assert len(set(batches)) == len(batches)
    first = [line.split("[")[1].split("]")[0] for line in micro_batches(uninterrupted)]
    samples = ", ".join(first[:MICRO_BATCHES]).split(", ")
    assert len(set(samples)) == MICRO_BATCHES * BATCH


# an epoch's last window is of one micro-batch where it has five; an epoch may end the run by steps
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validate": True},
        {"validate": True, "limit_train_batches": 5, "keep": {"every_n_epochs": 1}},
        {"validate": True, "val_check_interval": 2},
        {"validate": True, "check_val_every_n_epoch": 2},
        {"max_epochs": -1, "max_steps": 8, "validate": True, "keep": {"every_n_epochs": 1}},
    ],
    ids=str,
)
def test_going_on_from_any_checkpoint(tmp_path, options):
    """Neither a step nor a validation more or fewer, and the same weights to the bit."""
    options = {"max_epochs": 2, **options}
    train(tmp_path, **options)
    whole = lines(tmp_path)
    files = sorted(tmp_path.glob("epoch*"), key=lambda path: path.name.split("step")[1])
    assert len(files) >= 5
    for number, path in enumerate(files):
        step = int(path.stem.split("step")[1])
        (tmp_path / "log").rename(tmp_path / f"log{number}")
        # go on from one that a resumed run wrote, too
        trainer = train(tmp_path, resume=path, **options)
        resumed = lines(tmp_path) if (tmp_path / "log").exists() else []
        assert resumed == whole[len(whole) - len(resumed) :], path.name
        done = [line for line in resumed if line[0].isdigit()]
        total = len([line for line in whole if line[0].isdigit()])
        micro = -(-trainer.num_training_batches // ACCUMULATE)
        epochs, within = divmod(step, micro)
        before = epochs * trainer.num_training_batches + within * ACCUMULATE
        assert len(done) == total - before, path.name
        (tmp_path / "log").touch()


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_resumed_with_other_numbers_of_workers(uninterrupted, tmp_path, workers):
    assert in_a_child(tmp_path, workers=workers, kill_at=9) == -signal.SIGKILL
    assert lines(tmp_path) == lines(uninterrupted)[: 9 + 1]  # and the end of an epoch
    (tmp_path / "log").unlink()
    options = {"workers": 2 - workers, "resume": tmp_path / "last.safetensors"}
    assert in_a_child(tmp_path, **options) == 0
    assert lines(tmp_path) == lines(uninterrupted)[8 + 1 :]  # from the last whole step


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("validate", [False, True])
def test_killed_after_an_epochs_checkpoint(tmp_path, workers, validate):
    options = {"keep": {"every_n_epochs": 1, "every_n_steps": 0}, "validate": validate}
    train(tmp_path / "whole", **options)
    cut = tmp_path / "cut"
    cut.mkdir()
    code = in_a_child(cut, workers=workers, kill_at=MICRO_BATCHES + 3, **options)
    assert code == -signal.SIGKILL
    (cut / "log").unlink()
    assert in_a_child(cut, workers=workers, resume=cut / "last.safetensors", **options) == 0
    assert lines(cut) == after("ended 0", lines(tmp_path / "whole"))


@pytest.mark.parametrize("every_step", [True, False])
def test_killed_within_a_validation(tmp_path, every_step):
    """With a checkpoint before the validation it is done again as a whole, else the epoch is."""
    keep = {"every_n_steps": 1} if every_step else {"every_n_epochs": 1, "every_n_steps": 0}
    options = {"keep": keep, "validate": True}
    train(tmp_path / "whole", **options)
    cut = tmp_path / "cut"
    cut.mkdir()
    assert in_a_child(cut, kill_at="validation 1", **options) == -signal.SIGKILL
    (cut / "log").unlink()
    assert in_a_child(cut, resume=cut / "last.safetensors", **options) == 0
    expected = after("11 " if every_step else "ended 0", lines(tmp_path / "whole"))
    assert lines(cut) == expected


def test_checkpoints_hold_no_data(uninterrupted):
    assert Path(uninterrupted / "last.safetensors").stat().st_size < 20_000
