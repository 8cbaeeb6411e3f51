"""`beit doctor` on tiny runs: what it finds, that it writes nothing, and its exit code."""

from pathlib import Path

import pytest
import torch
from torch import nn

import beit
from beit import cli, config, doctor, runner
from beit.preflight import trial
from beit.preflight.reference import reference

Words = dict[str, list[str]]


def found(words: list[str], **options) -> dict:
    return {finding.check: finding for finding in doctor.examine(words, **options)}


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_healthy_run_is_examined_and_nothing_is_written(tiny: Words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    findings = found([*tiny["classification"], "name=x", "model.depth=2"], steps=2)
    assert {f.level for name, f in findings.items() if name not in ("precision", "labels")} <= {
        *("ok", "warn")
    }
    assert "1437 training images, 44 steps of 32" in findings["data"].text
    assert findings["labels"].text == "0 to 9, 10 of 10 classes have images"
    assert findings["unused parameters"].level == "ok"
    assert "2 micro-batches of 32" in findings["time"].text
    assert not files(tmp_path)


def test_checkpoints_that_all_stay_are_all_counted(tiny: Words):
    words = [
        *tiny["classification"],
        "model.depth=2",
        "trainer.max_epochs=4",
        "trainer.max_steps=-1",
    ]
    words += ["callbacks.checkpoints.every_n_epochs=2", "callbacks.checkpoints.every_n_steps=5"]
    best = 1  # of a validation's metric
    kept = {
        keep: found([*words, f"callbacks.checkpoints.keep={keep}"])["disk"].text for keep in (3, -1)
    }
    assert f"({3 + best} kept + 1 being written)" in kept[3]
    # of 12 steps, 3 an epoch: after steps 5, 6, 10 and 12
    assert f"({4 + best} kept + 1 being written)" in kept[-1]


def test_parameters_without_a_gradient_are_named(tiny: Words):
    # a mask token that nothing hides behind
    findings = found([*tiny["classification"], "model.depth=2", "model.mask_token=true"])
    assert findings["unused parameters"].level == "warn"
    assert findings["unused parameters"].text == "1 get no gradient: backbone.mask_token"


def test_what_cannot_be_is_an_error_and_exit_code_1(tiny: Words, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["beit", "doctor", *tiny["classification"], "model.image_size=30"]
    )
    assert cli.main() == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "error" in shown
    assert "patch_size" in shown
    findings = found([*tiny["classification"][1:], "task=classification", "data.train.split=no"])
    assert findings["data"].level == "error"
    assert findings["network"].level == "ok"  # the rest is examined all the same


def test_the_recipes_own_numbers_are_those_without_the_users_words():
    words = ["experiment=finetune/base_pt22k", "init_from=x"]
    changed = [*words, "batch.global_size=256", "batch.per_device=32", "optim.lr=2e-3"]
    for given in (words, changed):
        own = reference(given)
        assert (own.batch, own.lr) == (1024, 4e-3)
        assert own.source == "experiment=finetune/base_pt22k"
    without = reference(["task=mim", "model=base", "tokenizer=dvae_tiny", "data=digits",
                         "batch.global_size=64"])  # fmt: skip
    assert (without.batch, without.lr) == (2048, 1.5e-3)
    assert reference(["task=tokenizer", "data=digits", "batch.global_size=64"]) is None


def test_training_warns_where_the_batch_was_changed_alone(tiny: Words, tmp_path, monkeypatch):
    where = f"paths.runs_dir={tmp_path}"
    words = [*tiny["classification"], "trainer.max_steps=1", "logger=none", where]
    # by the command, where Hydra is at work already, and from Python
    monkeypatch.setattr("sys.argv", ["beit", "train", *words, "name=alone"])
    assert cli.main() == 0
    beit.train(*words, "name=both", "optim.lr=5e-4")
    warned = {}
    for name in ("alone", "both"):
        lines = (tmp_path / name / "train.log").read_text().splitlines()
        warned[name] = [line for line in lines if " W " in line and "learning rate" in line]
    assert not warned["both"]
    assert len(warned["alone"]) == 1
    assert "0.004 x 32/1024 = 0.000125" in warned["alone"][0]


def test_flop_of_a_step_are_those_of_its_products(tiny: Words):
    words = [*tiny["classification"], "model.depth=2", "model.relative_position=none"]
    cfg = config.compose(words)
    config.check(cfg)
    config.settle_devices(cfg)
    small = doctor._one_device(cfg, images=2, on_cpu=True)
    task, data = runner.build(small, 1)
    counted = trial.examine(task, data, doctor._plain(small.trainer), images=2)
    tokens, patches, width, pixels = 65, 64, 22, 3 * 4 * 4
    block = tokens * width * width * (3 + 1 + 4 + 4) + 2 * tokens * tokens * width
    forward = 2 * (2 * block + width * 10)
    embed = 2 * patches * pixels * width
    # backward is twice the forward, but for the pixels, which need no gradient
    assert counted.flop == pytest.approx(3 * forward + 2 * embed, rel=0.02)
    assert counted.unused == []
    assert counted.activations > 2 * 10 * tokens * width * 4


def test_kept_bytes_leave_out_parameters():
    linear = nn.Linear(13, 7)
    kept = trial._Kept(linear)
    x = torch.randn(5, 13)
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda t: t):
        loss = linear(x).exp().sum()
    loss.backward()
    assert kept.bytes == 4 * (5 * 13 + 5 * 7)  # the input, and what exp came to
