"""Figures as files: grids of images, curves of metrics. Agg only, no pyplot, no global state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

CELL_INCHES = 1.7
DPI = 120
LEGEND_COLUMNS, LEGEND_INCHES = 4, 0.16
BAR_INCHES = 0.16


Pictures = Tensor | Sequence[Tensor]  # (B, 3, H, W) in [0, 1], or B of (3, H, W)
Legend = Sequence[tuple[str, tuple[float, float, float]]]  # names and their RGB colours in [0, 1]


def picture_grid(columns: Mapping[str, Pictures], *, title: str, legend: Legend = ()) -> Figure:
    """One row for each image, one titled column for each entry, and below what colours mean."""
    first = next(iter(columns.values()))
    rows = len(first)
    heights = [image.shape[-2] / image.shape[-1] for image in first]
    below = LEGEND_INCHES * math.ceil(len(legend) / LEGEND_COLUMNS)
    size = (CELL_INCHES * len(columns), CELL_INCHES * sum(heights) + below + 0.5)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    cells = figure.subplots(rows, len(columns), squeeze=False, height_ratios=heights)
    for column, (name, images) in enumerate(columns.items()):
        cells[0, column].set_title(name, fontsize=9)
        for row, image in enumerate(images):
            pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
            cells[row, column].imshow(pixels, interpolation="nearest")
            cells[row, column].set_axis_off()
    figure.suptitle(title, fontsize=9)
    if legend:
        patches = [  # with an edge: white is a colour too
            Patch(facecolor=colour, edgecolor="grey", linewidth=0.5, label=name)
            for name, colour in legend
        ]
        figure.legend(
            handles=patches,
            loc="outside lower center",
            ncols=LEGEND_COLUMNS,
            fontsize=6,
            frameon=False,
        )
    return figure


def bars(values: Sequence[tuple[str, float | None]], *, title: str, mean: float) -> Figure:
    """A horizontal bar for each name, in [0, 1], and a line at the mean; None has no bar."""
    size = (5, 0.5 + max(1.0, BAR_INCHES * len(values)))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panel = figure.subplots()
    places = range(len(values))
    panel.barh(places, [value or 0.0 for _, value in values], height=0.7)
    panel.set_yticks(places, [name for name, _ in values], fontsize=6)
    panel.invert_yaxis()
    for place, (_, value) in zip(places, values):
        text = "none" if value is None else f"{value:.3f}"
        panel.text((value or 0.0) + 0.01, place, text, va="center", fontsize=6)
    panel.axvline(mean, linewidth=0.8, linestyle="--", color="black")
    panel.set_xlim(0, 1.12)
    panel.margins(y=0.01)
    panel.tick_params(axis="x", labelsize=6)
    panel.set_title(title, fontsize=9)
    return figure


def curves(
    series: dict[str, dict[str, tuple[list[float], list[float]]]],
    *,
    x: str = "step",
    dashed: str = "",
) -> Figure:
    """A panel for each entry, in it a line for each (steps, values) under its name.

    A name that ends in `dashed` has the colour of the same name without it.
    """
    num_columns = min(3, len(series))
    num_rows = math.ceil(len(series) / num_columns)
    figure = Figure(figsize=(4 * num_columns, 2.8 * num_rows), dpi=DPI, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for panel in panels[len(series) :]:
        panel.set_axis_off()
    for panel, (title, lines) in zip(panels, series.items()):
        colours: dict[str, str] = {}
        for name, (steps, values) in sorted(lines.items()):
            base = name.removesuffix(dashed)
            look = {"color": colours.setdefault(base, f"C{len(colours)}")}
            look["linestyle"] = "-" if base == name else "--"
            # a validation curve often has few points
            marker = "o" if len(steps) < 20 else None
            panel.plot(
                steps, values, label=name, linewidth=1.2, marker=marker, markersize=3, **look
            )
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(x, fontsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, framealpha=0.6)
    return figure


def save_figure(figure: Figure, path: Path) -> np.ndarray:
    """Write the figure as PNG; returns its pixels (H, W, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
