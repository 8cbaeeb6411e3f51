"""Labelled images as an evaluation looks at them: without a trainer, each once, in their order."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit.data.batches import LabelledBatch
from beit.data.dataset import Collate, KeyedDataset, SampleKey
from beit.data.label_checks import check_labels, number_of_classes, shared_classes
from beit.data.loading import LoaderSettings
from beit.data.sampler import GlobalBatchSampler
from beit.data.sources import ImageSource, Subset
from beit.data.unreadable import UnreadableImages, reason
from beit.data.workers import WatchedLoader
from beit.errors import UserError


class LabelledImages:
    """A source, prepared by the evaluation transform, in batches; targets are -1 without labels.

    Nothing is drawn and nothing is left out: the same tensors each time, in the source's order.

    Args:
        transform: PIL image -> (3, H, W) float, normalised.
        role: "training" or "validation", for messages.
    """

    def __init__(
        self, source: ImageSource, transform: Any, loader: LoaderSettings, *, role: str
    ) -> None:
        self.source, self.loader, self.role = source, loader, role
        self.transform = transform
        self._data = KeyedDataset(source, _Sample(transform), seed=loader.seed)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64 in [0, K), without decoding anything."""
        assert self.source.labels is not None, "LabelledData.of refuses sources without labels"
        return self.source.labels

    def part(self, count: int, *, seed: int) -> "LabelledImages":
        """So many of them, drawn once, as many of each class as can be; all if there are fewer."""
        if count >= len(self):
            return self
        source = Subset(self.source, count=count, seed=seed)
        return LabelledImages(source, self.transform, self.loader, role=self.role)

    def batches(self, *, pin_memory: bool = False) -> Iterator[LabelledBatch]:
        """Raises UserError for an unreadable image: accuracies would be of other images."""
        sampler = GlobalBatchSampler(
            len(self.source),
            batch_size=self.loader.batch_size_per_device,
            rank=0,
            world_size=1,
            seed=self.loader.seed,
            shuffle=False,
            last_batch="even",
        )
        workers = self.loader.num_workers
        loader = WatchedLoader(
            self._data,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=Collate(LabelledBatch),
            limit=self.loader.timeout_seconds,
            pin_memory=pin_memory,
            # torch's own would draw from the global generator
            generator=torch.Generator().manual_seed(self.loader.seed),
            **({"prefetch_factor": self.loader.prefetch_factor} if workers else {}),
        )
        for batch in loader:
            for index in batch.failed[batch.failed >= 0].tolist():
                why = loader.reasons.get(index) or reason(self.source, index)
                raise UserError(
                    f"unreadable {self.role} image {why}; none is skipped in evaluation: mend or "
                    "remove it"
                )
            yield batch


class _Sample:
    """(image, target), the target -1 where there is none; a label map is none."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image, label: int | None, key: SampleKey) -> tuple[Tensor, ...]:
        target = -1 if label is None or np.ndim(label) else label
        return self.transform(image), torch.tensor(target)


@dataclass(frozen=True)
class LabelledData:
    """Labelled images to learn from, and others to measure on."""

    train: LabelledImages
    val: LabelledImages

    @classmethod
    def of(
        cls,
        train: ImageSource,
        val: ImageSource | None,
        *,
        transform: Any,
        num_classes: int | str,
        loader: LoaderSettings,
    ) -> "LabelledData":
        """Checked, as far as can be without reading an image.

        Raises:
            UserError: labels are missing or outside the classes, which training and validation must
                share; no validation images; fewer labelled images than classes, or of one alone.
        """
        if val is None:
            raise UserError("there are no validation images to measure on; set data.val")
        if train.labels is None:
            check_labels(train, "training", 0)
        count = number_of_classes(num_classes, train)
        shared_classes(train, val)
        for source, role in ((train, "training"), (val, "validation")):
            check_labels(source, role, count)
        if len(train) < count:
            raise UserError(
                f"{len(train)} labelled training images are fewer than the {count} classes: give "
                "at least one of each, better some more"
            )
        if len(np.unique(train.labels)) < 2:  # type: ignore[arg-type]
            raise UserError(
                "the labelled training images are all of one class, which leaves nothing to tell "
                "apart: give images of at least two"
            )
        images = {"transform": transform, "loader": loader}
        return cls(
            LabelledImages(train, role="training", **images),
            LabelledImages(val, role="validation", **images),
        )

    @classmethod
    def unlabelled(
        cls, train: ImageSource, val: ImageSource | None, *, transform: Any, loader: LoaderSettings
    ) -> "LabelledData":
        """For what looks at no label. Without validation images those of training serve."""
        images = {"transform": transform, "loader": loader}
        first = LabelledImages(train, role="training", **images)
        others = None if val is None else LabelledImages(val, role="validation", **images)
        return cls(first, others or first)

    def check(self) -> None:
        """Raises UserError where one of some images, spread over the sources, is unreadable."""
        for images in (self.train, self.val):
            probe = UnreadableImages(limit=0).probe
            probe(images.source, images.role, count=images.loader.check_images, strict=True)
