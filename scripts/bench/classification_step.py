"""A training step of the classifier: label smoothing, no mixing."""

from scripts.bench import contenders, flop, steps
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings
from scripts.bench.timing import alternate, timed

ROW = "Classification step, bf16, eager"


def run(settings: Settings) -> list[Table]:
    shape = settings.shape()
    batch = steps.labelled_batch(shape, contenders.CLASSES)
    built = {
        name: steps.training(builder(), *batch)
        for name, builder in contenders.classification(shape).items()
    }
    seconds = alternate(timed(built), rounds=settings.rounds)
    count = flop.classification_step(shape, contenders.CLASSES)
    entries = [Entry(name, values, shape.batch_size, count) for name, values in seconds.items()]
    title = f"{shape}, {contenders.CLASSES:,} classes"
    return [Table(title, entries, work="images", precision="bf16")]
