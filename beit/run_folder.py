"""The folder of one run: claimed once, never written over, and able to say where it came from."""

import json
import logging
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from beit.errors import UserError

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
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


def check_free(folder: Path, *, resume: str | None) -> None:
    """Raises UserError where another run lives in the folder of a new one."""
    if holds_a_run(folder) and resume is None:
        raise UserError(
            f"{folder} already holds a run: give this one another name (name=...), go on with "
            "that one (resume=auto), or move it away"
        )


def make(folder: Path) -> None:
    """Make the folder of a run; UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"paths.output_dir={folder} cannot be made ({error.strerror}): choose another folder"
        ) from error


def resume_from(folder: Path, resume: str | None) -> str | None:
    """The checkpoint to go on from, None for a fresh start.

    `auto` takes the last one of this folder and says so where there is none yet, so that one
    command line serves the first start and every restart.
    """
    if resume is None:
        return None
    path = folder / LAST_CHECKPOINT if resume == "auto" else Path(resume).expanduser()
    if path.is_file():
        log.info("resuming from %s", path)
        return str(path)
    if resume == "auto":
        log.warning("resume=auto: no checkpoint in %s yet, this run starts at step 0", folder)
        return None
    raise UserError(
        f"resume={resume}: no such checkpoint; resume=auto takes the last one of {folder}"
    )


def describe_environment() -> dict[str, Any]:
    """Command, versions, machine and commit, as far as they can be known."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "packages": packages,
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
        },
        "commit": _commit(),
    }


def write_environment(folder: Path) -> None:
    text = json.dumps(describe_environment(), indent=2)
    (folder / "environment.json").write_text(text + "\n", encoding="utf-8")


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
