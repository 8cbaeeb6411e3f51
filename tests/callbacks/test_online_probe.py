"""The online probe by itself: when it looks, what it logs, and that it leaves no trace."""

import contextlib
import random
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from beit.callbacks.online_probe import OnlineProbe
from beit.data.labelled import LabelledData
from beit.data.loading import LoaderSettings
from beit.data.sources import Digits, Subset
from beit.data.views import EvalTransform
from beit.evaluation.features import Compute
from beit.evaluation.knn import KNN
from beit.models.vit import VisionTransformer

TRANSFORM = EvalTransform(image_size=(24, 40), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
LABELLED = {"train": Subset(Digits("train"), count=40, seed=1), "val": Digits("test")}


class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = VisionTransformer(
            (24, 40), 8, width=22, depth=3, num_heads=2, absolute_position=True,
            relative_position="none", layer_scale=0.0, drop_path_rate=0.5, mask_token=True,
            final_norm=True, init_cut=2.0,
        )  # fmt: skip
        self.backbone.blocks[1].eval()  # a mode of its own


class Drawing(KNN):
    """As a probe may that a user wrote."""

    def measure(self, *of):
        torch.rand(3), np.random.rand(), random.random()
        return super().measure(*of)


def trainer(logged, *, epoch, epochs=5, steps=-1):
    progress = SimpleNamespace(current=SimpleNamespace(processed=epoch + 1))
    return SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_progress=progress), should_stop=False, current_epoch=epoch,
        max_epochs=epochs, is_global_zero=True, global_step=7, max_steps=steps,
        precision_plugin=SimpleNamespace(forward_context=contextlib.nullcontext),
        loggers=[SimpleNamespace(log_metrics=lambda metrics, step: logged.append(metrics))],
    )  # fmt: skip


@pytest.fixture
def task():
    return Task()


@pytest.fixture
def probe(task):
    found = OnlineProbe(
        transform=TRANSFORM, probes={"knn": Drawing(k=[3])}, train_images=30, val_images=20,
        every_n_epochs=2, batch_size=7, seed=4,
    )  # fmt: skip
    found.check(task, SimpleNamespace(labelled={**LABELLED, "num_classes": "auto"}))
    return found


def state(task):
    return (
        [child.training for child in task.modules()],
        {name: value.clone() for name, value in task.state_dict().items()},
        [parameter.grad for parameter in task.parameters()],
        (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
    )


def test_it_leaves_no_trace(task, probe):
    before, logged = state(task), []
    probe.on_train_epoch_end(trainer(logged, epoch=1), task)
    assert len(logged) == 1
    torch.testing.assert_close(state(task), before, rtol=0, atol=0)
    assert any(before[0])


def test_it_is_the_evaluation_by_hand(task, probe):
    logged = []
    probe.on_train_epoch_end(trainer(logged, epoch=1), task)
    loader = LoaderSettings(7, 7, num_workers=0, seed=0)
    data = LabelledData.of(**LABELLED, num_classes="auto", transform=TRANSFORM, loader=loader)
    data = LabelledData(data.train.part(30, seed=4), data.val.part(20, seed=4))
    found = KNN(k=[3])(task, data, Compute(torch.device("cpu"))).summary
    assert logged == [
        {"probe/knn_acc": found["val_acc"], "probe/knn_layer": found["layer"], "epoch": 1}
    ]


def test_it_looks_every_few_epochs_and_at_the_end(task, probe):
    logged = []
    for epoch in range(5):
        probe.on_train_epoch_end(trainer(logged, epoch=epoch), task)
    assert [metrics["epoch"] for metrics in logged] == [1, 3, 4]
    for steps in (7, 9):  # the run ends with this epoch, after 7 steps, or goes on
        probe.on_train_epoch_end(trainer(logged, epoch=6, epochs=-1, steps=steps), task)
    assert [metrics["epoch"] for metrics in logged] == [1, 3, 4, 6]
