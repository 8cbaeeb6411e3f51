"""Peak memory of the MIM step, each contender in a process of its own."""

from scripts.bench import contenders
from scripts.bench.processes import Host
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings

ROW = "Peak memory of the MIM step, bf16, eager"
_STEPS = 3  # the optimizer's state is there from the first one on, malloc settles in the next


def run(settings: Settings) -> list[Table]:
    shape = settings.shape()
    names = list(contenders.mim(settings, shape))[: settings.number(4, 1)]
    ways = [(name, name, name == "ours") for name in names]
    if not settings.quick:
        ways[1:1] = [
            ("ours, freed memory given back", "ours", False),
            (contenders.CHECKPOINTED, contenders.CHECKPOINTED, True),
        ]
    found = {shown: _peak(settings, name, keep) for shown, name, keep in ways}
    return [
        Table(
            f"{shape}, the whole process",
            [Entry(name, [told["peak"]]) for name, told in found.items()],
            unit="MB",
        ),
        Table(
            "the same without what Python and torch take before",
            [Entry(name, [told["peak"] - told["begin"]]) for name, told in found.items()],
            unit="MB",
            notes=contenders.original_note(settings),
        ),
    ]


def _peak(settings: Settings, name: str, keep_freed: bool) -> dict[str, float]:
    with Host("mim_step", [name], settings, keep_freed=keep_freed) as host:
        return [host.run(name) for _ in range(settings.number(_STEPS, 1))][-1]
