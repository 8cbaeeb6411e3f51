"""Choosing among layers and settings without a look at the images that are measured on."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit.errors import UserError

HELD_OUT, MEASURED = "held_out_acc", "val_acc"  # columns of a report
Series = dict[str, dict[str, tuple[list[float], list[float]]]]


@dataclass(frozen=True)
class Report:
    """What an evaluation found: plain data.

    Args:
        name: of the evaluation, for files.
        rows: of a table; each has `layer`.
        summary: of the whole, the best layer with what it was chosen on.
        series: panel -> line -> (layers, values), to be drawn.
    """

    name: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    series: Series = field(default_factory=dict)


def check_share(share: float) -> float:
    if not 0 < share < 1:
        raise UserError(f"held_out {share} must lie in (0, 1): a share of the training images")
    return share


def held_out(labels: Tensor, share: float, *, seed: int) -> Tensor:
    """(n,) bool, True for the images that are held out: that share of each class, at least one.

    The last image of a class is never held out. Raises UserError where no class has two.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    noise = np.random.PCG64((seed, 0xC405E)).random_raw(len(labels))
    order = torch.from_numpy(np.argsort(noise, kind="stable"))
    for number in labels.unique().tolist():
        members = order[labels[order] == number]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen[members[:count]] = True
    if not bool(chosen.any()):
        raise UserError(
            f"{len(labels)} labelled training images, one of each class: none can be held out to "
            "choose the layer by; give more of them"
        )
    return chosen


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share in [0, 1]."""
    return (predicted.cpu() == labels).double().mean().item()


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the highest accuracy on the images held out; of equals the first."""
    return max(rows, key=lambda row: row[HELD_OUT])


def summary(rows: list[dict[str, Any]], mask: Tensor, measured: int) -> dict[str, Any]:
    """The chosen row, and on how many images it was chosen and measured."""
    row = best(rows)
    return {
        **row,
        "chosen_on": f"{int(mask.sum())} of the {len(mask)} training images, held out",
        "measured_on": f"{measured} validation images",
        "standard_error": math.sqrt(row[MEASURED] * (1 - row[MEASURED]) / measured),
    }


def by_layer(rows: list[dict[str, Any]], value: str, line: str) -> dict[str, tuple[list, list]]:
    """Lines of a panel: one for each value of the column `line`."""
    lines: dict[str, tuple[list, list]] = {}
    for row in rows:
        layers, values = lines.setdefault(str(row[line]) if line else value, ([], []))
        layers.append(row["layer"])
        values.append(row[value])
    return lines
