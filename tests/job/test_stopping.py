"""A run that is asked to stop, in this process; the sweep of the faults sends real signals."""

import csv
import os
import signal
import sys
import threading
import time
import unittest.mock
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from beit import runner
from beit.job import signals
from beit.job.agreement import Agreement
from beit.job.stopping import Stopped
from beit.job.takeover import NoSignals

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.faults.forked import run_forked
from scripts.faults.tiny import final, tiny_run


class Ask(L.Callback):
    """Sends this process a signal in one of the hooks, and notes what comes after."""

    def __init__(self, hook: str, *, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number
        self.steps_after = 0
        setattr(self, hook, self._send)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.step < 0:
            self.steps_after += 1

    def _send(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), self.number)
            time.sleep(0.01)


def run(folder: Path, *callbacks: L.Callback, save_every: int = 0, **settings: Any) -> None:
    build = runner.build_trainer

    def build_and_add(*args: Any, **kwargs: Any) -> L.Trainer:
        trainer = build(*args, **kwargs)
        trainer.callbacks[:0] = callbacks
        return trainer

    with unittest.mock.patch.object(runner, "build_trainer", build_and_add):
        tiny_run(folder, task="classification", save_every=save_every, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    """The final weights of the run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, per_device=4)
    return final(folder)["final"]


@pytest.mark.parametrize(
    ("hook", "step", "number", "saved"),
    [
        # between the micro-batches of the third step: that is done first
        ("on_train_batch_start", 1, signal.SIGTERM, 2),
        ("on_before_optimizer_step", 1, signal.SIGINT, 2),
        # in the last step of an epoch, and in its validation: what is saved is due a validation
        ("on_before_backward", 2, signal.SIGUSR1, 3),
        ("on_validation_batch_start", 3, signal.SIGTERM, 3),
    ],
)
def test_it_stops_at_the_boundary_and_goes_on_to_the_same_weights(
    tmp_path, whole, hook, step, number, saved
) -> None:
    before = {n: signal.getsignal(n) for n in signals.NUMBERS}
    with pytest.raises(Stopped) as caught:
        run(tmp_path, Ask(hook, step=step, number=number), per_device=4)
    assert caught.value.code == 128 + number
    name = signal.Signals(number).name
    assert str(caught.value).startswith(f"stopped by {name} after step {saved}: checkpoint ")
    files = list((tmp_path / "run" / "checkpoints").glob("epoch*"))
    assert [f"step{saved:07d}" in file.name for file in files] == [True]
    assert str(files[0]) in str(caught.value)
    assert str(caught.value) in (tmp_path / "run" / "train.log").read_text()
    assert {n: signal.getsignal(n) for n in signals.NUMBERS} == before
    run(tmp_path, per_device=4, resume="auto")
    assert final(tmp_path)["final"] == whole
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    # the step at which it stopped is logged, and each validation once
    assert len([row for row in rows if row.get("train/loss")]) == 6
    assert len([row for row in rows if row.get("val/loss")]) == 2


def test_averaged_weights_are_not_taken_for_the_trained_ones(tmp_path) -> None:
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    run(whole, ema=True)
    with pytest.raises(Stopped):
        run(cut, Ask("on_validation_batch_start", step=3), ema=True)
    run(cut, ema=True, resume="auto")
    assert final(cut)["final"] == final(whole)["final"]


def test_a_run_that_is_done_is_not_stopped_any_more(tmp_path, whole) -> None:
    run(tmp_path, Ask("on_train_end", step=6), per_device=4)
    assert final(tmp_path)["final"] == whole


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_signal_after_the_end_does_not_change_the_exit_code(tmp_path) -> None:
    def body() -> int:
        with signals.handled(ends_process=True):
            run(tmp_path)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # other ranks are waited for, files closed
        return 0

    assert run_forked(body, timeout=60).returncode == 0


def test_a_stop_in_the_very_last_step_changes_nothing(tmp_path) -> None:
    words = ["trainer.limit_val_batches=0"]
    run(tmp_path, Ask("on_before_backward", step=5), words=words)
    assert final(tmp_path)["step"] == 6


def test_a_stop_in_the_last_step_of_a_run_that_ends_within_an_epoch_changes_nothing(
    tmp_path,
) -> None:
    run(tmp_path, Ask("on_before_backward", step=3), words=["trainer.max_steps=4"])
    assert final(tmp_path)["step"] == 4


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("slow", ["save", "requeue"])
def test_a_save_that_is_under_way_and_the_queue_are_waited_for(tmp_path, slow) -> None:
    """Beyond `stop_seconds`: else a stop would cost what it is there to save."""

    class Slow(Ask):
        def _send(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
            asked = self.step == trainer.global_step
            super()._send(trainer)
            time.sleep(3.0 if asked and slow == "save" else 0.0)

    def requeue(*_: Any) -> None:
        time.sleep(3.0 if slow == "requeue" else 0.0)
        (tmp_path / "requeued").touch()

    def body() -> int:
        with signals.handled(ends_process=True):
            try:
                ask = Slow("on_save_checkpoint", step=4)
                run(tmp_path, ask, epochs=3, save_every=1, words=["job.stop_seconds=0.2"])
            except Stopped as end:
                return int(end.code)
        return 0

    with unittest.mock.patch("beit.job.stopping.slurm.requeue", requeue):
        outcome = run_forked(body, timeout=90)
    assert outcome.returncode == 143
    assert "ended at once" not in outcome.output
    assert "stopped by SIGTERM after step 4: " in (tmp_path / "run" / "train.log").read_text()
    assert (tmp_path / "requeued").exists()


def test_an_interrupt_before_training_is_one_for_the_program_too(tmp_path) -> None:
    """Lightning makes an exit with code 1 of a KeyboardInterrupt, and ignores SIGINT after it."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Ask("setup", step=0, number=signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is before


def test_waiting_for_a_batch_is_broken_off_where_no_gradient_is_pending(tmp_path, whole) -> None:
    from beit.data.dataset import KeyedDataset

    get = KeyedDataset.__getitem__
    main = threading.get_ident()
    asked = 0

    def slow(self, key):
        nonlocal asked
        asked += 1
        if asked == 13:  # the first image of the second step
            threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGTERM)).start()
            time.sleep(60)
        return get(self, key)

    began = time.monotonic()
    with unittest.mock.patch.object(KeyedDataset, "__getitem__", slow):
        with pytest.raises(Stopped, match="after step 1: checkpoint"):
            run(tmp_path, per_device=4)
    assert time.monotonic() - began < 30
    run(tmp_path, per_device=4, resume="auto")
    assert final(tmp_path)["final"] == whole
    with (tmp_path / "run" / "metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row.get("train/loss")]
    assert steps == [str(step) for step in range(6)]


def test_lightnings_own_handlers_stay_away(tmp_path) -> None:
    """Private names of Lightning's are replaced: this is where a change of theirs shows."""
    seen: list[Any] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(signal.getsignal(signal.SIGTERM).__self__)
            seen.append(trainer._signal_connector)
            seen.append(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor())

    original = L.Trainer(logger=False, enable_checkpointing=False)
    assert hasattr(original, "_signal_connector")
    for name in ("received_sigterm", "register_signal_handlers", "teardown"):
        assert hasattr(original._signal_connector, name)
    assert hasattr(original.fit_loop.epoch_loop, "_broadcast_sigterm_tensor")
    run(tmp_path, Look(), epochs=1)
    assert isinstance(seen[0], signals.StopSignals)
    assert isinstance(seen[1], NoSignals)
    assert seen[2] is None  # no broadcast, though there is no process group


def test_one_process_agrees_with_itself_without_a_group() -> None:
    agreement = Agreement()
    assert agreement.meet(False, True) == [False, True]
    assert agreement.stop is None
    assert agreement.gather({"a": 1}) == [{"a": 1}]
