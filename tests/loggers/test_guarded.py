"""Loggers that raise, and loggers of a run that goes on."""

import csv
import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from beit.callbacks.metrics_file import MetricsFile
from beit.job.exits import RunEnd
from beit.loggers.guard import Guard
from beit.loggers.guarded import GuardedLogger, log_table


class Raising(Logger):
    """Raises in one method, or when its experiment is made."""

    name = version = save_dir = None

    def __init__(self, where):
        super().__init__()
        self.where, self.calls = where, []

    @property
    def experiment(self):
        self._call("experiment")

    def _call(self, method):
        self.calls.append(method)
        if method == self.where:
            raise RuntimeError("no\x1b[2J more")

    def log_metrics(self, metrics, step=None):
        self._call("log_metrics")

    def log_hyperparams(self, params, *args, **kwargs):
        self._call("log_hyperparams")

    def save(self):
        self._call("save")

    def finalize(self, status):
        self._call("finalize")


class Task(L.LightningModule):
    """Linear, with dropout, so that a disturbed random generator shows in the weights."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 22})
        self.net = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(5, 1))

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def weights_after(folder, logger):
    """The weights after six steps."""
    torch.manual_seed(1)
    task, batches = Task(), torch.randn(3, 4, 5)
    L.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=logger, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder,
    ).fit(task, DataLoader(batches, batch_size=None))  # fmt: skip
    return torch.cat([weight.flatten() for weight in task.state_dict().values()])


@pytest.mark.parametrize("where", ["experiment", "log_metrics", "log_hyperparams", "finalize"])
def test_a_raising_logger_is_told_once_rests_and_changes_nothing(where, tmp_path, caplog):
    plain = weights_after(tmp_path, False)
    inner = Raising(where)
    with caplog.at_level(logging.WARNING, "beit"):
        assert torch.equal(plain, weights_after(tmp_path, GuardedLogger(inner)))
    assert [message for message in caplog.messages if "Raising" in message] == [
        "logger Raising failed (RuntimeError: no\\x1b[2J more); the training goes on, without what "
        "Raising would have written"
    ]
    assert inner.calls[-1] == where  # nothing was asked of it afterwards
    assert inner.calls.count(where) == 1


def test_unguarded_it_ends_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="more"):
        weights_after(tmp_path, Raising("log_metrics"))


def test_a_guard_lets_through_what_is_not_the_loggers():
    guard = Guard("it", lost="nothing")

    def ends():
        raise RunEnd("stop")

    def worker():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RunEnd):
        guard(ends)
    with pytest.raises(RuntimeError, match="worker"):
        guard(worker)
    with pytest.raises(KeyboardInterrupt):
        guard(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert not guard.resting


def rows(path):
    with path.open(newline="") as file:
        return [
            (int(row["step"]), {k: v for k, v in row.items() if v and k not in ("step", "epoch")})
            for row in csv.DictReader(file)
        ]


def test_rewinding_drops_the_rows_of_later_steps(tmp_path):
    log = GuardedLogger(MetricsFile(str(tmp_path)))
    for step in range(6):
        log.log_metrics({"train/loss": step / 8, "epoch": 0}, step)
        if step % 2:
            log.log_metrics({"val/loss": step / 16, "epoch": 0}, step)
    resumed = GuardedLogger(MetricsFile(str(tmp_path)))
    resumed.rewind(4)
    path = tmp_path / "metrics.csv"
    before = path.read_text()
    # the validation that follows the last saved step is done again: it stands there already
    resumed.log_metrics({"val/loss": 3 / 16, "epoch": 0}, 3)
    assert path.read_text() == before
    resumed.log_metrics({"val/loss": 3 / 16, "val/acc": 0.5, "epoch": 0}, 3)
    resumed.log_metrics({"train/loss": 4.0, "epoch": 0}, 4)
    assert rows(path) == [
        (0, {"train/loss": "0.0"}),
        (1, {"train/loss": "0.125"}),
        (1, {"val/loss": "0.0625"}),
        (2, {"train/loss": "0.25"}),
        (3, {"train/loss": "0.375"}),
        (3, {"val/loss": "0.1875"}),
        (3, {"val/acc": "0.5"}),
        (4, {"train/loss": "4.0"}),
    ]


@pytest.mark.parametrize("tail", ["", "9999,0,0.", "9999"], ids=["whole", "torn", "shorter"])
@pytest.mark.parametrize("step", [0, 1, 4000, 9999, 20_000])
def test_rewinding_a_long_file_equals_filtering_it(tmp_path, step, tail):
    path = tmp_path / "metrics.csv"
    head = "step,epoch,train/loss\n"
    lines = [f"{number // 2},0,{number}.5\n" for number in range(20_000)]  # 300 KB: many blocks
    path.write_text(head + "".join(lines) + tail)
    log = MetricsFile(str(tmp_path))
    log.rewind(step)
    assert path.read_text() == head + "".join(lines[: 2 * step])
    log.log_metrics({"train/loss": 1.0}, step)
    assert path.read_text().endswith(f"{step},,1.0\n")


def test_tensorboard_leaves_out_the_steps_that_are_done_again(tmp_path):
    def logger():
        return GuardedLogger(TensorBoardLogger(str(tmp_path), name="", version="tb"))

    first = logger()
    for step in range(6):
        first.log_metrics({"loss": float(step)}, step)
    first.finalize("failed")
    second = logger()
    second.rewind(4)
    for step in range(4, 8):
        second.log_metrics({"loss": 10.0 + step}, step)
    second.finalize("success")
    events = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [
        *((step, float(step)) for step in range(4)),
        *((step, 10.0 + step) for step in range(4, 8)),
    ]


ROWS = [{"class": "sky", "iou": 0.5}, {"class": "a|b", "iou": None}]


@pytest.mark.parametrize("wrap", [GuardedLogger, lambda logger: logger])
def test_tensorboard_shows_a_table_as_text(tmp_path, wrap):
    logger = TensorBoardLogger(tmp_path, name="", version="tb")
    log_table(wrap(logger), "classes", ROWS, 7)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (event,) = events.Tensors("classes/text_summary")
    assert event.step == 7
    text = event.tensor_proto.string_val[0].decode()
    assert text == "| class | iou |\n| --- | --- |\n| sky | 0.5 |\n| a\\|b |  |"


def test_wandb_gets_a_table_as_it_is(monkeypatch):
    logger, calls = object.__new__(WandbLogger), []
    monkeypatch.setattr(WandbLogger, "log_table", lambda self, *a, **k: calls.append((a, k)))
    log_table(logger, "classes", ROWS, 7)
    expected = {"columns": ["class", "iou"], "data": [["sky", 0.5], ["a|b", None]]}
    assert calls == [(("classes",), expected)]
