"""What travels between the loader, the data module and the task.

Named tuples survive collation, pinning and device transfer with their names and types.
"""

from typing import Any, NamedTuple

from torch import Tensor


class TwoViewBatch(NamedTuple):
    """What the pretraining loader yields: raw bytes, a quarter of the traffic of floats.

    A sample whose tokens are known has no second view: T of the B samples have one, in order.
    """

    images: Tensor  # (B, 3, H, W) uint8, the encoder's view
    token_images: Tensor  # (T, 3, H', W') uint8, the tokenizer's view of the same crop
    token_ids: Tensor  # (B, h, w) int32, read from the token cache; -1 where there is a second view
    cache_rows: Tensor  # (B,) int64, where to keep the tokens; -1: nowhere
    mask: Tensor  # (B, h, w) bool, True where the patch is hidden
    indices: Tensor  # (B,) int64, index of the sample in its source
    failed: Tensor  # (B,) int64, -1 or the unreadable image that this sample stands in for

    @property
    def has_view(self) -> Tensor:
        """(B,) bool: whether `token_images` holds the sample's second view."""
        return self.token_ids[:, 0, 0] < 0

    def kept(self, chosen: Tensor) -> "TwoViewBatch":
        """The samples where `chosen` (B,) bool is True."""
        views = self.token_images[chosen[self.has_view]]
        rest = [field[chosen] for field in self._replace(token_images=chosen)]
        return TwoViewBatch(*rest)._replace(token_images=views)


class MIMBatch(NamedTuple):
    """What the masked-image-modelling task sees."""

    images: Tensor  # (B, 3, H, W) float, normalised for the encoder
    mask: Tensor  # (B, h, w) bool
    token_ids: Tensor  # (B, h, w) int64 in [0, V)
    indices: Tensor  # (B,) int64


class MaskedBatch(NamedTuple):
    """Images and masks, where the images themselves are the target."""

    images: Tensor  # (B, 3, H, W) uint8 from the loader, float normalised on the device
    mask: Tensor  # (B, h, w) bool
    indices: Tensor  # (B,) int64
    failed: Tensor  # (B,) int64


class LabelledBatch(NamedTuple):
    """Images with classes."""

    images: Tensor  # (B, 3, H, W) float, normalised
    targets: Tensor  # (B,) int64 in [0, K), or (B, K) float after mixup or cutmix
    indices: Tensor  # (B,) int64
    failed: Tensor  # (B,) int64


class SegmentationBatch(NamedTuple):
    """Images with a class for each pixel.

    In validation the sizes differ: then `images` and `labels` are lists of B tensors, the images
    resized for the network, the labels at the size at which they lie.
    """

    images: (
        Any  # Tensor (B, 3, H, W) uint8 from the loader, float normalised on the device; or list
    )
    labels: Any  # Tensor (B, H, W), int16, on the device int64: 0..K-1, -1 ignored; or a list
    indices: Tensor  # (B,) int64
    failed: Tensor  # (B,) int64

    def kept(self, chosen: Tensor) -> "SegmentationBatch":
        """The samples where `chosen` (B,) bool is True."""
        return SegmentationBatch(*(_kept(field, chosen) for field in self))


def _kept(field: Tensor | list[Tensor], chosen: Tensor) -> Any:
    if isinstance(field, Tensor):
        return field[chosen]
    return [value for value, keep in zip(field, chosen.tolist()) if keep]


class PixelBatch(NamedTuple):
    """Images for training a tokenizer."""

    images: Tensor  # (B, 3, H, W) uint8 from the loader, float in [0, 1] on the device
    indices: Tensor  # (B,) int64
    failed: Tensor  # (B,) int64
