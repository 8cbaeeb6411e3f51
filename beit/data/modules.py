"""Data modules: sources, transforms and loaders of each task, and what happens on the device."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader

from beit.data.batches import LabelledBatch, MIMBatch, PixelBatch, TwoViewBatch
from beit.data.dataset import (
    EvalLabelledSample,
    KeyedDataset,
    MakeSample,
    Masking,
    PixelSample,
    TrainLabelledSample,
    TwoViewSample,
)
from beit.data.label_checks import check_classes, check_labels
from beit.data.loading import Loaders as Loaders
from beit.data.loading import LoaderSettings as LoaderSettings
from beit.data.randomness import keyed_global_rng
from beit.data.sources import ImageSource
from beit.data.views import EvalTransform, PixelTransform, TrainTransform, TwoViewTransform
from beit.errors import UserError
from beit.tokenizers.base import Tokenizer, to_value_range

log = logging.getLogger(__name__)

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ImageData(L.LightningDataModule):
    """What the data modules have in common: sources, the loaders that read them, their checks.

    Args:
        batch_type: what the loaders yield.
        train, val: the source, and what makes a sample of its images.
        described: lines for the log of a run.
    """

    def __init__(
        self,
        settings: LoaderSettings,
        batch_type: type[Any],
        *,
        train: tuple[ImageSource, MakeSample],
        val: tuple[ImageSource | None, MakeSample],
        described: Sequence[str],
    ) -> None:
        super().__init__()
        source, make_sample = val
        val_data = None if source is None else KeyedDataset(source, make_sample, seed=settings.seed)
        train_data = KeyedDataset(*train, seed=settings.seed)
        self.loaders = Loaders(settings, batch_type, train=train_data, val=val_data)
        self.classes: list[str] | None = None
        self._described = described

    @property
    def running_trainer(self) -> L.Trainer:
        assert self.trainer is not None, "Lightning attaches the trainer before it asks for loaders"
        return self.trainer

    def steps_per_epoch(self, *, world_size: int, accumulate: int) -> int:
        """Optimizer steps in an epoch."""
        return self.loaders.steps_per_epoch(world_size=world_size, accumulate=accumulate)

    def check(self, *, world_size: int, accumulate: int, stage: str = "fit") -> None:
        """Raises UserError for too few or unreadable images. `stage` is fit or validate."""
        if stage == "fit":
            self.steps_per_epoch(world_size=world_size, accumulate=accumulate)
        elif self.loaders.val_data is None:
            raise UserError("there is no validation data to evaluate on; set data.val")
        self.loaders.check_sources(stage=stage)

    def setup(self, stage: str) -> None:
        if not self.running_trainer.is_global_zero:
            return
        val = self.loaders.val_data
        log.info("training %r", self.loaders.train_data.source)
        log.info("validation %r", val.source if val is not None else None)
        for line in self._described:
            log.info("%s", line)

    def train_dataloader(self) -> DataLoader:
        return self.loaders.train(self.running_trainer)

    def val_dataloader(self) -> DataLoader | list[Any]:
        return self.loaders.val(self.running_trainer)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # here the batch is still on the CPU: counting costs no synchronisation
        self.loaders.count_failures(batch.failed, training=self.running_trainer.training)
        return batch


class PretrainingData(ImageData):
    """Images, masks and visual tokens for masked image modelling.

    The loader yields a TwoViewBatch of bytes; on the device it becomes a MIMBatch: the encoder's
    view normalised by `mean` and `std`, the tokenizer's view as token ids. The tokenizer is frozen,
    follows the batch to its device, and is part of no checkpoint.

    Raises:
        UserError: the tokenizer's grid is not the grid of the masking; see also `check`.
    """

    def __init__(
        self,
        train: ImageSource,
        val: ImageSource | None,
        *,
        views: TwoViewTransform,
        masking: Masking,
        tokenizer: Tokenizer,
        mean: Sequence[float],
        std: Sequence[float],
        loader: LoaderSettings,
        tokenizer_precision: str = "bf16",
    ) -> None:
        if tokenizer_precision not in ("bf16", "fp32"):
            raise UserError(f"tokenizer_precision '{tokenizer_precision}': expected bf16 or fp32")
        token_grid = tuple(tokenizer.grid(views.token_image_size))
        if token_grid != tuple(masking.grid):
            raise UserError(
                f"the tokenizer makes {token_grid[0]}x{token_grid[1]} tokens of its "
                f"{views.token_image_size[0]}x{views.token_image_size[1]} view, but the mask has "
                f"{masking.grid[0]}x{masking.grid[1]} patches; set the view to "
                f"{masking.grid[0] * tokenizer.stride}x{masking.grid[1] * tokenizer.stride}"
            )
        make_sample = TwoViewSample(views, masking)
        described = (f"views {views!r}", f"masking {masking!r}", f"tokenizer {_name(tokenizer)}")
        super().__init__(
            loader,
            TwoViewBatch,
            train=(train, make_sample),
            val=(val, make_sample),
            described=described,
        )
        assert isinstance(tokenizer, nn.Module)
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.tokenizer_precision = tokenizer_precision
        self.mean, self.std = torch.tensor(list(mean)), torch.tensor(list(std))

    def on_after_batch_transfer(self, batch: TwoViewBatch, dataloader_idx: int) -> MIMBatch:
        return MIMBatch(
            self.normalize(batch.images),
            batch.mask,
            self.tokenize(batch.token_images),
            batch.indices,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float, normalised for the encoder."""
        mean, std = (_channels(values, images) for values in (self.mean, self.std))
        return images.float().sub_(mean * 255).div_(std * 255)

    def denormalize(self, images: Tensor) -> Tensor:
        """The encoder's images (B, 3, H, W) back to [0, 1]."""
        return images.float() * _channels(self.std, images) + _channels(self.mean, images)

    @torch.no_grad()
    def tokenize(self, token_images: Tensor) -> Tensor:
        """uint8 (B, 3, H', W') -> token ids (B, h, w) int64."""
        device = token_images.device
        self.tokenizer.to(device)  # moves once; afterwards there is nothing to move
        pixels = to_value_range(token_images.float().div_(255), self.tokenizer.value_range)
        bf16 = self.tokenizer_precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.tokenizer.encode(pixels)


class ClassificationData(ImageData):
    """Images with classes; training batches are mixed on the device if `mixing` is given.

    `num_classes` is a number, or "auto" for as many as the training source has. `mixing` is called
    with (images, targets) and gives (images, soft targets), e.g. timm's Mixup; its draws depend on
    (seed, epoch, micro-batch, rank) alone.

    Raises:
        UserError: a source without labels, labels outside [0, num_classes), or training and
            validation classes that differ (their numbers would mean different things).
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
        check_classes(train, val)
        count = len(train.classes or ()) if num_classes == "auto" else int(num_classes)
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
        self.classes = train.classes
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

    def on_after_batch_transfer(self, batch: PixelBatch, dataloader_idx: int) -> PixelBatch:
        return batch._replace(images=batch.images.float().div_(255))


def _name(tokenizer: Tokenizer) -> str:
    low, high = tokenizer.value_range
    return (
        f"{type(tokenizer).__name__}(vocab_size={tokenizer.vocab_size}, "
        f"stride={tokenizer.stride}, value_range={low:.4g}..{high:.4g})"
    )


def _channels(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device)[:, None, None]
