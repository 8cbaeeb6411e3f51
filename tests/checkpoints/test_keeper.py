"""When checkpoints are written, which stay, and what is never touched."""

import math
import os
import shutil
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from beit.checkpoints.errors import NonFiniteWeights, NoSpace
from beit.checkpoints.file import read_file, write_file
from beit.checkpoints.keeper import CheckpointKeeper
from beit.checkpoints.plugin import CheckpointFiles
from beit.checkpoints.record import RunRecord
from beit.checkpoints.space import check_space
from beit.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SCORES = [0.3, 0.7, 0.5, 0.6]


class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.saved = []

    def training_step(self, batch, batch_idx):
        return (self.weight * batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/score", SCORES[self.current_epoch], batch_size=1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def record(run_id="r1"):
    facts = {"config": {}, "composed": {}, "data": {}, "environment": {}}
    return RunRecord(**facts, run_id=run_id, global_batch_size=2)


def fit(
    folder,
    *,
    task=None,
    run_id="r1",
    epochs=2,
    batches=4,
    resume=None,
    keep=None,
    extra=(),
    **trainer,
):
    keeper = CheckpointKeeper(folder, **(keep or {}))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[record(run_id), *extra, keeper],
        plugins=[CheckpointFiles()], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0, **trainer,
    )  # fmt: skip
    data = torch.arange(3.0 * batches).reshape(batches, 3)
    trainer.fit(task or Task(), DataLoader(data), DataLoader(data[:2]), ckpt_path=resume)
    return keeper


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(folder):
    return sorted(int(name[14:21]) for name in names(folder) if name.startswith("epoch"))


def test_the_newest_stay_and_last_points_to_the_newest(tmp_path):
    fit(tmp_path, keep={"every_n_steps": 1, "every_n_epochs": 0, "keep": 3})
    assert steps(tmp_path) == [6, 7, 8]
    assert (tmp_path / "last.safetensors").readlink().name == "epoch0001-step0000008.safetensors"
    assert len(names(tmp_path)) == 4


@pytest.mark.parametrize(
    ("keep", "trainer", "expected"),
    [
        ({"every_n_steps": 3, "every_n_epochs": 0}, {}, [3, 6, 8]),  # the end is always written
        ({"every_n_epochs": 2}, {}, [8]),
        ({"every_n_epochs": 1, "every_n_steps": 4}, {}, [4, 8]),
        # windows of 3 in epochs of 4: the second window has one micro-batch
        ({"every_n_steps": 1}, {"accumulate_grad_batches": 3}, [1, 2, 3, 4]),
        ({"every_n_epochs": 0}, {"max_steps": 5}, [5]),
        ({"every_minutes": 1e-9, "every_n_epochs": 0}, {}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"every_minutes": 60.0, "every_n_epochs": 0}, {}, [8]),
    ],
)
def test_when(tmp_path, keep, trainer, expected):
    fit(tmp_path, keep={**keep, "keep": -1}, **trainer)
    assert steps(tmp_path) == expected


def test_never_within_an_accumulation_window(tmp_path):
    class Count(L.Callback):
        def __init__(self):
            self.micro_batches = 0

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            assert progress["current"]["ready"] % 3 == 0 or progress["is_last_batch"]
            assert all(p.grad is None or True for p in pl_module.parameters())

    clock = {"every_minutes": 1e-9, "every_n_epochs": 0, "keep": -1}
    fit(tmp_path, keep=clock, extra=[Count()], accumulate_grad_batches=3, batches=7, epochs=1)
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(("mode", "epoch"), [("max", 1), ("min", 0)])
def test_the_best_is_kept_and_its_score_survives_a_resume(tmp_path, mode, epoch):
    keep = {"best_by": "val/score", "best_mode": mode, "keep": 1}
    fit(tmp_path, keep=keep)
    assert steps(tmp_path) == [8]
    keeper = fit(tmp_path, keep=keep, epochs=4, resume=tmp_path / "last.safetensors")
    assert steps(tmp_path) == [16]
    assert keeper.best_score == pytest.approx(SCORES[epoch])
    assert read_file(tmp_path / "best.safetensors")["global_step"] == 4 * (epoch + 1)


