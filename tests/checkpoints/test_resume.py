"""A run goes on from its newest good checkpoint, and never from none in silence."""

import logging
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from beit import run_folder
from beit.checkpoints import differences, resume
from beit.checkpoints.file import write_file
from beit.errors import UserError
from beit.files import replace_link

CONFIG = {"task_name": "mim", "seed": 0, "optim": {"lr": 0.1}, "views": {"size": 8}}
CONFIG |= {"data": {}, "tokenizer": {}}
COMPOSED = {**CONFIG, "datamodule": {"views": "${views}"}, "paths": {"x": "${name}"}}
DATA = {"train": {"sha256": "a", "source": "A(7 images)"}, "val": None, "tokenizer": "t"}


def entry(run_id="r1", **changes):
    full = {**CONFIG, "datamodule": {"views": CONFIG["views"]}}
    facts = {"config": full, "composed": COMPOSED, "classes": None, "data": DATA}
    return {**facts, "run_id": run_id, **changes}


def write(folder, step, run_id="r1", name=""):
    path = folder / "checkpoints" / (name or f"epoch0000-step{step:07d}.safetensors")
    weights = {"weight": torch.full((2, 3), float(step)), "bias": torch.zeros(2)}
    write_file(path, {"global_step": step, "state_dict": weights, "beit": entry(run_id)})
    return path


@pytest.fixture
def run(tmp_path):
    """A run's folder with three checkpoints and the two other names."""
    resume.write_run_id(tmp_path, "r1")
    for step in (5, 10, 9):  # 10 is the newest, whatever its age
        path = write(tmp_path, step)
        os.utime(path, (step, step))
    os.utime(tmp_path / "checkpoints" / "epoch0000-step0000009.safetensors", (99, 99))
    replace_link(tmp_path / "checkpoints" / "last.safetensors", "epoch0000-step0000010.safetensors")
    write(tmp_path, 3, name="best.safetensors")
    return tmp_path


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def find(folder, wanted):
    return resume.find(folder, wanted, folder / "checkpoints")


def found(folder, wanted="auto"):
    path = find(folder, wanted).path
    return None if path is None else path.name


def test_auto_takes_the_newest(run, caplog):
    assert found(run) == "epoch0000-step0000010.safetensors"
    assert not caplog.records
    beginning = find(run, "auto")
    assert beginning.run_id == "r1"
    assert beginning.checkpoint.shapes == {"weight": (2, 3), "bias": (2,)}


def test_auto_tells_of_each_that_it_passes_over(run, caplog, monkeypatch):
    folder = run / "checkpoints"
    damage(folder / "epoch0000-step0000010.safetensors")
    write(run, 11, run_id="another")
    monkeypatch.setattr("beit.checkpoints.header.SCHEMA", 2)
    write(run, 12)
    monkeypatch.undo()
    (folder / "epoch0000-step0000013.safetensors").write_bytes(b"cut")
    torch.save({}, folder / "old.ckpt")
    (folder / ".epoch0000-step0000014.safetensors.7.part").write_bytes(b"half")
    assert found(run) == "epoch0000-step0000009.safetensors"
    told = {record.args[0].name: record.args[1] for record in caplog.records}
    assert len(told) == 5
    assert "bytes of state_dict.bias are not" in told["epoch0000-step0000010.safetensors"]
    assert "is of another run (another)" in told["epoch0000-step0000011.safetensors"]
    assert "newer version" in told["epoch0000-step0000012.safetensors"]
    assert "cut short" in told["epoch0000-step0000013.safetensors"]
    assert "torch.save" in told["old.ckpt"]


