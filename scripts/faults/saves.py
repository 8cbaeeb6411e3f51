"""SIGKILL at a random moment of a save: no checkpoint that was whole is lost, nothing stays behind.

The child saves without a pause, through the keeper, each step twice: the second time over the file
that stands there already, as a run does that was resumed from an older one. One file is kept.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from beit.checkpoints import file as files
from beit.checkpoints.file import verify
from beit.checkpoints.folder import step_of
from beit.checkpoints.keeper import CheckpointKeeper
from beit.checkpoints.plugin import CheckpointFiles
from beit.errors import UserError
from beit.files import remove_leftovers
from scripts.faults.forked import start_forked

ROW = "SIGKILL during save"
TRIALS = 500
SHARE = 12
_LONGEST = 0.05  # seconds of saving before the kill


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    """(passed, tried, what was seen)."""
    rng = random.Random(seed)
    good, within, strays = 0, 0, 0
    for _ in range(trials):
        promised = _killed_save(folder, rng.uniform(0, _LONGEST))
        within += any(path.name.endswith(".part") for path in folder.iterdir())
        newest = _whole(folder)
        remove_leftovers(folder)  # as the next start does
        left = [path for path in folder.iterdir() if path.name.startswith(".")]
        strays += len(left)
        points = (folder / "last.safetensors").is_file()
        good += newest is not None and newest >= promised and points and not left
    return good, trials, f"{within} kills within the writing of a file, {strays} stray files"


def control(folder: Path, seed: int) -> bool:
    """Written straight to its name, as most programs do: a good checkpoint is lost."""
    rng = random.Random(seed)
    for _ in range(200):
        promised = _killed_save(folder, rng.uniform(0, _LONGEST), unsafe=True)
        newest = _whole(folder)
        if newest is None or newest < promised:
            return True
        for path in folder.iterdir():
            path.unlink()
    return False


def _killed_save(folder: Path, seconds: float, *, unsafe: bool = False) -> int:
    """Let a child save for so long; returns the newest step that it had saved before."""
    begin = max((step_of(path) for path in folder.glob("epoch*")), default=0)
    reader, writer = os.pipe()
    child = start_forked(_save_on_and_on, folder, max(begin, 0), writer, unsafe)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        first = pipe.readline()
        time.sleep(seconds)
        child.send(9)
        steps = [int(line) for line in [first, *pipe] if line.endswith(b"\n")]
    child.wait(10)
    assert steps, child
    return steps[-1]


def _save_on_and_on(folder: Path, step: int, writer: int, unsafe: bool) -> None:
    torch.manual_seed(step)
    content: dict[str, Any] = {"state_dict": {f"w{i}": torch.randn(256, 256) for i in range(8)}}
    connector = SimpleNamespace(dump_checkpoint=lambda weights_only: content)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(checkpoint_io=CheckpointFiles()),
        _checkpoint_connector=connector,
        callbacks=[],
        current_epoch=0,
        is_global_zero=True,
        world_size=1,
    )
    keeper = CheckpointKeeper(folder, keep=1)
    keeper._files = sorted(folder.glob("epoch*"))
    with straight_to_its_name() if unsafe else contextlib.nullcontext():
        while True:
            for _ in range(2):
                content["global_step"] = trainer.global_step = step
                keeper.save_now(trainer)
                os.write(writer, b"%d\n" % step)
            step += 1


@contextlib.contextmanager
def straight_to_its_name() -> Iterator[None]:
    """The fault put back: no temporary file."""

    @contextlib.contextmanager
    def straight(path: Path) -> Iterator[BinaryIO]:
        with path.open("wb") as file:
            yield file

    original, files.replacing = files.replacing, straight
    try:
        yield
    finally:
        files.replacing = original


def _whole(folder: Path) -> int | None:
    """The newest step; None where a numbered file is damaged, or there is none."""
    steps = []
    for path in folder.glob("epoch*"):
        try:
            steps.append(int(verify(path).tree()["global_step"]))
        except UserError:
            return None
    return max(steps, default=None)
