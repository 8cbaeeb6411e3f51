import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader

from beit.callbacks.metrics_file import MetricsFile
from beit.callbacks.throughput import Tally, Throughput, peak_memory_mib


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def slow_data(kit, clock, seconds):
    """A data module whose every training batch takes `seconds` of the clock to come."""

    class SlowList(list):
        def __getitem__(self, index):
            clock.now += seconds
            return super().__getitem__(index)

    class SlowData(kit.Data):
        def train_dataloader(self):
            return DataLoader(SlowList(self.batches), batch_size=None)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            clock.now += 0.5  # the tokenizer: work, not waiting
            return batch

    return SlowData(6)


def slow_task(kit, clock, *, step, validation):
    class SlowTask(kit.Task):
        def training_step(self, batch, batch_idx):
            clock.now += step + 10 * self.current_epoch
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            clock.now += validation
            super().validation_step(batch, batch_idx)

        def on_train_epoch_end(self):
            clock.now += 1000.0

    return SlowTask()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rates_against_a_fake_clock(tmp_path, kit, fit, accumulate):
    clock = Clock()
    throughput = Throughput(clock=clock)
    _, trainer = fit(
        callbacks=[throughput],
        task=slow_task(kit, clock, step=1.25, validation=50.0),
        data=slow_data(kit, clock, 3.25),
        logger=MetricsFile(str(tmp_path)),
        accumulate_grad_batches=accumulate,
        log_every_n_steps=3,
        val_check_interval=2,
    )
    # each batch of 7 images: 3.25 s to come, 0.5 s to be tokenized, 1.25 s to learn from; the last
    # is 11.25 s in the second epoch
    with (tmp_path / "metrics.csv").open() as file:
        logged = [r for r in csv.DictReader(file) if r["throughput/step_seconds"]]
    assert len(logged) == 4 // accumulate
    for row in logged:
        seconds = 15 if row["epoch"] == "1.0" else 5
        assert float(row["throughput/images_per_second"]) == pytest.approx(7 / seconds)
        assert float(row["throughput/data_wait_share"]) == pytest.approx(3.25 / seconds)
        assert float(row["throughput/step_seconds"]) == pytest.approx(seconds * accumulate)
        assert float(row["memory/peak_mib"]) > 50
    assert throughput.tally == Tally(2 * 6 * 7, 12 // accumulate, 6 * 5 + 6 * 15, 12 * 3.25)
    assert type(trainer.profiler).__name__ == "PassThroughProfiler"


def test_images_of_all_ranks_are_counted(kit):
    trainer = SimpleNamespace(global_step=1, world_size=3, log_every_n_steps=50)
    throughput = Throughput()
    throughput._step_before = 0
    throughput.on_train_batch_end(trainer, None, None, kit.Data().batches[0], 0)
    assert throughput.tally.images == 21


def test_the_users_profiler_is_passed_on_and_given_back(tmp_path, kit, fit):
    profiler = SimpleProfiler(dirpath=tmp_path, filename="times")
    _, trainer = fit(callbacks=[Throughput()], profiler=profiler)
    assert trainer.profiler is profiler
    assert len(profiler.recorded_durations["run_training_batch"]) == 8
    assert (tmp_path / "fit-times.txt").stat().st_size > 0


def test_the_profiler_is_given_back_after_a_failure(kit, fit):
    class Failing(kit.Task):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no")

    seen = []

    class Watching(Throughput):
        def on_exception(self, trainer, pl_module, exception):
            super().on_exception(trainer, pl_module, exception)
            seen.append(type(trainer.profiler).__name__)

    with pytest.raises(RuntimeError):
        fit(callbacks=[Watching()], task=Failing())
    assert seen == ["PassThroughProfiler"]


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_mib(torch.device("cpu"))
    held = torch.ones(int(before * 2**18) + 2**24)  # as much again, and 64 MiB
    assert peak_memory_mib(torch.device("cpu")) >= held.nbytes / 2**20
