"""The command's words: what a user types wrong comes back as one line and exit code 2."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from beit import cli, config


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["beit", *words])
    return cli.main()


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
        (["train", "experiment=demo/scratch", "trainer.max_epochs=-3"], "trainer.max_epochs=-3"),
        (["train", "experiment=demo/scratch", "model.image_size=30"], "does not divide"),
        (["train", "experiment=demo/scratch", "model.image_size=2"], "smaller than"),
        (["train", "experiment=demo/scratch", "batch.per_device=33"], "batch.per_device=25"),
        (["train", "experiment=demo/scratch", "init_from=no.ckpt"], "no checkpoint at no.ckpt"),
        (["train", "experiment=demo/scratch", "resume=no.ckpt"], "resume=no.ckpt"),
        (["train", "experiment=demo/pretrain", "tokenizer.path=no.ckpt"], "no.ckpt"),
        (["evaluate"], "checkpoint has no value"),
        (["evaluate", "checkpoint=no.ckpt"], "no checkpoint at no.ckpt"),
        (["predict", "checkpoint=no.ckpt", "images=x", "top_k=0"], "top_k=0"),
        (["predict", "checkpoint=no.ckpt", "imges=x"], "'imges=x' is not a setting"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("beit: error: ")
    assert expected in lines[-1]
    assert "Traceback" not in "\n".join(lines)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_misspelt_key_in_a_recipe_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    recipe = tmp_path / "experiment" / "mine.yaml"
    recipe.write_text("# @package _global_\nbacth:\n  global_size: 8\n")
    words = ["--config-dir", str(tmp_path), "task=classification", "model=micro", "data=digits"]
    assert run(monkeypatch, "train", *words, "experiment=mine") == 2
    assert "bacth" in capsys.readouterr().err


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
