"""A secret goes where it is needed and nowhere else: every byte that a run writes is searched."""

import logging
import os
import sys
import threading
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from beit import cli, config, console
from beit.checkpoints.file import read_file
from beit.errors import UserError
from beit.recorded import composed
from beit.security import secrets

KEY = "0123456789abcdef" * 2 + "5ec2e75ec2e7"  # as long as one of W&B's
PLACE = "a-place-that-nobody-else-has"
BASE = ["task=classification", "data=digits", "model=micro", "trainer.max_epochs=1"]
SIZES = ["batch.global_size=32", "batch.per_device=32"]

LOGGER = """
import lightning as L
seen = []
class Uploader(L.Callback):
    def __init__(self, server: str, api_key: str) -> None:
        seen.append((server, api_key))
"""


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        *[(key, True) for key in ("api_key", "a.b.API_KEY", "x.token", "hf_token", "a.password")],
        *[(key, True) for key in ("secret", "x.aws_secret_access_key", "credentials", "a/b.key")],
        *[(key, False) for key in ("model.mask_token", "tokenizer", "token_image_size", "monitor")],
        *[(key, False) for key in ("keys", "monkey", "task.tokens", "views.train", "x.keyed")],
    ],
)
def test_keys_that_look_like_a_secret(key: str, secret: bool) -> None:
    assert secrets.is_secret_key(key) is secret


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *[(name, True) for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD", "GH_AUTH")],
        *[(name, True) for name in ("GITHUB_PAT", "MYSQL_PWD", "SENTRY_DSN", "SLACK_WEBHOOK_URL")],
        *[(name, False) for name in ("HOME", "TOKENIZERS_PARALLELISM", "GIT_AUTHOR_NAME", "PATH")],
        *[(name, False) for name in ("PWD", "OLDPWD", "PATTERN", "ADDSN")],
    ],
)
def test_variables_that_look_like_a_secret(name: str, secret: bool) -> None:
    assert secrets.is_secret_variable(name) is secret


@pytest.mark.parametrize(
    "content",
    [
        {"name": "${oc.env:MY_API_KEY}"},
        {"a": [{"b": "x/${ oc.env : MY_API_KEY }"}]},
        {"name": "${oc.env:MY_API_KEY,default}"},
        {"name": "${oc.env:MY_${a}}"},
        {"name": "${logger.api_key}", "logger": {"api_key": "${oc.env:MY_API_KEY}"}},
        {"logger": {"api_key": KEY}},
        {"logger": {"password": 12345678}},
        {"name": f"run-{KEY}"},
        {"data": "${oc.env:THE_DATABASE}"},
        {"data": {"repo": "https://me:12345678@host/x"}},
    ],
)
def test_what_would_write_a_secret_down(
    content: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", KEY)
    monkeypatch.setenv("THE_DATABASE", f"postgres://me:{KEY}@host/x")
    with pytest.raises(UserError) as caught:
        secrets.check_secrets(content)
    assert KEY not in str(caught.value)
    assert "12345678" not in str(caught.value)
    secrets.check_secrets({"logger": {"api_key": "${oc.env:MY_API_KEY}"}})
    secrets.check_secrets({"data": "${oc.env:HOME}/x", "model": {"mask_token": True}, "key": None})


def test_a_secret_on_the_command_line_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["beit", "train", *BASE, f"+logger.csv.api_key={KEY}"])
    assert cli.main() == 2
    assert KEY not in "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())
    assert secrets.shown_words(["a=1", f"+x.api_key={KEY}", "x.token=${oc.env:A}"]) == [
        "a=1",
        "+x.api_key=***",
        "x.token=${oc.env:A}",
    ]


def test_log_lines_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", KEY)
    monkeypatch.setenv("THE_PLACE", PLACE)
    secrets.check_secrets({"data": "${oc.env:THE_PLACE}"})
    record = logging.LogRecord("beit", 20, "x", 1, "key %s, in %s", (KEY, f"/{PLACE}/x"), None)
    line = console.RedactingFormatter("%(message)s").format(record)
    assert line == "key ***, in /${oc.env:THE_PLACE}/x"
    said = "no answer of https://me:a-password@host:80/x and http://host:80/y@z"
    assert secrets.redacted(said) == "no answer of https://***@host:80/x and http://host:80/y@z"


