"""The run's curves as one picture."""

import math
from pathlib import Path

import lightning as L

from beit.callbacks.figures import curves, save_figure
from beit.callbacks.metrics_file import read_metrics
from beit.loggers.guard import Guard


class Curves(L.Callback):
    """Draws `<folder>/curves.png` from the metrics file when training ends.

    A metric has one panel, with a line for training and one for validation. Without the csv
    logger there is no file, and nothing is drawn.

    Args:
        metrics_file: what the csv logger writes.
        folder: for the picture.
    """

    def __init__(self, metrics_file: str, folder: str) -> None:
        self.metrics_file = Path(metrics_file)
        self.folder = Path(folder)
        self._guard = Guard("drawing", lost="curves")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.metrics_file.is_file():
            self._guard(self._draw)

    def _draw(self) -> None:
        series = collect(read_metrics(self.metrics_file))
        if series:
            save_figure(curves(series), self.folder / "curves.png")


def collect(
    rows: list[dict[str, str]],
) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Metric -> {"train" | "val" | "probe": (steps, values)}, steps ascending.

    Of two rows for the same step the later is kept.

    The mean over an epoch (`_epoch`) is left out where there is one value for each step too.
    """
    points: dict[str, dict[str, dict[float, float]]] = {}
    for row in rows:
        for name, text in row.items():
            stage, _, metric = name.partition("/")
            if stage not in ("train", "val", "probe") or not text or metric.endswith("_epoch"):
                continue
            value = float(text)
            if math.isfinite(value):
                line = points.setdefault(metric.removesuffix("_step"), {}).setdefault(stage, {})
                line[float(row["step"])] = value
    return {
        metric: {stage: _unzip(line) for stage, line in lines.items()}
        for metric, lines in sorted(points.items())
    }


def _unzip(line: dict[float, float]) -> tuple[list[float], list[float]]:
    steps = sorted(line)
    return steps, [line[step] for step in steps]
