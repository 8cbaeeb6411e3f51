import io
import logging

from beit.callbacks.progress import Progress
from beit.callbacks.throughput import Throughput


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def ticking_task(kit, clock, seconds):
    class Ticking(kit.Task):
        def training_step(self, batch, batch_idx):
            clock.now += seconds
            loss = super().training_step(batch, batch_idx)
            self.log("train/mim_acc", 0.125, prog_bar=True)
            return loss

    return Ticking()


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "beit.callbacks.progress"]


def test_plain_lines_in_a_log(kit, fit, caplog):
    clock = Clock()
    with caplog.at_level(logging.INFO, logger="beit"):
        fit(
            callbacks=[Throughput(clock=clock), Progress(clock=clock, stream=io.StringIO())],
            task=ticking_task(kit, clock, 3.5),
            data=kit.Data(8),
            accumulate_grad_batches=2,
            max_epochs=3,
        )
    first = [line for line in lines(caplog) if "step" in line]
    # once 10 s have passed since the last line, that is every third batch, and at the epoch's end
    starts = [line.partition("  loss ")[0] for line in first[:3]]
    assert starts == ["epoch 1/3  step 2/4", "epoch 1/3  step 3/4", "epoch 1/3  step 4/4"]
    assert "mim_acc 0.125  2 images/s  data-wait 0.0%  eta 1:14" in first[0]  # 21 batches of 3.5 s
    assert any(line == "epoch 1/3  val/loss 1.5" for line in lines(caplog))
    last = lines(caplog)[-1]
    assert last.startswith("trained 12 steps  1:24  2 images/s  data-wait 0.0%  peak memory ")


def test_a_bar_in_a_terminal(kit, fit, caplog):
    clock, terminal = Clock(), Terminal()
    with caplog.at_level(logging.INFO, logger="beit"):
        fit(
            callbacks=[Progress(clock=clock, stream=terminal)],
            task=ticking_task(kit, clock, 0.3),
            max_epochs=-1,
            max_steps=6,
        )
    drawn = [part for part in terminal.getvalue().split("\r\x1b[K") if part.strip()]
    assert drawn[0].startswith("[==========          ] epoch 1  step 2/4  loss ")
    assert drawn[0].endswith("eta 0:01\r")  # 4 batches of 0.3 s
    assert all(len(part) <= 80 for part in drawn)
    assert not any("step" in line for line in lines(caplog)[:-1])


def test_without_validation_and_throughput(kit, fit, caplog):
    with caplog.at_level(logging.INFO, logger="beit"):
        fit(callbacks=[Progress()], data=kit.Data(validate=False))
    assert [line.split("  ")[:2] for line in lines(caplog)[:-1]] == [
        ["epoch 1/2", "step 4/4"],
        ["epoch 2/2", "step 4/4"],
    ]
