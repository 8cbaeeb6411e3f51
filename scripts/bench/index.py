"""Opening a data set of ImageNet-22k's size: seconds, and memory in all with workers.

The folders are real and the files are not 14 million: each class is a link to one folder of empty
files, which a walk reads again and again.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.utils.data import DataLoader

from beit.data.file_sources import ClassFolder
from beit.data.sampler import GlobalBatchSampler
from scripts.bench import processes
from scripts.bench.processes import Host
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings
from scripts.bench.timing import Step

ROW = "Index: opening a folder of as many files as ImageNet-22k has"
_CLASSES, _FILES = 21_841, 641  # 14,000,081 in all
_WORKERS, _BATCHES, _BATCH_SIZE = 4, 64, 256
OURS, TORCHVISION = "ours", "torchvision's ImageFolder, a tenth of the classes"


class Names:
    """A data set whose samples are the names of its files: what the index alone can tell."""

    def __init__(self, index: Sequence[str]) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> int:
        return len(self.index[key[1]])


class OursIndex:
    def __init__(self, root: str) -> None:
        self.source = ClassFolder(root)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> str:
        return self.source.name(index)


class TorchvisionIndex:
    def __init__(self, root: str) -> None:
        from torchvision.datasets import ImageFolder

        self.samples = ImageFolder(root).samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> str:
        return self.samples[index][0]


Index = OursIndex | TorchvisionIndex


def run(settings: Settings) -> list[Table]:
    classes, files = settings.number(_CLASSES, 20), settings.number(_FILES, 30)
    counts = {OURS: classes * files, TORCHVISION: classes // 10 * files}
    found = {}
    for name in list(counts)[: settings.number(len(counts), 1)]:
        with Host("index", [name], settings) as host:
            found[name] = host.run(name)
    workers = f"{_workers(settings)} workers"
    return [
        _table("to open", found, "opened", counts, unit="s"),
        _table("memory at most while opening", found, "opening", counts, unit="MB"),
        _table(f"memory in all with {workers} that read names", found, "in all", counts, unit="MB"),
    ]


def _table(
    what: str,
    found: dict[str, dict[str, float]],
    key: str,
    counts: dict[str, int],
    *,
    unit: str,
) -> Table:
    entries = [Entry(name, [told[key]], counts[name]) for name, told in found.items()]
    title = f"{counts[OURS]:,} paths, {what}"
    return Table(title, entries, unit=unit, work="paths", compared="of a path")


def build(settings: Settings, names: Sequence[str]) -> dict[str, Step]:
    kinds = {OURS: OursIndex, TORCHVISION: TorchvisionIndex}
    return {name: lambda kind=kinds[name]: _measure(kind, settings) for name in names}


def _measure(kind: Callable[[str], Index], settings: Settings) -> dict[str, float]:
    classes, files = settings.number(_CLASSES, 20), settings.number(_FILES, 30)
    if kind is TorchvisionIndex:
        classes //= 10
    with _folder(classes, files) as root:
        started = time.perf_counter()
        index = kind(root)
        opened = time.perf_counter() - started
    assert len(index) == classes * files
    return {
        "opened": opened,
        "opening": processes.memory()["peak"],
        "in all": _with_workers(index, _workers(settings)),
    }


def _with_workers(index: Index, workers: int) -> float:
    """MB of this process and its workers after each has read names from all over."""
    sampler = GlobalBatchSampler(
        len(index),
        batch_size=min(_BATCH_SIZE, len(index) // 8 or 1),
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
        last_batch="drop",
    )
    loader = DataLoader(Names(index), batch_sampler=sampler, num_workers=workers)
    batches = iter(loader)
    for _ in range(min(_BATCHES, len(sampler))):
        next(batches)
    children = [worker.pid for worker in batches._workers]
    return sum(processes.memory(process)["share"] for process in ["self", *children])


def _workers(settings: Settings) -> int:
    return settings.number(_WORKERS, 2)


@contextmanager
def _folder(classes: int, files: int) -> Iterator[str]:
    """root/CLASS/FILE with names as ImageNet's; each class but one is a link."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        store, root = Path(temporary, "store"), Path(temporary, "root")
        store.mkdir()
        root.mkdir()
        for number in range(files):
            (store / f"n{number:08d}_{number:05d}.JPEG").touch()
        for number in range(classes):
            os.symlink(store, root / f"n{number:08d}")
        yield str(root)
