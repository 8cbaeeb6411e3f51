"""A training step of segmentation: UPerNet, the auxiliary FCN, 150 classes, loss at full size."""

from scripts.bench import contenders, steps
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings
from scripts.bench.timing import alternate, timed

ROW = "Segmentation step, bf16, eager"


def run(settings: Settings) -> list[Table]:
    # BatchNorm needs two images
    shape = settings.shape(image_size=512, batch_size=2)
    batch = steps.segmentation_batch(shape, contenders.SEGMENTATION_CLASSES)
    built = {
        name: steps.training(builder(), *batch)
        for name, builder in contenders.segmentation(shape).items()
    }
    seconds = alternate(timed(built), rounds=settings.rounds)
    entries = [Entry(name, values, shape.batch_size) for name, values in seconds.items()]
    title = f"{shape}, UPerNet and FCN, {contenders.SEGMENTATION_CLASSES} classes"
    return [Table(title, entries, work="images")]
