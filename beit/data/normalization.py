"""Bytes to what a network takes, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from beit.data.limits import checked_normalisation


class Normalization:
    """(pixels / 255 - mean) / std of each channel.

    Raises UserError for what is not three numbers each.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        mean, std = checked_normalisation(mean, std)
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        self._numbers = mean, std

    def __repr__(self) -> str:
        return f"mean {self._numbers[0]}, std {self._numbers[1]}"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float."""
        mean, std = (_channels(values, images) for values in (self.mean, self.std))
        return images.float().sub_(mean * 255).div_(std * 255)

    def undone(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) back to [0, 1]."""
        return images.float() * _channels(self.std, images) + _channels(self.mean, images)


def _channels(values: Tensor, images: Tensor) -> Tensor:
    # a blocking copy to a GPU would wait until it has done all that it was given before
    return values.to(images.device, non_blocking=True)[:, None, None]
