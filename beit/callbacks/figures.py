"""Figures as files: grids of images, curves of metrics. Agg only, no pyplot, no global state."""

import math
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

CELL_INCHES = 1.7
DPI = 120


def picture_grid(columns: dict[str, Tensor], *, title: str) -> Figure:
    """One row for each image, one titled column for each entry: images (B, 3, H, W) in [0, 1]."""
    rows = len(next(iter(columns.values())))
    height, width = next(iter(columns.values())).shape[-2:]
    size = (CELL_INCHES * len(columns), CELL_INCHES * rows * height / width + 0.5)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    cells = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, images) in enumerate(columns.items()):
        cells[0, column].set_title(name, fontsize=9)
        for row, image in enumerate(images):
            pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
            cells[row, column].imshow(pixels, interpolation="nearest")
            cells[row, column].set_axis_off()
    figure.suptitle(title, fontsize=9)
    return figure


def curves(series: dict[str, dict[str, tuple[list[float], list[float]]]]) -> Figure:
    """A panel for each entry, in it a line for each (steps, values) under its name."""
    num_columns = min(3, len(series))
    num_rows = math.ceil(len(series) / num_columns)
    figure = Figure(figsize=(4 * num_columns, 2.8 * num_rows), dpi=DPI, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for panel in panels[len(series) :]:
        panel.set_axis_off()
    for panel, (title, lines) in zip(panels, series.items()):
        for name, (steps, values) in sorted(lines.items()):
            # a validation curve often has few points
            marker = "o" if len(steps) < 20 else None
            panel.plot(steps, values, label=name, linewidth=1.2, marker=marker, markersize=3)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return figure


def save_figure(figure: Figure, path: Path) -> np.ndarray:
    """Write the figure as PNG; returns its pixels (H, W, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
