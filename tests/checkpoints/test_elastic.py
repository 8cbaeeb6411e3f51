"""Rewritten counters against those that Lightning itself has when the run was spread so at once."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from beit.checkpoints.elastic import respread
from beit.checkpoints.file import read_file
from beit.checkpoints.keeper import CheckpointKeeper
from beit.checkpoints.plugin import CheckpointFiles
from beit.data.batches import LabelledBatch
from beit.data.dataset import KeyedDataset
from beit.data.loading import Loaders, LoaderSettings
from beit.errors import UserError

IMAGES, GLOBAL, EPOCHS = 21, 8, 2  # 2 steps an epoch and one of the 5 that are left over


class Pictures:
    def __len__(self):
        return IMAGES

    def load(self, index):
        return Image.new("RGB", (3, 2), (index, 0, 0)), None

    def name(self, index):
        return str(index)


class One(Pictures):
    """One batch however it is spread."""

    def __len__(self):
        return 1


def sample(image, label, key):
    return torch.from_numpy(np.asarray(image).copy()), torch.tensor(0)


class Data(L.LightningDataModule):
    def __init__(self, settings):
        super().__init__()
        train = KeyedDataset(Pictures(), sample, seed=5)
        val = KeyedDataset(One(), sample, seed=5)
        self.loaders = Loaders(settings, LabelledBatch, train=train, val=val)

    def train_dataloader(self):
        return self.loaders.train(self.trainer)

    def val_dataloader(self):
        return self.loaders.val(self.trainer)


class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.global_step, []).extend(batch.indices.tolist())
        return self.weight * batch.images.float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def on_save_checkpoint(self, checkpoint):
        checkpoint["beit"] = {
            "progress": {"world_size": 1, "accumulate": self.trainer.accumulate_grad_batches}
        }

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(folder, per_device, *, resume=None, last_batch="keep", **options):
    accumulate = GLOBAL // per_device
    settings = LoaderSettings(
        global_batch_size=GLOBAL, batch_size_per_device=per_device, num_workers=0, seed=5,
        check_images=0, last_batch=last_batch,
    )  # fmt: skip
    data, task = Data(settings), Task()
    batches = data.loaders.micro_batches(world_size=1, accumulate=accumulate)

    def goes_on(checkpoint):
        return respread(checkpoint, world_size=1, accumulate=accumulate, micro_batches=batches)

    keeper = CheckpointKeeper(folder, every_n_epochs=0, every_n_steps=1, keep=-1)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, accumulate_grad_batches=accumulate,
        callbacks=[keeper], plugins=[CheckpointFiles(on_load=goes_on)], logger=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    return task.seen, trainer


def saved(folder):
    files = sorted(path for path in folder.glob("epoch*.safetensors"))
    return {read_file(path)["global_step"]: path for path in files}


@pytest.fixture(scope="module")
def spreads(tmp_path_factory):
    """By images per device: the run's samples by step, and its checkpoints by step."""
    found = {}
    for per_device in (8, 4, 2):
        folder = tmp_path_factory.mktemp(f"of{per_device}")
        seen, _ = train(folder, per_device)
        found[per_device] = {step: sorted(samples) for step, samples in seen.items()}, saved(folder)
    return found


def batches(per_device):
    return {8: 3, 4: 6, 2: 11}[
        per_device
    ]  # 2 whole steps, and 5 left over in batches of at most that


@pytest.mark.parametrize(("old", "new"), [(8, 4), (4, 8), (2, 8), (4, 2), (8, 2)])
def test_counters_are_those_of_a_run_spread_so_from_the_start(spreads, old, new):
    # those of the steps 3 and 6 stand before the validation of their epoch
    assert list(spreads[old][1]) == list(range(1, 7))
    for step, path in spreads[old][1].items():
        ours = respread(
            read_file(path), world_size=1, accumulate=GLOBAL // new, micro_batches=batches(new)
        )
        assert ours["loops"] == read_file(spreads[new][1][step])["loops"], step


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_going_on_sees_the_samples_that_are_left(spreads, tmp_path, step):
    whole, files = spreads[8]
    seen, trainer = train(tmp_path, 2, resume=files[step])
    assert {number: sorted(samples) for number, samples in seen.items()} == {
        number: samples for number, samples in whole.items() if number >= step
    }
    assert trainer.global_step == 6
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([0.1**4])
    seen_twice = [index for samples in seen.values() for index in samples]
    assert len(seen_twice) == 2 * IMAGES - sum(len(whole[number]) for number in range(step))


def test_the_same_spread_is_left_as_it_is(spreads):
    checkpoint = read_file(spreads[4][1][2])
    before = copy.deepcopy(checkpoint["loops"])
    same = respread(checkpoint, world_size=1, accumulate=2, micro_batches=6)
    assert same is checkpoint
    other = respread(checkpoint, world_size=2, accumulate=1, micro_batches=3)
    assert other["loops"] != before == checkpoint["loops"]


def test_what_cannot_go_on_is_refused(spreads):
    within = read_file(spreads[4][1][1])
    for counts in within["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        if isinstance(counts, dict):
            counts["ready"] += 1
    with pytest.raises(UserError, match=r"micro-batch 3.*1 devices and 2 accumulated"):
        respread(within, world_size=1, accumulate=1, micro_batches=3)
    second = read_file(spreads[4][1][4])
    with pytest.raises(UserError, match="had 3 optimizer steps on 1 devices and would have 2"):
        respread(second, world_size=1, accumulate=1, micro_batches=2)
