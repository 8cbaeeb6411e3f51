"""Data modules: sources, transforms and loaders of each task, and what happens on the device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn

from beit.data import fingerprint
from beit.data.batches import LabelledBatch, MIMBatch, PixelBatch, TwoViewBatch
from beit.data.dataset import (
    EvalLabelledSample,
    Masking,
    PixelSample,
    TrainLabelledSample,
    TwoViewSample,
)
from beit.data.image_data import ImageData as ImageData
from beit.data.label_checks import check_labels, number_of_classes, shared_classes
from beit.data.limits import checked_normalisation
from beit.data.loading import Loaders as Loaders
from beit.data.loading import LoaderSettings as LoaderSettings
from beit.data.randomness import keyed_global_rng
from beit.data.sources import ImageSource
from beit.data.views import EvalTransform, PixelTransform, TrainTransform, TwoViewTransform
from beit.errors import UserError
from beit.sizes import height_width
from beit.tokenizers.base import Tokenizer, to_value_range

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class PretrainingData(ImageData):
    """Images, masks and visual tokens for masked image modelling.

    The loader yields a TwoViewBatch of bytes; on the device it becomes a MIMBatch: the encoder's
    view normalised by `mean` and `std`, the tokenizer's view as token ids. The tokenizer is frozen,
    follows the batch to its device, and is part of no checkpoint.

    Raises:
        UserError: the tokenizer's grid is not the grid of the masking, or `mean` and `std` are not
            three numbers each; see also `check`.
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
        mean, std = checked_normalisation(mean, std)
        described = (
            f"views {views!r}",
            f"encoder's view normalised by mean {mean}, std {std}",
            f"masking {masking!r}",
            f"tokenizer {_name(tokenizer)}",
        )
        super().__init__(
            loader,
            TwoViewBatch,
            train=(train, make_sample),
            val=(val, make_sample),
            described=described,
            warned_of=_size_warning(tokenizer, views.token_image_size),
        )
        assert isinstance(tokenizer, nn.Module)
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.tokenizer_precision = tokenizer_precision
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def fingerprint(self) -> dict[str, Any]:
        """The same with the tokenizer's weights, which make the targets."""
        return {**super().fingerprint(), "tokenizer": fingerprint.of_module(self.tokenizer)}

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


def _name(tokenizer: Tokenizer) -> str:
    low, high = tokenizer.value_range
    return (
        f"{type(tokenizer).__name__}(vocab_size={tokenizer.vocab_size}, "
        f"stride={tokenizer.stride}, value_range={low:.4g}..{high:.4g})"
    )


def _size_warning(tokenizer: Tokenizer, view: tuple[int, int]) -> tuple[str, ...]:
    """A line for a tokenizer that was trained on another scale; some do not say which."""
    trained = getattr(tokenizer, "image_size", None)
    if trained is None or height_width(trained) == view:
        return ()
    height, width = height_width(trained)
    return (
        f"the tokenizer was trained at {height}x{width} px and gets {view[0]}x{view[1]} px: it "
        f"sees things {view[0] / height:.3g} times as tall as it has learnt, so its tokens may be "
        "poor; train one at this size, or change the image or patch size",
    )


def _channels(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device)[:, None, None]
