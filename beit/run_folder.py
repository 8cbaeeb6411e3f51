"""The folder of one run: claimed once, never written over, and able to say where it came from."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from beit.errors import UserError
from beit.security.secrets import shown_words

CONFIG_FILE = "config.yaml"
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
    if resume != "auto" and folder.resolve() not in Path(resume).expanduser().resolve().parents:
        raise UserError(
            f"{folder} already holds a run, and resume={resume} is of another: give this one "
            "another name (name=...), or go on with that one under its own name"
        )


def make(folder: Path) -> None:
    """Make the folder of a run; UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"paths.output_dir={folder} cannot be made ({error.strerror}): choose another folder"
        ) from error


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
        path.write_text(text, encoding="utf-8")


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
