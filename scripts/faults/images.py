"""Mutated, crafted and awkward image files through a loader with two workers."""

import hashlib
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from beit.console import quiet_pillow
from beit.data.batches import PixelBatch
from beit.data.dataset import Collate, KeyedDataset, PixelSample
from beit.data.file_sources import _Files
from beit.data.images import UnreadableImage, open_rgb
from beit.data.sampler import GlobalBatchSampler
from beit.data.unreadable import UnreadableImages, read_record
from beit.data.views import PixelTransform
from beit.data.workers import WatchedLoader
from scripts.faults import mutants

ROW = "mutated and awkward images, 2 workers"
TRIALS = 3000
SHARE = 90

BATCH = 8
MEMORY_MIB = 400  # that a worker may take at its peak, above what it began with


class Files(_Files):
    """These files, whatever they are, and no labels."""

    classes = labels = None

    def __init__(self, root: Path, files: list[str]) -> None:
        super().__init__(root, files)


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    """Every file comes out as pixels or is named, the same way twice; no worker ends or swells."""
    logging.getLogger("beit.data.unreadable").setLevel(logging.ERROR)  # thousands of lines
    quiet_pillow()
    source = make(folder, trials, seed)
    truth = [_reading(source, index) for index in range(len(source))]
    first, workers = _load(source, folder, seed)
    again, more = _load(source, folder, seed + 1)
    recorded = {int(entry["index"]) for entry in read_record(folder / "unreadable.jsonl")}
    passed = 0
    for index, (readable, name) in enumerate(truth):
        came = first.get(index)
        as_expected = (came is not None) == readable and came == again.get(index)
        named = readable or (index in recorded and name == source.name(index))
        passed += as_expected and named
    dead = sum(worker.ended for worker in (*workers, *more))
    swollen = max(worker.grown_mib for worker in (*workers, *more))
    if dead or swollen > MEMORY_MIB:
        passed = 0
    readable = sum(fine for fine, _ in truth)
    return (
        passed,
        len(truth),
        f"{readable} readable, {len(truth) - readable} named and replaced, {dead} dead workers, "
        f"a worker grew by {swollen:.0f} MiB at most",
    )


def control(folder: Path, seed: int) -> bool:
    """Opened as a tutorial would, the first broken file ends the loading."""
    root = folder / "images"
    root.mkdir()
    whole = mutants.encodings()["png"]
    names = [f"{number}.png" for number in range(16)]
    for number, name in enumerate(names):
        (root / name).write_bytes(whole if number < 12 else whole[: len(whole) // 2])

    class Plain(Files):
        def load(self, index: int) -> tuple[Image.Image, int | None]:
            return Image.open(self.root / self._files[index]).convert("RGB"), None

    plain = Plain(root, names)
    data = KeyedDataset(plain, _views(), seed=seed)
    loader = DataLoader(
        data, batch_sampler=_sampler(len(plain), seed), num_workers=2, collate_fn=_collate
    )
    try:
        sum(1 for _ in loader)
    except (RuntimeError, OSError, TypeError, AttributeError):
        return True
    return False


def make(folder: Path, trials: int, seed: int) -> Files:
    """The awkward and crafted files and mutants, `trials` in all; beside them two thirds as many
    whole ones, to stand in for the others."""
    root = folder / "images"
    names = [path.name for path in mutants.awkward(root)]
    whole = mutants.encodings()
    contents: dict[str, bytes] = {f"crafted-{k}.jpg": v for k, v in mutants.crafted().items()}
    kinds = sorted(whole)
    for number in range(max(0, trials - len(contents) - len(names))):
        kind = kinds[number % len(kinds)]
        data = mutants.mutate(whole[kind], random.Random(f"{seed} {number}"))
        contents[f"mutant-{number}-{kind}\x1b[31m.jpg"] = data  # a name that would colour the log
    for number in range(2 * trials // 3):
        contents[f"whole-{number}.jpg"] = whole[kinds[number % len(kinds)]]
    for name, data in contents.items():
        (root / name).write_bytes(data)
    return Files(root, [*names, *contents])


def _reading(source: Files, index: int) -> tuple[bool, str]:
    """Whether it can be read, and its name if not; in this process, without any loader."""
    try:
        open_rgb(source.root / source._files[index], source.name(index)).close()
    except UnreadableImage as error:
        return False, error.name
    return True, ""


class _Worker:
    """What became of one."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.began = _memory_mib(process.pid, "VmRSS")
        self.grown_mib, self.ended = 0.0, False

    def look(self) -> None:
        self.ended |= self.process.exitcode is not None
        if not self.ended:
            self.grown_mib = _memory_mib(self.process.pid, "VmHWM") - self.began


def _load(source: Files, folder: Path, seed: int) -> tuple[dict[int, str], list[_Worker]]:
    """Digest of the pixels of each file that could be read, and the workers that read them."""
    loader = WatchedLoader(
        KeyedDataset(source, _views(), seed=0),
        batch_sampler=_sampler(len(source), seed),
        num_workers=2,
        collate_fn=_collate,
        limit=120.0,
        persistent_workers=True,
    )
    unreadable = UnreadableImages(limit=len(source))
    unreadable.record_in(folder, rank=0)
    came: dict[int, str] = {}
    batches = iter(loader)
    workers = [_Worker(process) for process in loader.workers()]
    for batch in batches:
        for pixels, index, failed in zip(batch.images, batch.indices, batch.failed):
            if failed >= 0:
                unreadable.meet(source, "training", int(failed), loader.reasons[int(failed)])
            else:
                came[int(index)] = _digest(pixels)
        for worker in workers:
            worker.look()
    return came, workers


_collate: Callable[[Any], Any] = Collate(PixelBatch)


def _views() -> PixelSample:
    return PixelSample(PixelTransform(image_size=(16, 24)))


def _sampler(size: int, seed: int) -> GlobalBatchSampler:
    return GlobalBatchSampler(
        size, batch_size=BATCH, rank=0, world_size=1, seed=seed, shuffle=False, last_batch="even"
    )


def _digest(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def _memory_mib(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no {field} of process {os.getpid()}")
