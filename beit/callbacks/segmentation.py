"""What a segmentation run shows: images with their classes in colour, and every class's scores."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from beit.callbacks.figures import Legend, bars
from beit.callbacks.figures import Pictures as Pixels
from beit.callbacks.pictures import Pictures, publish, publish_metrics, publish_table
from beit.data.batches import SegmentationBatch
from beit.data.label_maps import IGNORED
from beit.files import replace_text
from beit.loggers.guard import Guard

LONGEST = 480  # pixels on a side that are drawn of a label map
NAMED = 24  # classes in the legend, the commonest


class SegmentationPictures(Pictures):
    """Image, truth and prediction side by side in the colours of the data set, with a legend.

    Needs `task.predict(image, size)`, and of the data module `palette` (K, 3) uint8, `classes` and
    `denormalize(images) -> [0, 1]`.
    """

    name = "segmentation"

    def columns(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Pixels]:
        task: Any = pl_module
        sample: SegmentationBatch = self._sample
        data: Any = trainer.datamodule
        images = [image.to(pl_module.device) for image in sample.images]
        truth = [shrunk(labels) for labels in sample.labels]
        sizes = [(labels.shape[0], labels.shape[1]) for labels in sample.labels]
        found = [shrunk(task.predict(*pair)).cpu() for pair in zip(images, sizes, strict=True)]
        self._ids = torch.cat([ids.flatten().long() for ids in (*truth, *found)])
        return {
            "image": [data.denormalize(image).clamp(0, 1) for image in images],
            "truth": [coloured(ids, data.palette) for ids in truth],
            "prediction": [coloured(ids, data.palette) for ids in found],
        }

    def legend(self, trainer: L.Trainer) -> Legend:
        data: Any = trainer.datamodule
        counts = torch.bincount(self._ids - IGNORED, minlength=len(data.palette) + 1)
        commonest = counts[1:].argsort(descending=True)[:NAMED].sort().values.tolist()
        names = data.classes or [str(number) for number in range(len(data.palette))]
        colours = [tuple(colour) for colour in (data.palette / 255).tolist()]
        named = [(names[i], colours[i]) for i in commonest if counts[i + 1]]
        return [*named, ("no label", (1.0, 1.0, 1.0))] if counts[0] else named


class ClassTable(L.Callback):
    """Every class's IoU and accuracy of the latest validation, as `<folder>/classes.csv`.

    In TensorBoard (as text) and W&B the table as well; and as bars there and in `<folder>/figures`.
    Each class's IoU over time is `iou/<class>` in every logger.
    Needs `task.scores` and `task.table`.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._guard = Guard("drawing", lost="pictures of class_iou")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        task: Any = pl_module
        data: Any = trainer.datamodule
        if trainer.sanity_checking or not trainer.is_global_zero or task.scores is None:
            return
        rows = task.table(data.classes)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["step", *rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": trainer.global_step, **row} for row in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "classes.csv", text.getvalue())
        scores = {f"iou/{row['class']}": row["iou"] for row in rows if row["iou"] is not None}
        publish_metrics(trainer, scores)
        publish_table(trainer, "classes", rows)
        self._guard(self._draw, trainer, rows, task.scores.mean_iou)

    def _draw(self, trainer: L.Trainer, rows: list[dict[str, Any]], mean: float) -> None:
        title = f"IoU after step {trainer.global_step}, mean {mean:.3f}"
        figure = bars([(row["class"], row["iou"]) for row in rows], title=title, mean=mean)
        publish(trainer, "class_iou", figure, self.folder / "figures")


def coloured(ids: Tensor, palette: Any) -> Tensor:
    """Class ids (H, W) on the CPU -> (3, H, W) in [0, 1]; what has no label is white."""
    colours = torch.ones(len(palette) + 1, 3)
    colours[1:] = torch.tensor(palette) / 255  # a copy: the palette may be read-only
    return colours[ids.long() - IGNORED].permute(2, 0, 1)


def shrunk(ids: Tensor) -> Tensor:
    """Every n-th pixel of (H, W), so that neither side is longer than is drawn."""
    step = math.ceil(max(ids.shape) / LONGEST)
    return ids[::step, ::step]