def test_the_best_of_an_epoch_without_a_checkpoint_of_its_own(tmp_path):
    keep = {"best_by": "val/score", "every_n_epochs": 4}
    fit(tmp_path, keep=keep, epochs=4)
    assert steps(tmp_path) == [16]
    assert read_file(tmp_path / "best.safetensors")["global_step"] == 8


def test_a_best_that_was_lost_between_two_renames_is_made_good(tmp_path):
    keep = {"best_by": "val/score"}
    fit(tmp_path, keep=keep)
    write_file(tmp_path / "best.safetensors", {"global_step": 4})  # as if killed before the second
    fit(tmp_path, keep=keep, epochs=3, resume=tmp_path / "last.safetensors")
    assert read_file(tmp_path / "best.safetensors")["global_step"] == 8


def test_a_metric_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"best_by=val/acc1: .* there are val/score"):
        fit(tmp_path, keep={"best_by": "val/acc1"})


def test_files_of_others_are_left_alone(tmp_path):
    fit(tmp_path, run_id="another", epochs=1, keep={"every_n_steps": 1})
    theirs = {path: path.read_bytes() for path in tmp_path.glob("epoch*")}
    (tmp_path / "epoch0000-step0000099.safetensors").write_bytes(b"damaged")
    (tmp_path / "notes.txt").write_text("mine")
    fit(tmp_path, batches=7, keep={"every_n_steps": 1, "keep": 1, "every_n_epochs": 0})
    assert steps(tmp_path) == [3, 4, 14, 99]
    fit(tmp_path, epochs=1, keep={"keep": 1})  # it comes to a step of theirs
    assert "epoch0000-step0000004-r1.safetensors" in names(tmp_path)
    assert all(path.read_bytes() == content for path, content in theirs.items())


