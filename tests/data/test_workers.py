"""Workers that raise, hang, crash or are killed: the error says which one, and over which image."""

import os
import re
import signal
import time

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from beit.data import workers
from beit.data.batches import PixelBatch
from beit.data.dataset import Collate, KeyedDataset, PixelSample
from beit.data.images import UnreadableImage
from beit.data.loading import LoaderSettings
from beit.data.modules import TokenizerData
from beit.data.sampler import GlobalBatchSampler
from beit.data.views import PixelTransform
from beit.data.workers import SampleError, WatchedLoader, WorkerLost, losses_named
from beit.errors import UserError
from beit.job.exits import Exit

BAD = 5  # the image over which it happens


class Pictures:
    """23 grey images; something happens over number 5, in a worker alone."""

    classes = labels = None

    def __init__(self, happening):
        self.happening = happening
        self.main = os.getpid()

    def __len__(self):
        return 23

    def load(self, index):
        if index == BAD and os.getpid() != self.main:
            self.happening()
        return Image.fromarray(np.full((8, 12), index, dtype=np.uint8)).convert("RGB"), None

    def name(self, index):
        return f"picture {index}"


def raises():
    raise ZeroDivisionError("so it is")


def refuses():
    raise UserError("one line")


def is_unreadable():
    raise UnreadableImage(f"picture {BAD}", "torn")


def hangs():
    time.sleep(600)


def ends_by(number):
    def happening():
        os.kill(os.getpid(), number)
        time.sleep(600)

    return happening


def exits():
    os._exit(7)


def loader(happening, *, workers=2, limit=60.0):
    views = PixelSample(PixelTransform(image_size=(8, 12)))
    data = KeyedDataset(Pictures(happening), views, seed=1)
    sampler = GlobalBatchSampler(
        23, batch_size=2, rank=0, world_size=1, seed=1, shuffle=False, last_batch="even"
    )
    options = {"prefetch_factor": 2} if workers else {}
    return WatchedLoader(
        data,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=Collate(PixelBatch),
        limit=limit,
        **options,
    )


@pytest.mark.parametrize(
    ("happening", "match"),
    [
        (ends_by(signal.SIGKILL), r"was killed by SIGKILL.*memory ran out.*loader\.num_workers"),
        (ends_by(signal.SIGSEGV), r"was killed by SIGSEGV.*in the decoder: remove that image"),
        (exits, r"ended with exit code 7"),
    ],
    ids=["killed", "crashed", "exited"],
)
def test_a_worker_that_ends_is_named_with_its_image(happening, match):
    with pytest.raises(WorkerLost, match=match) as raised:
        list(loader(happening))
    text = str(raised.value)
    assert re.match(r"data worker [01] \(pid \d+\) ", text)
    assert "while reading picture 5 (index 5); " in text
    assert "\n" not in text
    assert raised.value.code == Exit.LOST


def test_a_worker_that_ends_is_noticed_without_torchs_signal_handler(monkeypatch):
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", True)
        began = time.monotonic()
        with pytest.raises(WorkerLost, match="SIGKILL"):
            list(loader(ends_by(signal.SIGKILL)))
        assert time.monotonic() - began < 30.0  # of 60
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_without_a_limit_it_waits(monkeypatch):
    monkeypatch.setattr(workers, "_LOOK_EVERY", 0.05)
    batches = loader(lambda: time.sleep(0.5), limit=0.0)
    assert len(list(batches)) == 12


def test_a_worker_that_hangs_is_named_with_its_image():
    batches = iter(loader(hangs, limit=1.0))
    with pytest.raises(WorkerLost, match=r"for 1 s .*: worker [01] while reading picture 5 \(inde"):
        list(batches)


def test_an_error_in_a_worker_names_the_image_and_keeps_its_traceback():
    with pytest.raises(SampleError) as raised:
        list(loader(raises))
    first, *rest = str(raised.value).splitlines()
    assert first == "epoch 0, image 5 (picture 5): ZeroDivisionError: so it is"
    assert any("in raises" in line for line in rest)


def test_an_error_without_workers_names_the_image_and_keeps_its_cause():
    here = loader(raises, workers=0)
    here.dataset.source.main = -1
    with pytest.raises(SampleError, match=r"image 5 \(picture 5\): Zero") as raised:
        list(here)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_mistake_of_the_user_comes_out_as_it_went_in():
    with pytest.raises(UserError) as raised:
        list(loader(refuses))
    assert str(raised.value) == "one line"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_reason_of_an_unreadable_image_comes_with_its_batch(workers):
    batches = loader(is_unreadable, workers=workers)
    batches.dataset.source.main = -1
    failed = torch.cat([batch.failed for batch in batches])
    assert failed[failed >= 0].tolist() == [BAD]
    assert batches.reasons == {BAD: "picture 5: torn"}


class Task(L.LightningModule):
    """Kills a worker of its loader, and is itself not asking for a batch when that shows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        workers = self.trainer.train_dataloader._iterator._workers
        os.kill(workers[1].pid, signal.SIGKILL)
        time.sleep(1)  # torch raises in here, unless a fit before has taken away its handler
        return self.weight * batch.images.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_worker_that_ends_during_a_step_is_named_too(tmp_path):
    settings = LoaderSettings(
        global_batch_size=4, batch_size_per_device=4, num_workers=2, seed=5, check_images=0
    )
    views = PixelTransform(image_size=(8, 12))
    data = TokenizerData(Pictures(hangs), None, views=views, loader=settings)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(WorkerLost, match=r"data worker 1 .*SIGKILL"), losses_named(data):
        trainer.fit(Task(), datamodule=data)
