"""A backbone by itself, with the pooling it was trained with and no head."""

from typing import Literal

from torch import Tensor, nn

from beit.errors import UserError
from beit.models.layers import NORM_EPS
from beit.models.vit import VisionTransformer


class Encoder(nn.Module):
    """Images in, tokens out; what other libraries call the bare model.

    `pooling` "mean" is the mean of the patch tokens, normalised; "cls" is CLS; "none" has none.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        pooling: Literal["mean", "cls", "none"],
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls", "none"):
            raise UserError(f"pooling {pooling!r} must be 'mean', 'cls' or 'none'")
        self.backbone = backbone
        self.pooling = pooling
        norm = nn.LayerNorm(backbone.width, eps=norm_eps) if pooling == "mean" else nn.Identity()
        self.head = nn.ModuleDict({"fc_norm": norm})  # named as the classification head's

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B,3,H,W) and mask (B,h,w) bool -> tokens (B,1+N,D), CLS first."""
        return self.backbone(images, mask)

    def pooled(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) -> one feature (B,D) of each image. Raises UserError without pooling."""
        if self.pooling == "none":
            raise UserError("these weights have no pooling: take the tokens, or a mean of your own")
        tokens = self(images)
        if self.pooling == "cls":
            return tokens[:, 0]
        return self.head["fc_norm"](tokens[:, 1:].mean(dim=1))
