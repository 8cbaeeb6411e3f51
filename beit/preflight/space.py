"""Memory and disk of a run, worked out from its numbers."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from beit.preflight.findings import Finding

_FLOAT = 4  # bytes: master weights, gradients and moments are float32 in every mixed precision
_MOMENTS = 2  # of AdamW
_FULL = 0.9  # beyond this share of the memory a run is likely to end by it


@dataclass(frozen=True)
class Weights:
    """Parameters of a task, and how many copies of them a run has."""

    total: int
    trained: int
    averaged: bool  # a moving average of all of them is kept

    @property
    def state(self) -> int:
        """Bytes that training holds besides activations: weights, gradients, moments, average."""
        return self.in_checkpoint + self.trained * _FLOAT

    @property
    def in_checkpoint(self) -> int:
        """Bytes of a checkpoint: weights, moments and, beside an average, the weights too."""
        copies = 1 + self.averaged
        return (self.total * copies + self.trained * _MOMENTS) * _FLOAT


def check_memory(
    weights: Weights, *, activations: int | None, copies: int, available: int, where: str
) -> Finding:
    """Whether weights and what training keeps of a micro-batch fit.

    Args:
        activations: bytes kept for the backward pass of a micro-batch; None: not known.
        copies: processes that share the memory.
        available: bytes; 0: not known.
    """
    needed = copies * (weights.state + (activations or 0))
    parts = f"weights, gradients and moments {size(weights.state)}"
    parts += f" + activations {size(activations)}" if activations is not None else ""
    text = f"{parts}{f', x {copies} processes' if copies > 1 else ''} = {size(needed)}"
    if not available:
        return Finding("ok", "memory", f"{text}; {where} is not here to compare")
    text += f" of {size(available)} of {where}"
    if needed > available:
        level, mend = "error", ": lower batch.per_device, or model.activation_checkpointing=true"
    elif needed > _FULL * available:
        level, mend = "warn", ", which is tight: lower batch.per_device where it does not fit"
    else:
        level, mend = "ok", ""
    return Finding(level, "memory", text + mend)  # type: ignore[arg-type]


def check_disk(weights: Weights, *, kept: int, folder: Path) -> Finding:
    """Whether `kept` checkpoints, and one while it is written, fit where the run will be."""
    one = weights.in_checkpoint
    needed = one * (kept + 1)
    there = _nearest(folder)
    free = shutil.disk_usage(there).free
    text = (
        f"checkpoints of {size(one)} x ({kept} kept + 1 being written) = {size(needed)}, free in "
        f"{there} {size(free)}"
    )
    if needed > free:
        text += ": make room, or lower callbacks.checkpoints.keep"
    return Finding("error" if needed > free else "ok", "disk", text)


def check_cache(*, images: int, views: int, tokens: int, folder: Path) -> Finding:
    """Whether the token cache fits; of one that is there already nothing more is needed."""
    needed = images * views * tokens * 2
    text = f"{images} images x {views} views x {tokens} tokens x 2 bytes = {size(needed)}"
    if folder.exists():
        return Finding("ok", "token cache", f"{text}, in {folder}, which is there")
    there = _nearest(folder)
    free = shutil.disk_usage(there).free
    level = "error" if needed > free else "ok"
    return Finding(level, "token cache", f"{text}, free in {there} {size(free)}")  # type: ignore[arg-type]


def check_patches(
    sizes: list[tuple[int, int]], *, image_size: tuple[int, int], patch_size: int
) -> Iterator[Finding]:
    """Findings on image size and patch, and on images (H, W) much smaller than what they become."""
    height, width = image_size
    grid = height // patch_size, width // patch_size
    text = (
        f"{height}x{width} px in patches of {patch_size}: {grid[0]}x{grid[1]} = {math.prod(grid)}"
    )
    few = math.prod(grid) < 16  # the paper's block of masked patches alone has as many
    yield Finding("warn" if few else "ok", "patches", text + (", which are few" if few else ""))
    if sizes:
        short = sorted(min(size) for size in sizes)[len(sizes) // 2]
        text = f"{len(sizes)} images looked at: the shorter side is {short} px in the median"
        enlarged = min(image_size) / short
        if enlarged >= 2:
            text += f", enlarged {enlarged:.1f} times to {min(image_size)} px: model.image_size"
            yield Finding("warn", "image size", f"{text} and model.patch_size may be too large")
        else:
            yield Finding("ok", "image size", text)


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def size(count: int | None) -> str:
    """Bytes for people."""
    value = float(count or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