def test_what_is_due_at_the_last_step_of_an_epoch_comes_after_its_end(tmp_path):
    """Without a validation: a run that goes on from before that end would never see it."""
    counts = []

    class Ended(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            counts.append(steps(tmp_path))

    keep = {"every_n_steps": 1, "every_n_epochs": 0, "keep": -1}
    fit(tmp_path, keep=keep, extra=[Ended()], check_val_every_n_epoch=5)
    assert counts == [[1, 2, 3], [1, 2, 3, 4, 5, 6, 7]]
    assert steps(tmp_path) == list(range(1, 9))


def test_going_back_sets_the_later_ones_aside(tmp_path, caplog):
    """Else `resume=auto` would go on from what the user has left."""
    keep = {"every_n_steps": 1, "every_n_epochs": 0, "keep": -1, "best_by": "val/score"}
    fit(tmp_path, keep=keep)
    fit(tmp_path / "other", run_id="another")
    (tmp_path / "other" / "epoch0001-step0000008.safetensors").rename(
        tmp_path / "epoch0001-step0000099.safetensors"
    )
    back = tmp_path / "epoch0000-step0000003.safetensors"
    fit(tmp_path, keep={**keep, "best_by": ""}, resume=back, max_steps=5)
    assert steps(tmp_path)[-2:] == [8, 99]
    assert sorted(int(path.name[14:21]) for path in tmp_path.glob("epoch*.safetensors")) == [
        *(1, 2, 3, 4, 5, 99)
    ]
    aside = sorted(path.name.split(".later-")[0] for path in tmp_path.glob("*.later-*"))
    assert aside == ["best.safetensors"] + [
        f"epoch000{step // 5}-step000000{step}.safetensors" for step in (4, 5, 6, 7, 8)
    ]
    assert len(aside) == len([r for r in caplog.records if "is of a step after 3" in r.message])
    assert read_file(tmp_path / "last.safetensors")["global_step"] == 5


def test_going_back_leaves_no_link_to_nothing(tmp_path):
    fit(tmp_path, keep={"every_n_steps": 1, "keep": -1})
    back = tmp_path / "epoch0000-step0000003.safetensors"
    keeper = CheckpointKeeper(tmp_path)
    trainer = SimpleNamespace(global_step=3, callbacks=[record()])
    keeper._files = sorted(tmp_path.glob("epoch*"))
    keeper._set_aside(trainer)
    assert (tmp_path / "last.safetensors").readlink().name == back.name
    trainer.global_step = 0
    keeper._set_aside(trainer)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    monkeypatch.setattr(os, "link", refused)
    fit(tmp_path, keep={"best_by": "val/score"})
    assert names(tmp_path) == [
        "best.safetensors", "epoch0000-step0000004.safetensors",
        "epoch0001-step0000008.safetensors", "last.safetensors",
    ]  # fmt: skip
    assert read_file(tmp_path / "last.safetensors")["global_step"] == 8


def test_the_space_of_two_names_is_there_once(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=0, used=0, free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    keep = {"best_by": "val/score", "keep": 2}
    fit(tmp_path, keep=keep)
    sizes = {path.stat().st_ino: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert len(sizes) == 2
    trainer = SimpleNamespace(lightning_module=Task(), callbacks=[], optimizers=[])
    monkeypatch.setattr("beit.checkpoints.space.checkpoint_size", lambda trainer: 10**5)
    present = [path for path in tmp_path.iterdir() if not path.is_symlink()]
    usage.free = 4 * 10**5 - sum(sizes.values()) - 1
    with pytest.raises(NoSpace):
        check_space(trainer, tmp_path, present, files=3)
    usage.free += 1
    check_space(trainer, tmp_path, present, files=3)


def test_leftovers_of_a_killed_save_go_at_the_next_start(tmp_path):
    (tmp_path / ".epoch0000-step0000001.safetensors.123.part").write_bytes(b"half")
    fit(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(tmp_path, monkeypatch):
    # weights, two moments: 36 bytes; two that are kept and one that is being written
    usage = SimpleNamespace(total=1000, used=893, free=107)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    task = Task()
    with pytest.raises(NoSpace, match="108 bytes are needed, 107 bytes are free"):
        fit(tmp_path, task=task)
    assert torch.equal(task.weight, torch.ones(3))
    usage.free = 108
    fit(tmp_path)
    usage.free = 0
    fit(tmp_path, resume=tmp_path / "last.safetensors", epochs=3)  # its own files make room


def test_weights_that_are_not_finite_end_the_run_with_the_older_checkpoints(tmp_path):
    class Bad(Task):
        def on_train_batch_end(self, *_):
            if self.global_step == 3:
                self.weight.data[1] = math.nan

    # the task's own hook comes after the callbacks': what it did is seen one step later
    with pytest.raises(NonFiniteWeights, match=r"state_dict\.weight"):
        fit(tmp_path, task=Bad(), keep={"every_n_steps": 1, "keep": -1})
    assert steps(tmp_path) == [1, 2, 3]
    for path in tmp_path.glob("epoch*"):
        assert read_file(path)["state_dict"]["weight"].isfinite().all()


def test_averaged_weights_are_not_mixed_up_by_a_save_within_a_validation(tmp_path):
    class Stop(L.Callback):
        def on_validation_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.checkpoint_callback.save_now(trainer)
                (tmp_path / "epoch0000-step0000004.safetensors").rename(tmp_path / "within")

    def average():
        return L.pytorch.callbacks.EMAWeightAveraging(decay=0.5)

    keep = {"every_n_steps": 1, "keep": -1, "every_n_epochs": 0}
    fit(tmp_path, extra=[average(), Stop()], keep=keep)
    at_step = read_file(tmp_path / "epoch0001-step0000008.safetensors")
    (tmp_path / "within").rename(tmp_path / "within.safetensors")
    within = read_file(tmp_path / "within.safetensors")
    assert not torch.equal(within["state_dict"]["weight"], within["current_model_state"]["weight"])
    fit(tmp_path, extra=[average()], resume=tmp_path / "within.safetensors")
    again = read_file(tmp_path / "epoch0001-step0000008.safetensors")
    for key in ("state_dict", "current_model_state"):
        assert torch.equal(again[key]["weight"], at_step[key]["weight"])


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"every_n_steps": -1}, "every_n_steps"),
        ({"every_minutes": math.nan}, "every_minutes"),
        ({"keep": 0}, "keep"),
        ({"best_mode": "most"}, "best_mode"),
    ],
)
def test_numbers_out_of_range(tmp_path, wrong, word):
    with pytest.raises(UserError, match=word):
        CheckpointKeeper(tmp_path, **wrong)


def test_the_keeper_needs_our_files(tmp_path):
    trainer = L.Trainer(accelerator="cpu", callbacks=[CheckpointKeeper(tmp_path)], logger=False)
    with pytest.raises(AssertionError, match="CheckpointFiles"):
        trainer.fit(Task(), DataLoader(torch.ones(2, 3)))
