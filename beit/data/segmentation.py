"""Images and label maps for semantic segmentation."""

import logging
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from beit.data.batches import SegmentationBatch
from beit.data.class_shares import ClassShares, count_pixels
from beit.data.dataset import Sample, SampleKey
from beit.data.image_data import ImageData
from beit.data.limits import checked_normalisation, not_negative, whole_number
from beit.data.loading import LoaderSettings
from beit.data.segmentation_sources import LabelMap, SegmentationSource
from beit.data.segmentation_views import SegmentationEvalTransform, SegmentationTrainTransform
from beit.errors import UserError
from beit.run_folder import is_first_process

log = logging.getLogger(__name__)


class SegmentationData(ImageData):
    """Images with a class for each pixel.

    A training batch has images (B, 3, H, W) and labels (B, H, W); one of validation has lists of
    them, (3, H, W) as the network wants them and (H0, W0) as they lie. Images are normalised on the
    device, labels are int64 there.

    Args:
        num_classes: how many the label maps have, "auto" for as many; another number is refused.
        histogram_maps: label maps of each source that are looked at before training, evenly spread:
            the share of each class is logged, and ids without a class, and sizes that differ from
            the image's, are refused. 0: none.
        histogram_seconds: of each source; what was seen until then is told.

    Raises:
        UserError: the classes of training and validation differ, or `num_classes` is another.
    """

    def __init__(
        self,
        train: SegmentationSource,
        val: SegmentationSource | None,
        *,
        train_transform: SegmentationTrainTransform,
        eval_transform: SegmentationEvalTransform,
        num_classes: int | str,
        mean: Sequence[float],
        std: Sequence[float],
        loader: LoaderSettings,
        histogram_maps: int = 1000,
        histogram_seconds: float = 20.0,
    ) -> None:
        names = _names(train, val)
        if num_classes not in ("auto", len(names)):
            raise UserError(
                f"num_classes {num_classes}: the data set has {len(names)} classes "
                f"({names[0]} ... {names[-1]}); give as many (data.classes), or in a training say "
                "data.num_classes=auto"
            )
        mean, std = checked_normalisation(mean, std)
        super().__init__(
            loader,
            SegmentationBatch,
            train=(train, TrainSegmentationSample(train_transform)),
            val=(val, EvalSegmentationSample(eval_transform)),
            described=(
                f"training {train_transform!r}",
                f"evaluation {eval_transform!r}",
                f"normalised by mean {mean}, std {std}",
                f"{len(names)} classes, {train.ids!r}",
            ),
        )
        self.loaders.collate_val = collate_lists
        self.classes: list[str] | None = names
        self.num_classes = len(names)
        self.palette = train.ids.palette  # (K, 3) uint8
        self.histogram_maps = whole_number("histogram_maps", histogram_maps, at_least=0)
        self.histogram_seconds = not_negative("histogram_seconds", histogram_seconds)
        self._sources = {"training": train, "validation": val}
        self._mean, self._std = torch.tensor(mean), torch.tensor(std)

    def check(self, *, world_size: int, accumulate: int, stage: str = "fit") -> None:
        """As of every data module; in a fit the classes are counted, by the first process."""
        super().check(world_size=world_size, accumulate=accumulate, stage=stage)
        if stage != "fit" or self.histogram_maps == 0 or not is_first_process():
            return
        counts = {
            role: count_pixels(source, maps=self.histogram_maps, seconds=self.histogram_seconds)
            for role, source in self._sources.items()
            if source is not None
        }
        shares = ClassShares(self.classes or [], counts)
        shares.check()
        log.info("%s", shares.table())
        for warning in shares.warnings():
            log.warning("%s", warning)

    def on_after_batch_transfer(
        self, batch: SegmentationBatch, dataloader_idx: int
    ) -> SegmentationBatch:
        if isinstance(batch.images, Tensor):
            return batch._replace(images=self.normalised(batch.images), labels=batch.labels.long())
        return batch._replace(
            images=[self.normalised(image) for image in batch.images],
            labels=[labels.long() for labels in batch.labels],
        )

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) -> float."""
        mean, std = (values.to(images.device)[:, None, None] for values in (self._mean, self._std))
        return images.float().div_(255).sub_(mean).div_(std)

    def denormalize(self, images: Tensor) -> Tensor:
        """Normalised (..., 3, H, W) -> [0, 1]."""
        mean, std = (values.to(images.device)[:, None, None] for values in (self._mean, self._std))
        return images * std + mean


class TrainSegmentationSample:
    """(image uint8 (3, H, W), labels int16 (H, W)) with augmentation."""

    def __init__(self, transform: SegmentationTrainTransform) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image, labels: LabelMap, key: SampleKey) -> tuple[Tensor, ...]:
        # streams of their own: switching the colours does not change the crops
        return self.transform(image, labels, key.rng("views"), key.rng("colours"))


class EvalSegmentationSample:
    """(image uint8 (3, H, W) resized, labels int16 (H0, W0) as they lie), without randomness."""

    def __init__(self, transform: SegmentationEvalTransform) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image, labels: LabelMap, key: SampleKey) -> tuple[Tensor, ...]:
        return self.transform(image), torch.from_numpy(labels)


def collate_lists(samples: Sequence[Sample]) -> SegmentationBatch:
    """Samples of different sizes -> a batch of lists."""
    images, labels = (list(field) for field in zip(*(sample.tensors for sample in samples)))
    return SegmentationBatch(
        images,
        labels,
        torch.tensor([sample.index for sample in samples]),
        torch.tensor([sample.failed for sample in samples]),
    )


def _names(train: SegmentationSource, val: SegmentationSource | None) -> list[str]:
    names = train.ids.classes
    if val is not None and val.ids.classes != names:
        odd = sorted(set(names) ^ set(val.ids.classes)) or ["the order"]
        raise UserError(
            f"training has {len(names)} classes and validation {len(val.ids.classes)}, differing "
            f"in {', '.join(odd[:3])}: give both the same ids"
        )
    return names