def test_auto_never_starts_from_zero_in_silence(run, caplog):
    for path in (run / "checkpoints").glob("*.safetensors"):
        if not path.is_symlink():
            damage(path)
    with pytest.raises(UserError, match=r"none of the 4 checkpoints .* name another"):
        find(run, "auto")
    for path in (run / "checkpoints").glob("epoch*"):
        path.unlink()
    (run / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(UserError, match="none of the 1 checkpoints"):  # a link to nothing
        find(run, "auto")
    shutil.rmtree(run / "checkpoints")
    caplog.clear()
    beginning = find(run, "auto")
    assert (beginning.path, beginning.run_id) == (None, "r1")
    assert "starts at step 0" in caplog.text


def test_the_best_serves_where_nothing_else_is_left(run, caplog):
    for path in (run / "checkpoints").glob("epoch*"):
        damage(path)
    assert found(run) == "best.safetensors"
    assert "an earlier state" in caplog.text


def test_a_second_name_of_a_file_is_not_a_second_checkpoint(run, caplog):
    best = run / "checkpoints" / "best.safetensors"
    best.unlink()
    os.link(run / "checkpoints" / "epoch0000-step0000010.safetensors", best)
    assert found(run) == "epoch0000-step0000010.safetensors"
    damage(best)
    assert found(run) == "epoch0000-step0000009.safetensors"
    assert len([r for r in caplog.records if "passes over" in r.message]) == 1


def test_a_folder_without_an_id_and_with_two_runs_is_ambiguous(run):
    (run / "run_id").unlink()
    assert found(run) == "epoch0000-step0000010.safetensors"
    write(run, 11, run_id="another")
    with pytest.raises(UserError, match="of 2 runs: name the one"):
        find(run, "auto")


def test_one_that_was_named_must_be_good(run):
    path = run / "checkpoints" / "epoch0000-step0000005.safetensors"
    assert found(run, str(path)) == path.name
    damage(path)
    with pytest.raises(UserError, match="is damaged"):
        find(run, str(path))
    with pytest.raises(UserError, match="no such checkpoint; resume=auto"):
        find(run, str(run / "none"))
    with pytest.raises(UserError, match="local files"):
        find(run, "https://host/x.safetensors")


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_by_the_launcher_goes_on(monkeypatch, caplog, variable, tmp_path):
    monkeypatch.delenv(variable, raising=False)
    assert resume.implied(None, tmp_path) is None
    monkeypatch.setenv(variable, "0")
    assert resume.implied(None, tmp_path) is None
    monkeypatch.setenv(variable, "1")
    assert resume.implied(None, tmp_path) == "auto"
    assert variable in caplog.text
    # nothing was written since the file that was named, or something was
    assert resume.implied("x.safetensors", tmp_path) == "x.safetensors"
    path = write(tmp_path, 3)
    assert resume.implied("x.safetensors", path.parent) == "auto"


def check(run, *, task=None, allowed=(), config=(), composed=(), data=()):
    full = {**CONFIG, "datamodule": {"views": dict(config).get("views", CONFIG["views"])}}
    resume.check(
        find(run, "auto"),
        task or nn.Linear(3, 2),
        config={**full, **dict(config)},
        composed={**COMPOSED, **dict(config), **dict(composed)},
        data={**DATA, **dict(data)},
        allowed=allowed,
    )


def test_the_same_run_goes_on(run):
    check(run)
    moved = {"sha256": "a", "source": "A(7 images elsewhere)"}
    check(run, data={"train": moved, "val": {"sha256": "b"}}, config={"name": "x", "job": {"a": 1}})


@pytest.mark.parametrize(
    ("changes", "told", "name"),
    [
        ({"config": {"seed": 1}}, "seed was 0 and is 1", "seed"),
        ({"config": {"optim": {"lr": 0.2}}}, r"optim\.lr was 0.1 and is 0.2", "optim"),
        ({"config": {"new": 1}}, "new was None and is 1", "new"),
        ({"data": {"train": {"sha256": "b", "source": "B"}}}, r"data was A\(7 images\)", "data"),
        ({"data": {"tokenizer": "u"}}, "tokenizer was the one of SHA-256 t", "tokenizer"),
        # named where the user changes it, once
        ({"config": {"views": {"size": 9}}}, r": views\.size was 8 and is 9; that", "views"),
    ],
)
def test_another_run_is_refused_by_name_unless_allowed_by_name(run, caplog, changes, told, name):
    with pytest.raises(UserError, match=told) as raised:
        check(run, **changes)
    assert f"allow_changes=[{name}" in str(raised.value)
    caplog.set_level(logging.INFO)
    check(run, **changes, allowed=[name, "data", "tokenizer"])
    with pytest.raises(UserError, match=told):
        check(run, **changes, allowed=["task_name"])


def test_a_name_that_is_no_key_is_refused(run):
    with pytest.raises(UserError, match="optm is no key: did you mean optim"):
        check(run, allowed=["optm"], config={"seed": 1})


def test_another_task_and_another_network_are_never_allowed(run):
    with pytest.raises(UserError, match="run of task mim, this one is of task x"):
        check(run, config={"task_name": "x"}, allowed=["task_name"])
    with pytest.raises(UserError, match="weight has another shape"):
        check(run, task=nn.Linear(4, 2))
    with pytest.raises(UserError, match="has no bias"):
        check(run, task=nn.Linear(3, 2, bias=False))


def test_every_entry_of_the_table_is_a_key(tiny):
    """A name in the table of what may change that is no key would free nothing."""
    from beit import config
    from beit.checkpoints.differences import FREE

    optional = {"", "trainer.max_time", "trainer.profiler", "trainer.val_check_interval"}
    optional |= {"trainer.accumulate_grad_batches"}  # worked out from the batch
    words = [[*tiny[task], "name=x"] for task in ("mim", "classification", "tokenizer")]
    words[0] += ["tokenizer=dalle", "tokenizer.encoder_path=x", "callbacks=[mim,online_probe]"]
    words += [[*tiny["mim"], "name=x", "tokenizer.path=x"]]
    words += [["task=segmentation", "data=voc", "model=tiny", "name=x"]]
    keys = {key for some in words for key, _ in config.dotted_keys(config.compose(some))}
    assert set(FREE) - optional - keys == set()


@pytest.mark.parametrize(
    ("key", "free"),
    [
        ("callbacks.ema.decay", False),
        ("callbacks.mine", False),  # a user's own may change the weights
        ("callbacks.checkpoints.keep", True),
        ("tokenizer.encoder_path", True),
        ("tokenizer.vocab_size", False),
        ("views.eval.crop_pct", True),
        ("views.train.flip", False),
        ("trainer.val_check_interval", True),
        ("trainer.limit_train_batches", False),
        ("trainer.precision", False),
        ("batch.global_size", False),
        ("batch.per_device", True),
    ],
)
def test_what_may_change(key, free):
    assert differences.is_free(key) is free


def test_a_folder_of_checkpoints_elsewhere_in_the_run(run):
    (run / "checkpoints").rename(run / "others")
    assert resume.find(run, "auto", run / "others").path.name == "epoch0000-step0000010.safetensors"


def test_the_newest_may_be_the_best(run, caplog):
    write(run, 12, name="best.safetensors")  # of a validation within an epoch
    assert found(run) == "best.safetensors"
    assert not caplog.records


def test_a_disk_that_cannot_be_read_is_passed_over(run, monkeypatch, caplog):
    whole = os.preadv

    def failing(descriptor, views, place):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("10.safetensors"):
            raise OSError(5, "Input/output error")
        return whole(descriptor, views, place)

    monkeypatch.setattr(os, "preadv", failing)
    assert found(run) == "epoch0000-step0000009.safetensors"
    assert "cannot be read (Input/output error)" in caplog.text


def test_a_checkpoint_folder_that_is_a_link_is_in_the_run(run, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk") / "big"
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    run_folder.check_free(run, resume=str(run / "checkpoints" / "last.safetensors"))
    with pytest.raises(UserError, match="is of another"):
        run_folder.check_free(run, resume=str(elsewhere / "last.safetensors"))


def hold(folder, pipe):
    """A job that is killed, and leaves a worker which has inherited its files."""
    with run_folder.claimed(folder):
        worker = os.fork()
        if worker:
            pipe.send(worker)
        time.sleep(60)


def test_one_job_at_a_time_in_a_folder(tmp_path):
    folder = tmp_path / "run"
    ours, theirs = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=hold, args=(folder, theirs))
    other.start()
    worker = ours.recv()
    try:
        refused = pytest.raises(UserError, match=rf"another process \(process {other.pid} on ")
        with refused, run_folder.claimed(folder):
            pass
        other.kill()
        other.join()
        (folder / ".config.yaml.0a.part").write_text("half")
        with run_folder.claimed(folder):
            assert [path.name for path in folder.iterdir()] == [run_folder.LOCK_FILE]
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    def read_only(self, *_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(UserError, match=r"output_dir=.*\(Read-only file system\)"):
        run_folder.claimed(tmp_path).__enter__()
    with pytest.raises(UserError, match=r"run_id cannot be written \(Read-only"):
        resume.write_run_id(tmp_path, "r1")
