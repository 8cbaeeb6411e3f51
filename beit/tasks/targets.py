"""What masked image modelling predicts of a patch: its visual token, or its pixels.

A target knows what is wanted of a head at the chosen patches, what a wrong answer costs, and what
guessing without a look at the image would reach. The pixels are the encoder's own view: with them
there is neither tokenizer nor second view.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from beit.tasks.accounting import TokenHistogram

EPS = 1e-6  # beside a patch's variance, as in MAE


class Target(Protocol):
    """P patches are chosen of a batch, in row-major order; a head has O outputs for each."""

    def wanted(self, batch: Any, chosen: Tensor) -> Tensor:
        """What the head should say at the patches where chosen (B,h,w) is True: P entries."""
        ...

    def loss(self, predicted: Tensor, wanted: Tensor, *, reduction: str) -> Tensor:
        """Of predicted (P,O): the patches' losses, their "sum" or "mean"."""
        ...

    def measures(self, predicted: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """Other means over the patches, by name."""
        ...

    def meter(self, head: nn.Module) -> Metric:
        """Gathers what was wanted over an epoch; its `named()` says what guessing reaches."""
        ...


class VisualTokens:
    """A patch's visual token, by cross-entropy (BEiT, section 2.3)."""

    def wanted(self, batch: Any, chosen: Tensor) -> Tensor:
        return batch.token_ids[chosen]

    def loss(self, predicted: Tensor, wanted: Tensor, *, reduction: str) -> Tensor:
        return F.cross_entropy(predicted.float(), wanted, reduction=reduction)

    def measures(self, predicted: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        return {"mim_acc": (predicted.argmax(dim=-1) == wanted).float().mean()}

    def meter(self, head: Any) -> TokenHistogram:
        return TokenHistogram(head.vocab_size)


TOKENS = VisualTokens()


class Pixels:
    """A patch's pixels as the encoder gets them, by mean squared error (BEiT, table 4; MAE).

    The squared error, where SimMIM has the absolute one: what always guessing the mean costs is
    then the pixels' variance, which can be counted along the way and stands beside the loss.

    Args:
        normalized: each patch less its own mean, divided by its own deviation (MAE, section 3).
    """

    def __init__(self, patch_size: int, *, normalized: bool) -> None:
        self.patch_size = patch_size
        self.normalized = normalized

    def wanted(self, batch: Any, chosen: Tensor) -> Tensor:
        patches = patchify(batch.images.float(), self.patch_size)[chosen]
        if self.normalized:
            mean, deviation = _moments(patches)
            patches = (patches - mean) / deviation
        return patches

    def loss(self, predicted: Tensor, wanted: Tensor, *, reduction: str) -> Tensor:
        of_patches = (predicted.float() - wanted).square().mean(dim=-1)
        return of_patches.sum() if reduction == "sum" else of_patches.mean()

    def measures(self, predicted: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        return {}

    def meter(self, head: Any) -> "PixelSpread":
        return PixelSpread(head.decoder.out_features)

    def drawn(self, outputs: Tensor, images: Tensor) -> Tensor:
        """Images (B,3,H,W) of a head's outputs (B,h,w,O).

        Where patches are normalised they get back the mean and deviation of those of `images`.
        """
        if self.normalized:
            mean, deviation = _moments(patchify(images.float(), self.patch_size))
            outputs = outputs * deviation + mean
        return unpatchify(outputs, self.patch_size)


class PixelSpread(Metric):
    """What always guessing the mean patch would cost: the pixels' variance over an epoch."""

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, pixels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "squares"):
            zeros = torch.zeros(pixels, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, patches: Tensor) -> None:
        """Patches (P,O)."""
        patches = patches.double()
        self.count += len(patches)
        self.total += patches.sum(dim=0)
        self.squares += patches.square().sum(dim=0)

    def compute(self) -> Tensor:
        count = self.count.clamp(min=1)
        return (self.squares / count - (self.total / count).square()).mean().float()

    def named(self) -> dict[str, Tensor]:
        return {"mean_patch_loss": self.compute()}


def patchify(images: Tensor, size: int) -> Tensor:
    """Images (B,C,H,W) -> patches (B,h,w,C·size·size), each channel by channel, row by row."""
    patches = images.unfold(2, size, size).unfold(3, size, size)  # (B, C, h, w, size, size)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3)


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """The inverse of `patchify`."""
    batch, rows, columns, _ = patches.shape
    pixels = patches.view(batch, rows, columns, -1, size, size).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(batch, -1, rows * size, columns * size)


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch (...,O): (...,1) each."""
    mean = patches.mean(dim=-1, keepdim=True)
    return mean, (patches.var(dim=-1, keepdim=True) + EPS).sqrt()
