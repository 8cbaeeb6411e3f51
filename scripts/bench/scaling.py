"""How ours grows with the batch, the resolution, the model and the number of workers."""

from collections.abc import Mapping

from beit.tokenizers.dvae import DiscreteVAE
from scripts.bench import contenders, flop, own_data, steps
from scripts.bench.photographs import Photographs, photographs
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings, Shape
from scripts.bench.timing import Step, alternate, timed

ROW = "Scaling: time of a unit of work"


def run(settings: Settings) -> list[Table]:
    return [*_models(settings), _workers(settings)]


def _models(settings: Settings) -> list[Table]:
    """MIM steps; each table's ratios are of the time of an image, or of a product's operation."""
    batches = {
        f"batch {count}": settings.shape("tiny", batch_size=count)
        for count in _some(settings, (1, 4, 16, 64))
    }
    resolutions = {
        f"{size} px": settings.shape("tiny", image_size=size, batch_size=4)
        for size in _some(settings, (224, 384, 512))
    }
    sizes = {
        name: settings.shape(name, batch_size=4)
        for name in _some(settings, ("tiny", "small", "base", "large"))
    }
    return [
        _steps(settings, "MIM step, tiny, 224 px: the batch", batches, work="images"),
        _steps(settings, "MIM step, tiny, batch 4: the resolution", resolutions, work="GFLOP"),
        _steps(settings, "MIM step, 224 px, batch 4: the model", sizes, work="GFLOP"),
    ]


def _some(settings: Settings, values: tuple) -> tuple:
    return values[: settings.number(len(values), 2)]


def _steps(settings: Settings, title: str, shapes: Mapping[str, Shape], *, work: str) -> Table:
    entries = []
    # one after the other: together the large ones would not fit
    for name, shape in shapes.items():
        step = steps.training(contenders.OursMIM(shape), *steps.mim_batch(shape))
        seconds = alternate(timed({name: step}), rounds=settings.rounds)[name]
        count = flop.mim_step(shape, steps.masking(shape).target)
        done = shape.batch_size if work == "images" else count / 1e9
        entries.append(Entry(name, seconds, done, count))
    ratio = f"time of {'an image' if work == 'images' else 'a GFLOP'}"
    return Table(title, entries, work=work, precision="bf16", compared=ratio)


def _workers(settings: Settings) -> Table:
    """The loader by itself: nobody takes the cores from it."""
    shape = settings.shape(batch_size=16)
    count = settings.number(256, 6)
    source = Photographs(photographs(settings, count))
    loaders = {
        f"{workers} workers": _epoch(source, shape, workers)
        for workers in _some(settings, (0, 1, 2))
    }
    seconds = alternate(timed(loaders), rounds=settings.rounds)
    images = count - count % shape.batch_size
    entries = [Entry(name, values, images) for name, values in seconds.items()]
    return Table("loader, views of 224 and 112 px", entries, work="images", compared="time")


def _epoch(source: Photographs, shape: Shape, workers: int) -> Step:
    """Workers live on from one epoch to the next."""
    tokenizer = DiscreteVAE(
        image_size=shape.token_image_size,
        stride=8,
        vocab_size=2,
        codebook_dim=2,
        hidden_dim=8,
        num_res_blocks=0,
    )
    loader = own_data.open_loader(own_data.pretraining(source, shape, tokenizer, workers=workers))
    return lambda: [len(batch.images) for batch in loader]
