"""The command's words: what a user types wrong comes back as one line and exit code 2."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import beit
from beit import cli, config
from beit.errors import UserError
from beit.explain import train_help
from beit.predictor import ImageClassifier
from beit.words import split_flags


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["beit", *words])
    return cli.main()


def refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    *words: str,
) -> str:
    """The one line that the command answers with; it may leave nothing behind."""
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert run(monkeypatch, *words) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("beit: error: ")
    assert sorted(folder.rglob("*")) == before
    return printed[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "unknown verb 'trian'"),
        (["train", "data=digits"], "specify 'task'"),
        (["train", "experiment=demo/finetun"], "did you mean demo/finetune"),
        (["train", "experiment=demo/scratch", "model=mcro"], "did you mean micro"),
        (["train", "experiment=demo/scratch", "optm.lr=3"], "did you mean optim.lr"),
        (["train", "experiment=demo/scratch", "model.wdth=3"], "did you mean model.width"),
        (["train", "experiment=demo/scratch", "++foo=3"], "foo is not a key"),
        (["train", "experiment=demo/scratch", "++model.foo=3"], "foo"),
        (["train", "experiment=demo/scratch", "seed=abc"], "'abc'"),
        (["train", "experiment=demo/scratch", "sweep=seeds"], "beit train -m sweep=seeds"),
        (["train", "experiment=demo/scratch", "--foo"], "--foo is not a flag"),
        (["train", "experiment=demo/scratch", "--mutlirun"], "did you mean --multirun?"),
        (["train", "--cfg", "jbo", "experiment=demo/scratch"], "--cfg jbo: expected job"),
        (["train", "--config-dir"], "--config-dir: expected a value"),
        (["train", "--config-dir", "no", "experiment=demo/scratch"], "not found"),
        (["train", "experiment=demo/scratch", "trainer.max_epochs=-3"], "trainer.max_epochs=-3"),
        (["train", "experiment=demo/scratch", "model.image_size=30"], "does not divide"),
        (["train", "experiment=demo/scratch", "model.image_size=2"], "smaller than"),
        (["train", "experiment=demo/scratch", "batch.per_device=33"], "batch.per_device=25"),
        (
            ["train", "experiment=demo/scratch", "init_from=no.safetensors"],
            "no checkpoint at no.safetensors",
        ),
        (["train", "experiment=demo/scratch", "resume=no.safetensors"], "resume=no.safetensors"),
        (
            ["train", "experiment=demo/pretrain", "tokenizer.path=no.safetensors"],
            "error: no checkpoint at",
        ),
        (["evaluate"], "checkpoint has no value"),
        (["evaluate", "checkpoint=no.safetensors"], "no checkpoint at no.safetensors"),
        (["predict", "checkpoint=no.safetensors", "images=x", "top_k=0"], "top_k=0"),
        (["predict", "checkpoint=no.safetensors", "imges=x"], "'imges=x' is not a setting"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert expected in refused(monkeypatch, capsys, tmp_path, *words)


SCRATCH, TOKENIZER = "experiment=demo/scratch", "experiment=demo/tokenizer"


@pytest.mark.parametrize(
    ("recipe", "word", "expected"),
    [
        (SCRATCH, "trainer.precision=foo", "trainer.precision=foo: expected one of 64, 32"),
        (SCRATCH, "trainer.precision=bf16-mixd", "did you mean bf16-mixed?"),
        (SCRATCH, "trainer.accelerator=foo", "trainer.accelerator=foo: "),
        (SCRATCH, "trainer.strategy=foo", "trainer.strategy=foo: "),
        (SCRATCH, "trainer.limit_train_batches=2.5", "trainer.limit_train_batches=2.5: "),
        (SCRATCH, "trainer.limit_train_batches=0", "trainer.limit_train_batches=0: "),
        (SCRATCH, "trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0: "),
        (SCRATCH, "trainer.log_every_n_steps=x", "log_every_n_steps=x: expected a whole number"),
        (SCRATCH, "trainer.max_steps=null", "trainer.max_steps=null: expected a whole number"),
        (SCRATCH, "trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1: "),
        (SCRATCH, "trainer.devices=foo", "trainer.devices=foo: expected how many"),
        (SCRATCH, "trainer.devices='0,1'", "trainer.devices=0,1: expected how many"),
        (SCRATCH, "trainer.devices=0", "trainer.devices=0: expected how many"),
        (SCRATCH, "seed=-1", "seed=-1: expected a whole number from 0"),
        (SCRATCH, "task.label_smoothing=2", "task: label_smoothing 2 must lie in [0, 1)"),
        (SCRATCH, "model.mlp_ratio=-1", "mlp_ratio -1"),
        (SCRATCH, "model.in_channels=1", "model.in_channels=1: images are read as RGB"),
        (SCRATCH, "model.width=abc", "model.width=abc: expected a whole number"),
        (SCRATCH, "model.patch_size=abc", "model.patch_size=abc: expected a whole number"),
        (SCRATCH, "optim.lr=abc", "optim.lr=abc: expected a number"),
        (SCRATCH, "optim.lr=null", "optim.lr=null: expected a number"),
        (SCRATCH, "optim.betas=[0.9]", "optim.betas=[0.9]: expected a list of 2"),
        (SCRATCH, "optim.lr=-1", "optim: lr -1 must be positive"),
        (SCRATCH, "normalize.std=[0,1,1]", "normalize.std=[0, 1, 1]: expected three positive"),
        (SCRATCH, "views.train.auto_augment=foo", "views.train"),
        (SCRATCH, "tokenizer.path=x", "tokenizer.path: this config has no tokenizer: choose"),
        (SCRATCH, "sweep.metric=x", "this config has no sweep: choose sweep=finetune_lr or "),
        (SCRATCH, "+data.trian=1", "data.trian is not a key of a training config: did you mean d"),
        (SCRATCH, "data.train=null", "data.train=null: expected a node"),
        (SCRATCH, "data.num_classes=abc", "abc"),
        (SCRATCH, "+callbacks.progres.redraw_every_seconds=1", "did you mean callbacks.progress?"),
        (SCRATCH, "callbacks.checkpoints.best_mode=foo", "callbacks.checkpoints.best_mode=foo: "),
        (SCRATCH, "+callbacks.checkpoints.best_mod=min", "did you mean best_mode?"),
        (TOKENIZER, "callbacks.pictures.num_images=0", "callbacks.pictures: num_images 0 must"),
        (
            TOKENIZER,
            "callbacks.pictures.every_n_epochs=-1",
            "callbacks.pictures: every_n_epochs -1",
        ),
        (TOKENIZER, "task.revival.every_steps=x", "task.revival.every_steps=x: expected a whole"),
    ],
)
def test_wrong_values_are_refused_with_their_key(
    recipe: str,
    word: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert expected in refused(monkeypatch, capsys, tmp_path, "train", recipe, word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refused(monkeypatch, capsys, tmp_path, "train", SCRATCH, "trainer=gpu")
    assert "trainer.accelerator=gpu: " in line


def test_an_epoch_shorter_than_a_step_is_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["batch.global_size=40", "batch.per_device=8", "trainer.limit_train_batches=4"]
    line = refused(monkeypatch, capsys, tmp_path, "train", SCRATCH, *words)
    assert "limit_train_batches=4 is fewer than the 5 micro-batches" in line


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("bacth: {global_size: 8}", "bacth"),
        ("data: {vall: null}", "data.vall is not a key"),
        ("data: {vall: null}", "did you mean data.val?"),
        ("views: {trian: {flip: 0.1}}", "did you mean views.train?"),
        ("normalize: {maen: [0, 0, 0]}", "did you mean normalize.mean?"),
        ("callbacks: {progres: {redraw_every_seconds: 1}}", "did you mean callbacks.progress?"),
        ("logger: {cvs: {save_dir: x}}", "logger.cvs has no _target_: did you mean logger.csv?"),
        ("optim: {lrr: 3}", "optim.lrr is not an argument of AdamWRecipe: did you mean lr?"),
        (
            "trainer: {max_epoch: 3}",
            "trainer.max_epoch is not an argument of Trainer: did you mean",
        ),
        ("optim: {_target_: beit.optim.recipe.AdamWRecpe}", "AdamWRecpe: there is no such class"),
        ("loader: 5", "loader"),
    ],
)
def test_a_misspelt_key_in_a_recipe_is_refused(
    lines: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{lines}\n")
    words = ["--config-dir", str(tmp_path), "task=classification", "model=micro", "data=digits"]
    words += ["batch.global_size=8", "batch.per_device=8", "trainer.max_epochs=1"]
    line = refused(monkeypatch, capsys, tmp_path, "train", *words, "experiment=mine")
    assert expected in line


def test_everything_without_a_value_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["task=classification", "data=digits", "model=micro"]
    line = refused(monkeypatch, capsys, tmp_path, "train", *words)
    keys = ["trainer.max_epochs", "batch.global_size", "batch.per_device"]
    assert all(key in line for key in keys)
    assert "have no value" in line


def test_flags_may_stand_anywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", "data=digits", "--cfg", "job", SCRATCH, "seed=11") == 0
    assert "seed: 11" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_each_verbs_help_names_it(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, verb, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: beit {verb} checkpoint=PATH")


def test_predict_leaves_no_file_behind_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    classifier = ImageClassifier(torch.nn.Identity(), None, None)
    monkeypatch.setattr("beit.predictor.open_predictor", lambda *_, **__: classifier)
    words = ["predict", "checkpoint=x.safetensors", f"images={tmp_path}/none"]
    line = refused(monkeypatch, capsys, tmp_path, *words, f"output={tmp_path}/out.jsonl")
    assert "none" in line
    picture = tmp_path / "a.png"
    picture.write_bytes(b"")
    words = [
        "predict",
        "checkpoint=x.safetensors",
        f"images={picture}",
        f"output={tmp_path}/no/out",
    ]
    assert "cannot be written" in refused(monkeypatch, capsys, tmp_path, *words)


def test_create_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^model=bsae does not exist: did you mean base\?$"):
        beit.create_model("bsae")
    with pytest.raises(UserError, match=r"^model.image_sise .* did you mean image_size\?$"):
        beit.create_model("micro", image_sise=64)


def test_the_python_face_refuses_a_space_to_search() -> None:
    with pytest.raises(UserError, match="beit train -m sweep=seeds"):
        beit.train(SCRATCH, "sweep=seeds")


def help_commands() -> list[list[str]]:
    """Words after `beit train` of every command that a help text shows."""
    text = f"{cli._HELP}\n{train_help()}".replace("\\\n", " ").replace("…", "demo/scratch")
    found = re.findall(r"beit train ((?:-m |[a-z_.]+=)[^\n;(]*)", text)
    return [line.split() for line in found]


def test_commands_in_the_help_texts_compose() -> None:
    assert len(help_commands()) >= 7
    for command in help_commands():
        words, flags = split_flags(command)
        sweeps = [word for word in words if "," in word or word.startswith("sweep=")]
        assert bool(sweeps) == ("-m" in flags), command
        single = [word.partition(",")[0] for word in words]
        config.check(config.compose(single))


def test_help_lists_every_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", "--help") == 0
    printed = capsys.readouterr().out
    recipes = (config.config_dir() / "experiment").rglob("*.yaml")
    assert all(path.stem in printed for path in recipes)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['beit', '--help']; from beit import cli; cli.main(); "
        "assert not {'torch', 'lightning', 'hydra', 'timm'} & set(sys.modules)"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.perf_counter() - start < 60  # a hang, not a speed, is what this would catch
