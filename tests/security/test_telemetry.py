"""Importing the package does nothing but import; what other packages do at that is known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from beit.security import telemetry

ROOT = Path(__file__).parents[2]

# prints [event, arguments, files on the stack] of whatever reaches out of the process
WATCH = """
import json, os, sys, traceback
sys.dont_write_bytecode = True
found = []
ACTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn",
        "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
        "shutil.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

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

sys.addaudithook(hook)
"""
AFTER = "\nprint(json.dumps(found), file=sys.stderr)\n"
EVERY_MODULE = """
import importlib, pkgutil, beit
for module in pkgutil.walk_packages(beit.__path__, "beit."):
    importlib.import_module(module.name)
"""
# what these do when they are imported, on the way to us or by themselves, is theirs: matplotlib
# keeps a list of fonts, torch a cache folder, wandb two temporary ones, dill looks at tempfile,
# NVIDIA's asks ldconfig for its libraries. None opens a socket.
KNOWN = ("matplotlib", "torch", "wandb", "dill", "cuda", "triton", "numba")


def watched(code: str, home: Path) -> list[tuple[str, str, list[str]]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", WATCH + code + AFTER],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        "import beit; beit.__version__",
        "import sys; sys.argv = ['beit', '--help']\nfrom beit import cli; cli.main()",
        "import sys; sys.argv = ['beit', '--version']\nfrom beit import cli; cli.main()",
        "import sys; sys.argv = ['beit', 'train', '--help']\nfrom beit import cli; cli.main()",
    ],
)
def test_importing_and_helping_reach_nothing(code: str, tmp_path: Path) -> None:
    assert watched(code, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_no_module_reaches_out_when_it_is_imported(tmp_path: Path) -> None:
    found = watched(EVERY_MODULE, tmp_path)
    assert not [event for event in found if event[0].startswith(("socket.", "urllib.", "http."))]
    for event, arguments, stack in found:
        packages = [
            file.split("site-packages/")[1].split("/")[0] for file in stack if "site-p" in file
        ]
        assert packages, (event, arguments)  # not ours
        assert set(packages) & set(KNOWN), (event, arguments, packages)


def test_the_watch_sees() -> None:
    for code in (
        "import socket; socket.socket()",
        "import subprocess; subprocess.run(['true'])",
        "open('/dev/full', 'w')",
        "import os; os.open('/dev/full', os.O_WRONLY)",
    ):
        assert watched(code, Path("/tmp")), code


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
