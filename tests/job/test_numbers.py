import csv
import json
import math
import sys
import unittest.mock
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from safetensors import safe_open

from beit import runner
from beit.errors import UserError
from beit.job.agreement import Agreement
from beit.job.exits import Exit
from beit.job.numbers import FiniteGuard, MicroBatch, NotFinite
from beit.tasks.accounting import MeanOverGlobalBatch

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.faults.tiny import tiny_config


class Poison(L.Callback):
    """NaN in the loss of one micro-batch; notes its batch, and the weights after each step."""

    def __init__(self, *, step: int, micro_batch: int) -> None:
        self.place = step, micro_batch
        self.victim: Any = None
        self.weights: dict[int, list[torch.Tensor]] = {}
        self.norms: list[float] = []
        self._here = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        step = pl_module.training_step
        correct = pl_module.on_before_optimizer_step

        def training_step(batch, batch_idx):
            return step(batch, batch_idx) * (math.nan if self._here else 1.0)

        def on_before_optimizer_step(optimizer):
            correct(optimizer)  # the last that changes the gradients
            parameters = [p for p in pl_module.parameters() if p.grad is not None]
            self.norms.append(torch.nn.utils.clip_grad_norm_(parameters, math.inf).item())

        pl_module.training_step = training_step
        pl_module.on_before_optimizer_step = on_before_optimizer_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._here = (trainer.global_step + 1, batch_idx % 3) == self.place
        if self._here:
            self.victim = batch

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        moments = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
        state = [*pl_module.parameters(), *moments]
        self.weights[trainer.global_step] = [tensor.detach().clone() for tensor in state]


def train(folder: Path, callback: L.Callback, task: str, *words: str) -> dict[str, float]:
    """Six steps of three micro-batches of four images, in `folder`/run."""
    build = runner.build_trainer

    def build_and_add(*args: Any, **kwargs: Any) -> L.Trainer:
        trainer = build(*args, **kwargs)
        trainer.callbacks.insert(0, callback)
        return trainer

    words = ("++callbacks.optimizer._target_=beit.callbacks.optimizer.OptimizerMonitor", *words)
    with unittest.mock.patch.object(runner, "build_trainer", build_and_add):
        return runner.fit(tiny_config(folder, task=task, per_device=4, words=words))


def rows(folder: Path, key: str) -> list[dict[str, str]]:
    with (folder / "run" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get(key)]


def test_it_stops_before_the_weights_change_and_tells_where(tmp_path) -> None:
    poison = Poison(step=3, micro_batch=1)
    with pytest.raises(NotFinite) as caught:
        train(tmp_path, poison, "classification")
    assert caught.value.code == Exit.NOT_FINITE
    assert max(poison.weights) == 2
    assert all(torch.isfinite(tensor).all() for tensor in poison.weights[2])
    file = tmp_path / "run" / "faults" / "step0000003-rank0.safetensors"
    indices = poison.victim.indices.tolist()
    message = str(caught.value)
    assert message.startswith("step 3: the loss is not finite: rank 0, epoch 0, micro-batch 7")
    assert f"samples {indices[0]} (" in message
    assert str(file) in message
    with safe_open(file, "pt") as content:
        assert json.loads(content.metadata()["beit"])["samples"] == {"micro7": [0, indices]}
        # made again from the data set: the images that the task had
        assert torch.equal(content.get_tensor("micro7.images"), poison.victim.images)
    assert message in (tmp_path / "run" / "train.log").read_text()


def test_images_that_cannot_be_written_do_not_hide_what_happened(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "faults").touch()  # a file, where the folder is to be
    with pytest.raises(NotFinite, match=r"step 3: the loss is not finite: .*, not written \("):
        train(tmp_path, Poison(step=3, micro_batch=1), "classification")


def test_a_step_may_be_left_out_and_nothing_moves(tmp_path) -> None:
    poison = Poison(step=2, micro_batch=0)
    train(tmp_path, poison, "classification", "job.max_nonfinite_steps=1")
    assert max(poison.weights) == 6
    for before, after in zip(poison.weights[1], poison.weights[2], strict=True):
        assert torch.equal(before, after)
    assert not all(map(torch.equal, poison.weights[2], poison.weights[3]))
    logged = rows(tmp_path, "optim/skipped_steps")
    assert [float(row["optim/skipped_steps"]) for row in logged] == [0, 1, 1, 1, 1, 1]
    norms = [float(row["optim/grad_norm"]) for row in logged]
    assert math.isnan(norms[1])
    assert poison.norms[1] == 0.0  # there was no gradient any more


