"""From the weights of one stage or grid to the model of the next."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.table import Table
from torch import Tensor

from beit.errors import UserError
from beit.models.position import (
    relative_table_rows,
    resize_position_embedding,
    resize_relative_table,
)
from beit.models.vit import VisionTransformer

TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"
INDEX = "relative_position_index"  # recomputed from the grid, never loaded


@dataclass
class TransferReport:
    """What became of every tensor: of the source (first four and `unexpected`) and of the model.

    Attributes:
        loaded: taken as they are.
        resized: key, shape before, shape after.
        copied: key of the source, keys of the model it was cloned into.
        missing: keys of the model that no tensor served; they keep their initialisation.
        unexpected: keys of the source that the model has no place for, heads among them.
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    copied: list[tuple[str, list[str]]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str, str]]:
        """(what happened, how many tensors, which) of every kind that occurred."""
        copied = [f"{key} -> {abbreviate(targets)}" for key, targets in self.copied]
        resized = [f"{key} {list(old)} -> {list(new)}" for key, old, new in self.resized]
        kinds = {
            "loaded": (len(self.loaded), abbreviate(self.loaded)),
            "copied": (len(self.copied), "; ".join(copied)),
            "resized": (len(self.resized), "; ".join(resized)),
            # what was not carried over is never cut short
            "fresh (missing)": (len(self.missing), abbreviate(self.missing, limit=0)),
            "not used (unexpected)": (len(self.unexpected), abbreviate(self.unexpected, limit=0)),
        }
        return [(kind, str(count), which) for kind, (count, which) in kinds.items() if count]

    def __rich__(self) -> Table:
        table = Table("weights", "tensors", "which", title="weights transferred")
        for row in self.rows():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        return "\n".join(f"{kind:22}{count:>5}  {which}" for kind, count, which in self.rows())


def adapt_backbone(
    state_dict: Mapping[str, Tensor],
    model: VisionTransformer,
    *,
    source_grid: tuple[int, int] | None = None,
) -> tuple[dict[str, Tensor], TransferReport]:
    """Weights of another stage or grid, made to fit `model`; load them with `strict=False`.

    A shared bias table is cloned into each block if the model keeps one per block; bias tables and
    absolute positions are resized to the model's grid, tables geometrically; index buffers are
    dropped; tensors of heads and of parts the model lacks are listed and left out. Neither
    argument is changed.

    Args:
        state_dict: released names, without prefix.
        source_grid: patch grid (h, w) of the weights. Without it the positions tell: the model's
            own grid if their number agrees (as it does of 3x5 and 5x3), else a square one.

    Raises:
        UserError: width, depth, patch size or heads differ, no grid explains the positions, or
            nothing fits.
    """
    source = {key: value for key, value in state_dict.items() if not key.endswith(INDEX)}
    wanted = model.state_dict()
    report = TransferReport()
    _check_depth(source, model)
    _share_table(source, wanted, report)
    grid = source_grid or _find_grid(source, model.grid)
    adapted: dict[str, Tensor] = {}
    for key, value in source.items():
        if key not in wanted:
            report.unexpected.append(key)
            continue
        resized = _resize(key, value, grid, model.grid)
        if resized.shape != wanted[key].shape:
            raise UserError(
                f"{key} has shape {list(value.shape)} in the weights and"
                f" {list(wanted[key].shape)} in the model; use weights of the same width, heads"
                f" and patch size (grid of the weights {grid}, of the model {model.grid})"
            )
        if resized is not value:
            report.resized.append((key, tuple(value.shape), tuple(resized.shape)))
        elif not any(key in targets for _, targets in report.copied):
            report.loaded.append(key)
        adapted[key] = resized
    if not adapted:
        raise UserError(
            f"none of the {len(state_dict)} tensors ({abbreviate(list(state_dict))}) belongs to a"
            " vision transformer; check the file and its key prefix"
        )
    report.missing = [key for key in wanted if key not in adapted]
    return adapted, report


def _find_grid(state_dict: Mapping[str, Tensor], model_grid: tuple[int, int]) -> tuple[int, int]:
    """Grid of the weights by the number of their positions; the model's if they have none."""
    for key, value in state_dict.items():
        if key.endswith(TABLE):
            side, positions = (math.isqrt(max(value.shape[0] - 3, 1)) + 1) // 2, value.shape[0]
            count = relative_table_rows
        elif key == "pos_embed":
            side, positions = math.isqrt(value.shape[1] - 1), value.shape[1]
            count = _absolute_rows
        else:
            continue
        for grid in (model_grid, (side, side)):
            if count(grid) == positions:
                return grid
        raise UserError(
            f"{key} has {positions} rows, which neither the model's grid {model_grid} nor a square"
            " one explains; give source_grid, the patch grid the weights were trained on"
        )
    return model_grid


def _absolute_rows(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1] + 1


def _share_table(
    source: dict[str, Tensor], wanted: Mapping[str, Tensor], report: TransferReport
) -> None:
    targets = [key for key in wanted if key.startswith("blocks.") and key.endswith(TABLE)]
    targets = [key for key in targets if key not in source]
    if SHARED_TABLE not in source or SHARED_TABLE in wanted or not targets:
        return
    table = source.pop(SHARED_TABLE)
    source.update({key: table.clone() for key in targets})
    report.copied.append((SHARED_TABLE, targets))


def _resize(key: str, value: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """The tensor itself, unless it holds positions and the grids differ."""
    is_table = key.endswith(TABLE)
    if source == target or not (is_table or key == "pos_embed"):
        return value
    rows = value.shape[0] if is_table else value.shape[1]
    expected = relative_table_rows(source) if is_table else _absolute_rows(source)
    if rows != expected:
        raise UserError(
            f"{key} has {rows} rows, the grid {source} needs {expected}; give as source_grid the"
            " patch grid the weights were trained on"
        )
    resize = resize_relative_table if is_table else resize_position_embedding
    return resize(value, source, target)


def _check_depth(source: Mapping[str, Tensor], model: VisionTransformer) -> None:
    numbers = {int(key.split(".")[1]) for key in source if key.startswith("blocks.")}
    depth = max(numbers) + 1 if numbers else 0
    if numbers and depth != model.depth:
        raise UserError(
            f"the weights have {depth} blocks and the model {model.depth}; use weights and model of"
            " the same depth"
        )


def abbreviate(keys: list[str], limit: int = 6) -> str:
    """Keys in one line, those of all blocks written once; beyond `limit` counted, 0 is no limit."""
    short: dict[str, int] = {}
    for key in keys:
        parts = key.split(".")
        if parts[0] == "blocks" and len(parts) > 2:
            key = ".".join(["blocks.*", *parts[2:]])
        short[key] = short.get(key, 0) + 1
    names = [f"{key} (x{count})" if count > 1 else key for key, count in short.items()]
    shown = names[:limit] if limit else names
    more = f", and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
