"""The whole pretraining step: JPEG bytes, two views, masks, tokenizer, network, optimizer."""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch.utils.data import DataLoader

from scripts.bench import contenders, dalle, flop, literal, own_data, steps
from scripts.bench.photographs import Photographs, photographs
from scripts.bench.processes import Host
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings
from scripts.bench.timing import Step, alternate, timed

ROW = "Whole pretraining step from JPEG bytes, bf16, no workers"
# the data module's options, and whether the views are the fast ones
OURS: dict[str, tuple[bool, bool]] = {
    "ours": (False, False),
    "ours, fast views": (True, False),
    "ours, token cache filled": (False, True),
    "ours, fast views, token cache filled": (True, True),
}
ORIGINAL = "the original's way"
_folders: list[tempfile.TemporaryDirectory] = []  # of token caches, until the process ends


def run(settings: Settings) -> list[Table]:
    names = [*OURS, ORIGINAL]
    together = alternate(timed(build(settings, names)), rounds=settings.rounds)
    tables = [_table(settings, "in one process", together)]
    if not settings.quick:
        tables.append(_table(settings, "each in a process of its own", _apart(settings)))
    return tables


def build(settings: Settings, names: Sequence[str]) -> dict[str, Step]:
    """The forms of ours share one network."""
    shape = settings.shape()
    builders = contenders.mim(settings, shape)
    chosen = [name for name in names if name in OURS]
    found: dict[str, Step] = {}
    if chosen:
        step, tokenizer = steps.TrainingStep(builders["ours"]()), dalle.ours()
        for name in chosen:
            found[name] = _ours(settings, step, tokenizer, *OURS[name])
    if ORIGINAL in names:
        model = builders[list(builders)[-1]]()
        found[ORIGINAL] = _original(settings, steps.TrainingStep(model), dalle.Package())
    return found


def _ours(
    settings: Settings,
    step: steps.TrainingStep,
    tokenizer: dalle.DalleTokenizer,
    fast: bool,
    cached: bool,
) -> Step:
    source = Photographs(_photographs(settings))
    options: dict[str, object] = {}
    if cached:
        _folders.append(tempfile.TemporaryDirectory(prefix="bench-"))
        options = {"views_per_image": 1, "token_cache": _folders[-1].name}
    data = own_data.pretraining(source, settings.shape(), tokenizer, fast=fast, **options)
    if cached:
        data.fill_caches(torch.device("cpu"), rank=0, world_size=1)
    batches = own_data.endless(own_data.open_loader(data))

    def run_step() -> None:
        batch = data.on_after_batch_transfer(next(batches), 0)
        step(batch.images, batch.mask, batch.token_ids)

    return run_step


def _original(settings: Settings, step: steps.TrainingStep, tokenizer: dalle.Package) -> Step:
    shape = settings.shape()
    target = steps.masking(shape, exact=False).target
    samples = literal.Samples(
        _photographs(settings), literal.Views(shape), literal.Masks(shape.grid, target)
    )
    loader = DataLoader(samples, batch_size=shape.batch_size, shuffle=True, drop_last=True)
    batches = _endless(loader)

    def run_step() -> None:
        images, token_images, mask = next(batches)
        step(images, mask.bool(), tokenizer(token_images))

    return run_step


def _endless(loader: DataLoader) -> Iterator[list[torch.Tensor]]:
    for _ in itertools.count():
        yield from loader


def _photographs(settings: Settings) -> list[bytes]:
    return photographs(settings, 2 * settings.shape().batch_size)


def _apart(settings: Settings) -> dict[str, list[float]]:
    """All of ours in one process, that keeps the memory that was freed; the original in another."""
    ours = Host("pretraining_step", list(OURS), settings, keep_freed=True)
    original = Host("pretraining_step", [ORIGINAL], settings)
    with ExitStack() as stack:
        stack.enter_context(ours)
        stack.enter_context(original)
        calls = {name: lambda n=name: ours.seconds(n) for name in OURS}
        calls[ORIGINAL] = lambda: original.seconds(ORIGINAL)
        return alternate(calls, rounds=settings.rounds)


def _table(settings: Settings, how: str, seconds: dict[str, list[float]]) -> Table:
    shape = settings.shape()
    # of the network alone: what a step cannot do without
    count = flop.mim_step(shape, steps.masking(shape).target)
    entries = [Entry(name, values, shape.batch_size, count) for name, values in seconds.items()]
    return Table(
        f"{shape}, {how}",
        entries,
        work="images",
        precision="bf16",
        notes=[
            *contenders.original_note(settings),
            *filter(None, [dalle.note()]),
            "The share of the ceiling counts the network's products, not the tokenizer's.",
        ],
    )
