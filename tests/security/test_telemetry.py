"""Importing the package does nothing but import; what other packages do at that is known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from beit.security import telemetry

ROOT = Path(__file__).parents[2]

# one process for all, since a hook cannot be taken away again and torch takes seconds to import;
# prints, by section, [event, arguments, files on the stack] of whatever reaches out of it
WATCH = """
import contextlib, importlib, io, json, os, pkgutil, sys, traceback
sys.dont_write_bytecode = True
ACTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn",
        "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
        "shutil.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
sections, found = {}, []

def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        acts = any(c in str(mode or "") for c in "wax+") or (flags or 0) & WRITES
        acts = acts and str(path) != os.devnull
    else:
        acts = event.startswith(ACTS)
    if acts:
        stack = [frame.filename for frame in traceback.extract_stack()]
        found.append([event, str(arguments)[:200], stack])

@contextlib.contextmanager
def section(name):
    found.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    sections[name] = [list(found), os.listdir()]

sys.addaudithook(hook)
with section("import"):
    import beit
    beit.__version__
for words in (["--help"], ["--version"], ["train", "--help"]):
    with section(" ".join(words)):
        from beit import cli
        sys.argv = ["beit", *words]
        cli.main()
with section("every module"):
    for module in pkgutil.walk_packages(beit.__path__, "beit."):
        importlib.import_module(module.name)
for code in (
    "import socket; socket.socket()",
    "import subprocess; subprocess.run(['true'])",
    "open('/dev/full', 'w')",
    "os.open('/dev/full', os.O_WRONLY)",
):
    with section(code):
        exec(code)
print(json.dumps(sections))
"""
# what these do when they are imported, on the way to us or by themselves, is theirs: matplotlib
# keeps a list of fonts, torch a cache folder, wandb two temporary ones, dill looks at tempfile,
# NVIDIA's asks ldconfig for its libraries. None opens a socket.
KNOWN = ("matplotlib", "torch", "wandb", "dill", "cuda", "triton", "numba")

Events = list[tuple[str, str, list[str]]]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Events, list[str]]]:
    """By section: what reached out of the process, and the files in its folder."""
    home, fonts = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("fonts")
    done = subprocess.run(
        [sys.executable, "-c", WATCH],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(fonts)},
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", ["import", "--help", "--version", "train --help"])
def test_importing_and_helping_reach_nothing(
    what: str, watched: dict[str, tuple[Events, list[str]]]
) -> None:
    assert watched[what] == [[], []]


def test_no_module_reaches_out_when_it_is_imported(
    watched: dict[str, tuple[Events, list[str]]],
) -> None:
    found, _ = watched["every module"]
    assert not [event for event in found if event[0].startswith(("socket.", "urllib.", "http."))]
    for event, arguments, stack in found:
        packages = [
            file.split("site-packages/")[1].split("/")[0] for file in stack if "site-p" in file
        ]
        assert packages, (event, arguments)  # not ours
        assert set(packages) & set(KNOWN), (event, arguments, packages)


def test_the_watch_sees(watched: dict[str, tuple[Events, list[str]]]) -> None:
    codes = [code for code in watched if "(" in code]
    assert len(codes) == 4
    for code in codes:
        assert watched[code][0], code


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in telemetry.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    telemetry.switch_off()
    assert os.environ["WANDB_ERROR_REPORTING"] == "true"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    for name in telemetry.SETTINGS:  # monkeypatch puts back only what it knows
        monkeypatch.setenv(name, os.environ[name])
        monkeypatch.delenv(name)
