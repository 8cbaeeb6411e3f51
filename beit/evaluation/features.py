"""Features of images from every layer of a frozen backbone, in one pass over the images."""

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from beit.data.labelled import LabelledImages
from beit.errors import UserError
from beit.files import explained
from beit.models.vit import VisionTransformer

log = logging.getLogger(__name__)

Pooling = Literal["cls", "mean", "both"]
POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "both")
Layers = Sequence[int] | Literal["all"]
Autocast = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Compute:
    """Where and how the network is run, and where its features may lie.

    Args:
        device: of the network, and of what is made of its features.
        autocast: the context of its forward passes.
        memory_gb: features of more than this (1e9 bytes) lie in a file that is mapped to memory.
        tell: log how large they will be.
        folder: for that file, which has no name and is gone when it is no longer used.
    """

    device: torch.device
    autocast: Autocast = contextlib.nullcontext
    memory_gb: float = 4.0
    tell: bool = True
    folder: str = field(default_factory=tempfile.gettempdir)


@dataclass(frozen=True)
class Features:
    """What a backbone makes of n labelled images.

    `stored` (L, n, 2D) float32 on the CPU: of each layer CLS and, beside it, the mean of the patch
    tokens, as the block puts them out, without a norm. `layers` are counted from 1; the last is the
    depth. `labels` (n,) int64.
    """

    stored: Tensor
    labels: Tensor
    layers: tuple[int, ...]

    def of(self, layer: int, pooling: Pooling) -> Tensor:
        """(n, D) for "cls" and "mean", (n, 2D) for "both"."""
        found = self.stored[self.layers.index(layer)]
        width = found.shape[1] // 2
        return {"cls": found[:, :width], "mean": found[:, width:], "both": found}[pooling]

    def only(self, layers: Layers) -> "Features":
        """Those of some of the layers."""
        if layers == "all":
            return self
        rows = [self.layers.index(layer) for layer in sorted(set(layers))]
        return Features(self.stored[rows], self.labels, tuple(self.layers[row] for row in rows))


def checked_layers(layers: Layers, depth: int) -> tuple[int, ...]:
    """Layers counted from 1, in order. Raises UserError for one that the network does not have."""
    if layers == "all":
        return tuple(range(1, depth + 1))
    if not layers or not all(1 <= layer <= depth for layer in layers):
        raise UserError(
            f"layers {list(layers)}: this network has layers 1 to {depth}, counted from 1; name "
            "some of them, or say all"
        )
    return tuple(sorted(set(layers)))


def checked_poolings(poolings: Sequence[str]) -> tuple[Pooling, ...]:
    """Raises UserError for a pooling that there is not, and for none."""
    if not poolings or not set(poolings) <= set(POOLINGS):
        raise UserError(f"poolings {list(poolings)}: expected some of {', '.join(POOLINGS)}")
    return tuple(name for name in POOLINGS if name in poolings)


def extract(
    backbone: VisionTransformer, images: LabelledImages, compute: Compute, *, layers: Layers
) -> Features:
    """The features of all images from these layers. The same network gives the same numbers.

    Raises:
        UserError: no such layer, an unreadable image, no place for the features.
    """
    chosen = checked_layers(layers, backbone.depth)
    stored = _allocate((len(chosen), len(images), 2 * backbone.width), images.role, compute)
    labels = torch.empty(len(images), dtype=torch.int64)
    taps = [layer - 1 for layer in chosen]
    begin = 0
    with evaluating(backbone):
        for batch in images.batches(pin_memory=compute.device.type == "cuda"):
            end = begin + len(batch.images)
            with compute.autocast():
                tokens = backbone.forward_blocks(batch.images.to(compute.device), taps=taps)
            for row, x in zip(stored, tokens, strict=True):
                pooled = torch.cat([x[:, 0].float(), x[:, 1:].float().mean(dim=1)], dim=1)
                row[begin:end] = pooled.cpu()
            labels[begin:end] = batch.targets
            begin = end
    assert begin == len(images)
    if not bool(torch.isfinite(stored[-1]).all()):
        raise UserError(f"features of the {images.role} images are not finite: check the weights")
    return Features(stored, labels, chosen)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients; afterwards every mode is as before."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in modes.items():
            child.training = training


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within it, products of float32 matrices are of float32: training lets GPUs round them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _allocate(shape: tuple[int, int, int], role: str, compute: Compute) -> Tensor:
    count = math.prod(shape)
    size = 4 * count
    mapped = size > compute.memory_gb * 1e9
    if compute.tell:
        log.info(
            "features of %s %s images: %d layers x %d numbers, %s in %s",
            *(f"{shape[1]:,}", role, shape[0], shape[2], _bytes(size)),
            f"a file in {compute.folder}" if mapped else "memory",
        )
    if not mapped:
        return torch.empty(shape)
    folder = Path(compute.folder).expanduser()
    with explained(folder / "features", needed=size):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".features-", dir=folder)
        try:
            os.posix_fallocate(descriptor, 0, size)  # a full disk shows now, and kills nobody later
            return torch.from_file(name, shared=True, size=count).view(shape)
        finally:
            os.close(descriptor)
            os.unlink(name)  # what is mapped stays until it is let go


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