def test_running_means_are_put_back_with_a_step_that_is_left_out(tmp_path) -> None:
    """The dVAE's batch norm has seen the images before anything was checked."""
    means: dict[int, list[torch.Tensor]] = {}

    class Note(Poison):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            floats = [b for b in pl_module.buffers() if b.is_floating_point()]
            means.setdefault(trainer.global_step, [b.clone() for b in floats])

    poison = Note(step=2, micro_batch=2)
    train(tmp_path, poison, "tokenizer", "job.max_nonfinite_steps=1", "trainer.max_steps=3")
    assert means[1]
    assert all(map(torch.equal, means[1], means[2]))
    assert not all(map(torch.equal, means[2], means[3]))


def test_the_logged_norm_includes_the_correction_for_unequal_masks(tmp_path) -> None:
    poison = Poison(step=0, micro_batch=0)
    with_factor: list[float] = []
    factor_of = MeanOverGlobalBatch.gradient_factor

    def noted(self, accumulate):
        with_factor.append(float(factor_of(self, accumulate)))
        return factor_of(self, accumulate)

    with unittest.mock.patch.object(MeanOverGlobalBatch, "gradient_factor", noted):
        train(tmp_path, poison, "mim")
    assert any(abs(factor - 1) > 1e-3 for factor in with_factor)
    logged = [float(row["optim/grad_norm"]) for row in rows(tmp_path, "optim/grad_norm")]
    assert logged == pytest.approx(poison.norms, rel=1e-5)


def test_how_many_were_left_out_is_in_the_checkpoint(tmp_path) -> None:
    guard = FiniteGuard(tmp_path, agreement=Agreement(), max_nonfinite_steps=3)
    guard.skipped = 2
    other = FiniteGuard(tmp_path, agreement=Agreement(), max_nonfinite_steps=3)
    other.load_state_dict(guard.state_dict())
    assert other.skipped == 2


@pytest.mark.parametrize(
    ("scale", "loss", "stops"),
    [
        (65536.0, 0.5, False),  # fp16 finds its scale like this
        (65536.0, math.nan, True),
        (1.0, 0.5, True),  # nothing left to lower
        (None, 0.5, True),
    ],
)
def test_an_infinite_gradient_under_fp16_is_the_loss_scales_business(
    tmp_path, monkeypatch, scale, loss, stops
) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, math.inf, 0.0])
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    trainer = SimpleNamespace(
        global_step=4,
        global_rank=0,
        world_size=1,
        current_epoch=0,
        accumulate_grad_batches=1,
        precision_plugin=SimpleNamespace(scaler=scaler),
    )
    guard = FiniteGuard(tmp_path, agreement=Agreement(), max_nonfinite_steps=0)
    guard._losses = [torch.tensor(loss)]
    guard._window = [MicroBatch(0, 0, torch.empty(0, dtype=torch.int64))]
    monkeypatch.setattr("beit.job.numbers.write_batches", lambda *_: None)
    trainer.datamodule = Mock()
    optimizer = torch.optim.AdamW([weight])
    if stops:
        with pytest.raises(NotFinite, match=r"step 5: the (loss|gradient)"):
            guard.on_before_optimizer_step(trainer, None, optimizer)
    else:
        guard.on_before_optimizer_step(trainer, None, optimizer)
        assert weight.grad is not None


def test_an_empty_mask_cannot_reach_the_loss(tiny) -> None:
    from beit import config
    from beit.data.masking import BlockwiseMasking, RandomMasking

    for kind in (BlockwiseMasking, RandomMasking):
        with pytest.raises(UserError, match="mask"):
            kind((3, 5), mask_ratio=0.0)
        with pytest.raises(UserError, match="mask"):
            kind((3, 5), mask_ratio=0.06)  # less than one of 15 patches
    with pytest.raises(UserError, match="mask_ratio"):
        config.instantiate(config.compose([*tiny["mim"], "masking.mask_ratio=0.001"]).masking)
    with pytest.raises(AssertionError, match="empty mask"):  # nothing was summed, or divided by 0
        MeanOverGlobalBatch()(None, torch.tensor(0.0), 0, 0)
