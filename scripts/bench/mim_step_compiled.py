"""The MIM step with everyone's network through torch.compile."""

from torch import nn

from scripts.bench import contenders, mim_step, steps
from scripts.bench.results import Table
from scripts.bench.settings import Settings
from scripts.bench.timing import alternate, timed

ROW = "MIM step, bf16, compiled"


def run(settings: Settings) -> list[Table]:
    shape = settings.shape()
    batch = steps.mim_batch(shape)
    builders = contenders.mim(settings, shape)
    names = list(builders)[: settings.number(len(builders), 2)]
    compiled = {
        name: steps.training(_compiled(builders[name](), settings), *batch) for name in names
    }
    # the first call compiles, the second may compile again
    seconds = alternate(timed(compiled), rounds=settings.rounds, warmup=2)
    notes = contenders.original_note(settings)
    return [mim_step.table(settings, "torch.compile, in one process", seconds, notes)]


def _compiled(model: nn.Module, settings: Settings) -> nn.Module:
    """In place: ours as `compile=true` does it, each network by itself; the others as a whole."""
    networks = model.children() if isinstance(model, contenders.OursMIM) else [model]
    for network in networks:
        network.compile(backend="aot_eager" if settings.quick else "inductor")
    return model
