"""How well pixels are classified: intersection over union and accuracy, by class and mean."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from beit.data.label_maps import IGNORED

_PIXELS_AT_ONCE = 2**22  # 32 MB of each of the int64 tensors that a confusion matrix is counted by


class PixelConfusion(MulticlassConfusionMatrix):
    """Counts (K, K) int64 of true by predicted class, over pixels, images and ranks.

    Pixels without a label do not count, whatever is predicted there.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, ignore_index=IGNORED, validate_args=False)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Ids (H, W) of any integer type, in [0, K); labels may also be IGNORED."""
        assert predicted.shape == labels.shape, "of different images"
        pairs = (flat.flatten().split(_PIXELS_AT_ONCE) for flat in (predicted, labels))
        for ids, truth in zip(*pairs, strict=True):
            super().update(ids.long(), truth.long())


@dataclass(frozen=True)
class SegmentationScores:
    """What a confusion matrix says. Shares in [0, 1]; NaN for what was not there to be measured.

    A class has no IoU where it is neither in the labels nor predicted, and no accuracy where it is
    not in the labels. The means leave those out, as mmsegmentation's do.
    """

    iou: Tensor  # (K,) intersection over union
    accuracy: Tensor  # (K,) share of the class's pixels that were recognised
    pixels: Tensor  # (K,) int64, by label
    predicted: Tensor  # (K,) int64
    pixel_accuracy: float  # of all pixels together

    @classmethod
    def of(cls, confusion: Tensor) -> "SegmentationScores":
        """Of counts (K, K), true by predicted."""
        confusion = confusion.cpu()
        hits, pixels, predicted = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
        union = pixels + predicted - hits
        # 0/0 is the NaN that is meant
        return cls(
            iou=hits.double() / union,
            accuracy=hits.double() / pixels,
            pixels=pixels,
            predicted=predicted,
            pixel_accuracy=float(hits.sum().double() / pixels.sum()),
        )

    @property
    def mean_iou(self) -> float:
        return float(self.iou.nanmean())

    @property
    def mean_accuracy(self) -> float:
        return float(self.accuracy.nanmean())

    def table(self, classes: list[str] | None) -> list[dict[str, str | int | float | None]]:
        """A row for each class, in the order of the ids; None where there is nothing to measure."""
        names = classes or [str(number) for number in range(len(self.iou))]
        return [
            {
                "class": name,
                "iou": _number(self.iou[i]),
                "accuracy": _number(self.accuracy[i]),
                "pixels": int(self.pixels[i]),
                "predicted": int(self.predicted[i]),
            }
            for i, name in enumerate(names)
        ]


def _number(value: Tensor) -> float | None:
    return None if bool(torch.isnan(value)) else round(float(value), 6)
