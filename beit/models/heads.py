"""Heads on the tokens of the backbone: visual-token logits, class logits."""

from typing import Literal

import torch
from torch import Tensor, nn

from beit.errors import UserError
from beit.models.layers import NORM_EPS
from beit.models.vit import truncated_normal_


def chosen_patches(features: Tensor, mask: Tensor) -> Tensor:
    """Features (B,1+N,D) and mask (B,h,w) bool -> those of the masked patches (M,D), row-major."""
    return features[:, 1:][mask.flatten(1)]


class MIMHead(nn.Module):
    """One Linear to the vocabulary of visual tokens, at masked patches only.

    Its key is the released `lm_head`. Weights start as the pretraining backbone's: normal with
    deviation 0.02 cut at ±0.02.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.lm_head = nn.Linear(width, vocab_size)
        truncated_normal_(self.lm_head.weight, std=0.02, cut=0.02)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features (B,1+N,D) and mask (B,h,w) bool -> logits (M,V), in row-major order of the mask.

        `token_ids[mask]` of ids (B,h,w) are the targets, in the same order.
        """
        return self.lm_head(chosen_patches(features, mask))


class PixelHead(nn.Module):
    """One Linear to the pixels of a patch, at the chosen patches only (BEiT, table 4).

    Weights start as MIMHead's.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(width, 3 * patch_size**2)
        truncated_normal_(self.decoder.weight, std=0.02, cut=0.02)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features (B,1+N,D) and mask (B,h,w) bool -> pixels (M,3·patch_size²), as of MIMHead."""
        return self.decoder(chosen_patches(features, mask))


class ClassificationHead(nn.Module):
    """Class logits from the mean of the patch tokens, normalised, or from CLS.

    With "mean" the backbone has no final norm and `fc_norm` stands here; with "cls" the backbone's
    own norm serves. Weight and bias of `head` are multiplied by `init_scale`.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        init_scale: float = 0.001,
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise UserError(f"pooling {pooling!r} must be 'mean' or 'cls'")
        if num_classes < 1:
            raise UserError(f"num_classes {num_classes} must be at least 1")
        self.pooling = pooling
        self.fc_norm = nn.LayerNorm(width, eps=norm_eps) if pooling == "mean" else None
        self.head = nn.Linear(width, num_classes)
        truncated_normal_(self.head.weight, std=0.02, cut=2.0)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.mul_(init_scale)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B,1+N,D) -> logits (B,K)."""
        if self.fc_norm is None:
            return self.head(features[:, 0])
        return self.head(self.fc_norm(features[:, 1:].mean(dim=1)))
