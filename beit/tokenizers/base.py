"""What the rest of the project asks of an image tokenizer."""

from typing import Protocol

from torch import Tensor


class Tokenizer(Protocol):
    """Images to visual tokens and back. They are `nn.Module`s; the data module freezes them.

    B batch, H W pixels, h w token grid, V vocabulary.
    """

    vocab_size: int  # V
    stride: int  # pixels a token covers, along each side
    value_range: tuple[float, float]  # what `encode` expects: the affine image of [0, 1]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) -> (h, w). Raises UserError where the stride does not divide the image."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in `value_range` -> (B, h, w) int64 in [0, V)."""
        ...

    def decode(self, token_ids: Tensor) -> Tensor:
        """(B, h, w) int64 in [0, V) -> (B, 3, H, W) float in [0, 1]."""
        ...


def to_value_range(images: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Map float images from [0, 1] to what a tokenizer expects."""
    low, high = value_range
    return images * (high - low) + low
