"""What travels between the loader, the data module and the task.

Named tuples survive collation, pinning and device transfer with their names and types.
"""

from typing import NamedTuple

from torch import Tensor


class TwoViewBatch(NamedTuple):
    """What the pretraining loader yields: raw bytes, a quarter of the traffic of floats."""

    images: Tensor  # (B, 3, H, W) uint8, the encoder's view
    token_images: Tensor  # (B, 3, H', W') uint8, the tokenizer's view of the same crop
    mask: Tensor  # (B, h, w) bool, True where the patch is hidden
    indices: Tensor  # (B,) int64, index of the sample in its source
    failed: Tensor  # (B,) int64, -1 or the unreadable image that this sample stands in for


class MIMBatch(NamedTuple):
    """What the masked-image-modelling task sees."""

    images: Tensor  # (B, 3, H, W) float, normalised for the encoder
    mask: Tensor  # (B, h, w) bool
    token_ids: Tensor  # (B, h, w) int64 in [0, V)
    indices: Tensor  # (B,) int64


class LabelledBatch(NamedTuple):
    """Images with classes."""

    images: Tensor  # (B, 3, H, W) float, normalised
    targets: Tensor  # (B,) int64 in [0, K), or (B, K) float after mixup or cutmix
    indices: Tensor  # (B,) int64
    failed: Tensor  # (B,) int64


class PixelBatch(NamedTuple):
    """Images for training a tokenizer."""

    images: Tensor  # (B, 3, H, W) uint8 from the loader, float in [0, 1] on the device
    indices: Tensor  # (B,) int64
    failed: Tensor  # (B,) int64
