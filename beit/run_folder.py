"""The folder of one run: claimed once, never written over, and able to say where it came from."""

import contextlib
import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from beit.errors import UserError
from beit.files import explained, remove_leftovers, replace_text
from beit.security.secrets import shown_words

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
_PACKAGES = (
    "beit",
    "torch",
    "torchvision",
    "lightning",
    "hydra-core",
    "omegaconf",
    "timm",
    "torchmetrics",
    "numpy",
    "pillow",
)


def holds_a_run(folder: Path) -> bool:
    """Whether a run was started in this folder."""
    return (folder / CONFIG_FILE).exists() or (folder / "checkpoints").exists()


def is_first_process() -> bool:
    """Whether this process is the job's first, also before there is a trainer to ask."""
    # started by hand, each node's first process has no rank yet, only the number of its node
    nodes = (os.environ.get(name, "0") for name in ("NODE_RANK", "GROUP_RANK"))
    return rank_zero_only.rank == 0 and all(node == "0" for node in nodes)


def check_free(folder: Path, *, resume: str | None) -> None:
    """Raises UserError where another run lives in the folder of this one."""
    if not holds_a_run(folder):
        return
    if resume is None:
        raise UserError(
            f"{folder} already holds a run: give this one another name (name=...), go on with "
            "that one (resume=auto), or move it away"
        )
    path = Path(resume).expanduser()
    parents = {*path.absolute().parents, *path.resolve().parents}  # a folder in it may be a link
    if resume != "auto" and parents.isdisjoint({folder.absolute(), folder.resolve()}):
        raise UserError(
            f"{folder} already holds a run, and resume={resume} is of another: give this one "
            "another name (name=...), or go on with that one under its own name"
        )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder of a run, and hold it for this process alone.

    The lock is the process's own: it goes with it, whatever workers it leaves behind.

    Raises UserError where the folder cannot be made or written to, or another process has it.
    """
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"paths.output_dir={folder} cannot be made or written to ({error.strerror}): choose "
            "another folder"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by another process ({file.read().strip()}): wait for its end, "
                "or give this run another name (name=...)"
            ) from error
        except OSError:
            log.warning("%s cannot be locked: see to it that no other job runs in it", folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        remove_leftovers(folder)
        yield


def describe_environment() -> dict[str, Any]:
    """Command, versions, machine and commit, as far as they can be known."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "command": " ".join(shown_words(sys.argv)),
        "python": platform.python_version(),
        "packages": packages,
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
        },
        "commit": _commit(),
    }


def write_records(folder: Path, config: str) -> None:
    """The resolved config (YAML) and the environment; those of a resumed run stand beside them."""
    environment = json.dumps(describe_environment(), indent=2) + "\n"
    for name, text in ((CONFIG_FILE, config), ("environment.json", environment)):
        path, number = folder / name, 0
        while path.exists():
            number += 1
            path = (folder / name).with_suffix(f".resumed-{number}{Path(name).suffix}")
        with explained(path):
            replace_text(path, text)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str:
    """The commit of the checkout that the package lies in, with a mark where it was changed."""
    source = Path(__file__).resolve().parent
    if not (source.parent / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
