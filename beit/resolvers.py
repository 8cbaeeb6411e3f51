"""What `${name:...}` means in a config: sizes that follow from others, numbers of a checkpoint."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import ListConfig

from beit.errors import UserError
from beit.sizes import height_width, patch_grid


def tapped_blocks(depth: int) -> list[int]:
    """Blocks at a third, half, two thirds and the end of `depth`, counted from 0.

    4, 6, 8, 12 of 12 and 8, 12, 16, 24 of 24, counted from 1: BEiT's for segmentation.
    """
    return [max(round(depth * share), 1) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]


def _checkpoint_config(path: str) -> dict[str, Any]:
    """The config in a checkpoint; the file is read once for as long as it stays the same."""
    file = Path(path).expanduser()
    written = file.stat().st_mtime_ns if file.is_file() else 0
    return _read_config(str(file), written)


@functools.lru_cache(maxsize=8)
def _read_config(path: str, written: int) -> dict[str, Any]:
    from beit.checkpoints.models import read_checkpoint

    return read_checkpoint(path).config


def _checkpoint_value(path: str, key: str) -> int:
    """A number out of the config that a checkpoint carries: `${checkpoint_value:path,a.b}`.

    A text or a node, of a stranger's perhaps, would come to stand in a config that was checked.
    """
    value: Any = _checkpoint_config(path)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if type(value) is not int:
        raise UserError(f"{path} is not a tokenizer's checkpoint: its config has no number {key!r}")
    return value


def _listed(function: Callable[..., Sequence[int]]) -> Callable[..., ListConfig]:
    """As a node: `--cfg job --resolve` puts what a resolver gives into the config, and no list."""
    return lambda *arguments: ListConfig(list(function(*arguments)))


RESOLVERS: dict[str, Callable[..., Any]] = {
    "grid": _listed(patch_grid),
    "token_size": _listed(
        lambda image, patch, stride: [side * stride for side in patch_grid(image, patch)]
    ),
    "window_stride": _listed(lambda window: [side * 2 // 3 for side in height_width(window)]),
    "tapped_blocks": _listed(tapped_blocks),
    "checkpoint_value": _checkpoint_value,
}
