"""Data modules of classification and of tokenizer training; pretraining has a file of its own."""

from collections.abc import Callable
from typing import Any

from timm.data import Mixup
from torch import Tensor

from beit.data.batches import LabelledBatch, PixelBatch
from beit.data.dataset import EvalLabelledSample, PixelSample, TrainLabelledSample
from beit.data.image_data import ImageData as ImageData
from beit.data.label_checks import check_labels, number_of_classes, shared_classes
from beit.data.loading import Loaders as Loaders
from beit.data.loading import LoaderSettings as LoaderSettings
from beit.data.randomness import keyed_global_rng
from beit.data.sources import ImageSource
from beit.data.views import EvalTransform, PixelTransform, TrainTransform
from beit.errors import UserError

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ClassificationData(ImageData):
    """Images with classes; training batches are mixed on the device if `mixing` is given.

    `num_classes` is a number, or "auto" for as many as the training source has. `mixing` is called
    with (images, targets) and gives (images, soft targets), e.g. timm's Mixup; its draws depend on
    (seed, epoch, micro-batch, rank) alone.

    Raises:
        UserError: num_classes is neither, a source has no labels or some outside
            [0, num_classes), or the names of the training and the validation classes differ (their
            numbers would mean different things).
    """

    def __init__(
        self,
        train: ImageSource,
        val: ImageSource | None,
        *,
        train_transform: TrainTransform,
        eval_transform: EvalTransform,
        num_classes: int | str,
        mixing: Mixing | None,
        loader: LoaderSettings,
    ) -> None:
        count = number_of_classes(num_classes, train)
        classes = shared_classes(train, val)
        for source, role in ((train, "training"), (val, "validation")):
            if source is not None:
                check_labels(source, role, count)
        super().__init__(
            loader,
            LabelledBatch,
            train=(train, TrainLabelledSample(train_transform)),
            val=(val, EvalLabelledSample(eval_transform)),
            described=(
                f"training {train_transform!r}",
                f"evaluation {eval_transform!r}",
                f"{count} classes",
            ),
        )
        self.classes = classes
        self.num_classes = count
        self.mixing = mixing or None
        if isinstance(self.mixing, Mixup):
            self.mixing.num_classes = count  # it is built before the data have been counted

    def check(self, *, world_size: int, accumulate: int, stage: str = "fit") -> None:
        """Raises UserError for too few or unreadable images, and for an odd batch to be mixed."""
        super().check(world_size=world_size, accumulate=accumulate, stage=stage)
        if stage == "fit" and self.mixing and self.loaders.settings.batch_size_per_device % 2:
            raise UserError(
                f"batch per device {self.loaders.settings.batch_size_per_device}: mixing pairs the "
                "images of a batch and needs an even number"
            )
        tail = self.loaders.tail_sizes(world_size=world_size, accumulate=accumulate)
        if stage == "fit" and self.mixing and any(size % 2 for size in tail):
            raise UserError(
                f"loader.last_batch=keep: the last step has batches of {min(tail)} to {max(tail)} "
                "images, and mixing needs an even number in each; say loader.last_batch=drop"
            )

    def on_after_batch_transfer(self, batch: LabelledBatch, dataloader_idx: int) -> LabelledBatch:
        trainer = self.running_trainer
        if self.mixing is None or not trainer.training:
            return batch
        loop: Any = trainer.fit_loop
        position = loop.epoch_loop.batch_progress.current.ready * trainer.world_size
        seed, epoch = self.loaders.settings.seed, loop.epoch_progress.current.processed
        with keyed_global_rng(seed, epoch, position + trainer.global_rank, "mixing"):
            images, targets = self.mixing(batch.images, batch.targets)
        return batch._replace(images=images, targets=targets)


class TokenizerData(ImageData):
    """Images in [0, 1] for training a tokenizer.

    Validation draws its crops as epoch 0 would, so they are the same ones each time.
    """

    def __init__(
        self,
        train: ImageSource,
        val: ImageSource | None,
        *,
        views: PixelTransform,
        loader: LoaderSettings,
    ) -> None:
        make_sample = PixelSample(views)
        super().__init__(
            loader,
            PixelBatch,
            train=(train, make_sample),
            val=(val, make_sample),
            described=(f"views {views!r}",),
        )

    def check(self, *, world_size: int, accumulate: int, stage: str = "fit") -> None:
        """Raises UserError for too few or unreadable images, and for an incomplete last batch."""
        super().check(world_size=world_size, accumulate=accumulate, stage=stage)
        if stage == "fit" and self.loaders.settings.last_batch == "keep":
            raise UserError(
                "loader.last_batch=keep: a tokenizer's batch norm and the balance of its codes are "
                "of a whole batch and come out otherwise in a smaller one; say "
                "loader.last_batch=drop"
            )

    def on_after_batch_transfer(self, batch: PixelBatch, dataloader_idx: int) -> PixelBatch:
        return batch._replace(images=batch.images.float().div_(255))
