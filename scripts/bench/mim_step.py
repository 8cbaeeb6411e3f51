"""The MIM step: forward, backward and optimizer, on images and token ids that are there."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from scripts.bench import contenders, flop, steps
from scripts.bench.processes import Host
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings
from scripts.bench.timing import Step, alternate, timed

ROW = "MIM step, bf16, eager"


def run(settings: Settings) -> list[Table]:
    names = list(contenders.mim(settings, settings.shape()))
    notes = contenders.original_note(settings)
    if settings.quick:  # there the row `memory` opens processes
        together = alternate(timed(build(settings, names)), rounds=settings.rounds)
        return [table(settings, "in one process", together, notes)]
    found = {"in one process": _together, "each in a process of its own": _apart}
    return [table(settings, how, measure(settings, names), notes) for how, measure in found.items()]


def build(settings: Settings, names: Sequence[str]) -> dict[str, Step]:
    shape = settings.shape()
    builders, batch = contenders.mim(settings, shape), steps.mim_batch(shape)
    builders[contenders.CHECKPOINTED] = partial(contenders.OursMIM, shape, checkpointing=True)
    return {name: steps.training(builders[name](), *batch) for name in names}


def table(
    settings: Settings, how: str, seconds: dict[str, list[float]], notes: Sequence[str]
) -> Table:
    """Of contenders' steps on `steps.mim_batch`."""
    shape = settings.shape()
    count = flop.mim_step(shape, steps.masking(shape).target)
    entries = [Entry(name, values, shape.batch_size, count) for name, values in seconds.items()]
    title = f"{shape}, {how}"
    return Table(title, entries, work="images", precision="bf16", notes=notes)


def _together(settings: Settings, names: list[str]) -> dict[str, list[float]]:
    """In one process, whose memory is free again for those that follow."""
    with Host("mim_step", names, settings) as host:
        calls = {name: lambda n=name: host.seconds(n) for name in names}
        return alternate(calls, rounds=settings.rounds)


def _apart(settings: Settings, names: list[str]) -> dict[str, list[float]]:
    """As users run them: ours lets the process keep the memory that was freed."""
    hosts = [
        (name, Host("mim_step", [name], settings, keep_freed=name == "ours")) for name in names
    ]
    with ExitStack() as stack:
        opened = {name: stack.enter_context(host) for name, host in hosts}
        calls = {name: lambda h=host, n=name: h.seconds(n) for name, host in opened.items()}
        return alternate(calls, rounds=settings.rounds)
