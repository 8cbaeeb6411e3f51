"""The checkpoint files in a folder: which there are, of which run and step they are."""

import re
from pathlib import Path
from typing import Any

from beit.checkpoints.file import CheckpointFile
from beit.checkpoints.header import SUFFIX
from beit.errors import UserError

LAST, BEST = f"last{SUFFIX}", f"best{SUFFIX}"
_NUMBERED = re.compile(r"epoch\d+-step\d+(-\w+)?" + re.escape(SUFFIX))


def file_name(epoch: int, step: int) -> str:
    return f"epoch{epoch:04d}-step{step:07d}{SUFFIX}"


def numbered_files(folder: Path, run_id: str) -> list[Path]:
    """The numbered files that this run wrote into a folder, by their steps."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if _NUMBERED.fullmatch(path.name) and not path.is_symlink():
            facts = header_facts(path)
            if facts is not None and facts[1] == run_id:
                found.append((facts[0], path))
    return [path for _, path in sorted(found)]


def header_facts(path: Path) -> tuple[int, str] | None:
    """(step, run id) as the header of a file has them, or None where it cannot be read."""
    try:
        return step_and_run(CheckpointFile.open(path).tree())
    except UserError:
        return None


def step_of(path: Path) -> int:
    """The optimizer steps done in a checkpoint; -1 where it is not there or cannot be read."""
    facts = header_facts(path)
    return -1 if facts is None else facts[0]


def step_and_run(tree: Any) -> tuple[int, str]:
    """(step, run id) of a checkpoint's tree; 0 and "" where they are not in it."""
    content = tree if isinstance(tree, dict) else {}
    entry = content.get("beit")
    run_id = entry.get("run_id", "") if isinstance(entry, dict) else ""
    return int(content.get("global_step", 0)), str(run_id)