def test_tracebacks_of_faults_are_redacted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", KEY)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    secrets.redact_tracebacks()

    def fault() -> None:
        raise ZeroDivisionError(f"with {KEY}")

    try:
        fault()
    except ZeroDivisionError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    thread = threading.Thread(target=fault)
    thread.start()
    thread.join()
    printed = capsys.readouterr().err
    assert printed.count("ZeroDivisionError: with ***") == 2
    assert KEY not in printed


def test_what_is_written_down_keeps_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_PLACE", PLACE)
    monkeypatch.setenv("THE_SIZE", "64")
    words = ["paths.data_dir=${oc.env:THE_PLACE}/x", "seed=${oc.env:THE_SIZE}", "name=x"]
    cfg = config.compose([*BASE, *SIZES, *words, "data=folder"])
    assert cfg.data.train.root == f"{PLACE}/x/train"
    assert cfg.seed == 64
    settled, recorded = config.plain(cfg), composed(cfg)
    assert settled["data"]["train"]["root"] == "${oc.env:THE_PLACE}/x/train"
    assert settled["seed"] == "${oc.env:THE_SIZE}"  # though a number, and used as one
    assert settled["loader"]["seed"] == "${seed}"
    assert settled["loader"]["batch_size_per_device"] == 32
    assert PLACE not in str([settled, recorded])
    assert OmegaConf.create({"a": "${oc.env:THE_PLACE}"}).a == PLACE  # the resolver is as it was


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "trustedpackage.py").write_text(LOGGER)
    monkeypatch.syspath_prepend(tmp_path)
    yield "trustedpackage"
    sys.modules.pop("trustedpackage", None)


def test_no_byte_of_a_run_holds_a_secret(
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """csv, TensorBoard and W&B's offline files, checkpoints, records, figures, logs, output."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    for name, value in {"MY_API_KEY": KEY, "WANDB_API_KEY": KEY, "THE_PLACE": PLACE}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    board = "lightning.pytorch.loggers.TensorBoardLogger,save_dir:${paths.output_dir}"
    uploader = f"_target_:{package}.Uploader,server:${{oc.env:THE_PLACE}}"
    words = [
        *(*BASE, *SIZES, "logger=wandb", "name=x", "paths.data_dir=${oc.env:THE_PLACE}"),
        *("loader.num_workers=0", "loader.check_images=1", "trainer.limit_train_batches=1"),
        *("trainer.limit_val_batches=1", "trainer.log_every_n_steps=1", "optim.warmup_epochs=0"),
        *("model.depth=1", "model.width=12", "model.num_heads=2", "trainer.precision=32-true"),
        f"+logger.tensorboard={{_target_:{board}}}",
        f"+callbacks.uploader={{{uploader},api_key:'${{oc.env:MY_API_KEY}}'}}",
        f"trust=[{package}.]",
    ]
    monkeypatch.setattr(sys, "argv", ["beit", "train", *words])
    code = cli.main()
    output = capfd.readouterr()
    assert code == 0, output.err
    assert sys.modules[package].seen == [(PLACE, KEY)]  # where it is needed

    written = [path for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    kinds = {path.suffix for path in written} | {path.name.split(".")[0] for path in written}
    assert {".wandb", ".csv", ".safetensors", ".yaml", ".json", ".log", "events"} <= kinds
    for path in written:
        content = path.read_bytes()
        for text in (KEY, PLACE):
            assert text.encode() not in content, path
    assert KEY not in output.out + output.err
    assert PLACE not in output.out + output.err
    checkpoint = next(path for path in written if path.suffix == ".safetensors")
    entry = read_file(checkpoint)["beit"]
    assert entry["config"]["paths"]["data_dir"] == "${oc.env:THE_PLACE}"
    assert "${oc.env:MY_API_KEY}" in (place / "runs" / "x" / "config.yaml").read_text()
    assert os.environ["MY_API_KEY"] == KEY
