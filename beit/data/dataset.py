"""From (epoch, index) to a sample, and from samples to batches."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from beit.data.images import LazyJpeg, UnreadableImage
from beit.data.randomness import sample_key, sample_rng
from beit.data.sources import ImageSource, opened
from beit.data.token_cache import TokenCache
from beit.data.views import EvalTransform, PixelTransform, TrainTransform, TwoViewTransform
from beit.data.workers import Failure, SampleError, fault
from beit.errors import UserError
from beit.job.exits import RunEnd

REPLACEMENT_ATTEMPTS = 16


class Masking(Protocol):
    """Draws which patches are hidden."""

    grid: tuple[int, int]
    target: int

    def __call__(self, rng: random.Random) -> np.ndarray: ...


@dataclass(frozen=True)
class SampleKey:
    """All that the random draws of a sample depend on."""

    seed: int
    epoch: int
    index: int
    stands_in: bool = False  # the image is another's: its own could not be read

    def rng(self, stream: str) -> random.Random:
        return sample_rng(self.seed, self.epoch, self.index, stream)


# An image, its label and its key -> the tensors of one sample. Where its attribute `takes_lazy` is
# true, a JPEG may come as a LazyJpeg.
MakeSample = Callable[[Any, int | None, SampleKey], tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Sample:
    """One sample before collation."""

    tensors: tuple[Tensor | None, ...]  # None: a second view that nobody needs
    index: int
    failed: int  # -1, or the unreadable image that this one stands in for
    reason: str = ""  # its name and why it could not be read


class KeyedDataset(Dataset[Sample]):
    """A source indexed by (epoch, index), with `make_sample` applied to each image.

    An unreadable image is replaced by another, chosen from (seed, index), so that a batch keeps its
    size and every rank and every resumed run chooses the same. The replacement uses the random
    draws of the sample it stands in for, which is named in `failed`: whether that is borne
    (training) or refused (evaluation) is decided where the batch arrives.

    Raises:
        UserError: the replacements are unreadable too.
        SampleError: anything else, with the image's name.
    """

    def __init__(self, source: ImageSource, make_sample: MakeSample, *, seed: int) -> None:
        self.source = source
        self.make_sample = make_sample
        self.seed = seed
        self.reading: Callable[[int], None] = _nobody  # is told which image, -1 for none

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        try:
            return self._sample(epoch, index)
        except (UserError, RunEnd):
            raise
        except Exception as error:
            what = f"epoch {epoch}, image {index} ({self.source.name(index)})"
            raise fault(error, what) from error

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Sample] | list[Failure]:
        """The samples of a batch; out of a worker, what went wrong comes in their place."""
        samples = []
        for key in keys:
            try:
                samples.append(self[key])
            except (UserError, SampleError) as error:
                if get_worker_info() is None:
                    raise
                return [Failure(error)]
        self.reading(-1)
        return samples

    def _sample(self, epoch: int, index: int) -> Sample:
        candidate = index
        failures: list[UnreadableImage] = []
        for attempt in range(REPLACEMENT_ATTEMPTS):
            self.reading(candidate)
            key = SampleKey(self.seed, epoch, index, stands_in=candidate != index)
            try:
                tensors = self.make_sample(*self._get(candidate), key)
            except UnreadableImage as error:  # of a lazy one as late as within make_sample
                failures.append(error)
            else:
                reason = str(failures[0]) if failures else ""
                return Sample(tensors, candidate, index if failures else -1, reason)
            candidate = sample_key(self.seed, attempt, index, "replacement") % len(self.source)
        raise UserError(
            f"unreadable image {failures[0]}; {REPLACEMENT_ATTEMPTS} images tried in its place, "
            "all unreadable: mend the data set"
        )

    def _get(self, index: int) -> tuple[Image.Image | LazyJpeg, int | None]:
        if getattr(self.make_sample, "takes_lazy", False):
            return opened(self.source, index)
        return self.source.load(index)


def _nobody(index: int) -> None:
    """Nobody wants to know which image is being read."""


class TwoViewSample:
    """The first five fields of a TwoViewBatch, for pretraining.

    With `views_per_image` K an image has K crops, drawn from (seed, epoch mod K, index), where it
    otherwise has a new one in each epoch; its masks are new in each epoch all the same. With a
    `cache` the second view is left out wherever its tokens are there.
    """

    def __init__(
        self,
        views: TwoViewTransform,
        masking: Masking,
        *,
        views_per_image: int | None = None,
        cache: TokenCache | None = None,
    ) -> None:
        assert cache is None or cache.views == views_per_image, "a cache needs views to come again"
        self.views = views
        self.takes_lazy = views.scaled_decoding
        self.masking = masking
        self.views_per_image = views_per_image
        self.cache = cache
        self._no_ids = torch.full(masking.grid, -1, dtype=torch.int32)

    def __call__(
        self, image: Image.Image | LazyJpeg, label: int | None, key: SampleKey
    ) -> tuple[Tensor | None, ...]:
        view = key.epoch % self.views_per_image if self.views_per_image else key.epoch
        # a stand-in is of another image than the row is meant for
        keep = self.cache is not None and not key.stands_in
        row = self.cache.row(view, key.index) if self.cache and keep else -1
        known = self.cache.read(row) if self.cache and keep else None
        rng = replace(key, epoch=view).rng("views")
        first, second = self.views(image, rng, token_view=known is None)
        return (
            first,
            second,
            self._no_ids if known is None else torch.from_numpy(known),
            torch.tensor(row),
            torch.from_numpy(self.masking(key.rng("mask"))),
        )


class MaskedSample:
    """(image, mask): the encoder's view alone, from the same draws as a TwoViewSample's."""

    def __init__(self, views: TwoViewTransform, masking: Masking) -> None:
        self.views = views
        self.takes_lazy = views.scaled_decoding
        self.masking = masking

    def __call__(
        self, image: Image.Image | LazyJpeg, label: int | None, key: SampleKey
    ) -> tuple[Tensor | None, ...]:
        view, _ = self.views(image, key.rng("views"), token_view=False)
        return view, torch.from_numpy(self.masking(key.rng("mask")))


class PixelSample:
    """(image,) for training a tokenizer."""

    def __init__(self, views: PixelTransform) -> None:
        self.views = views

    def __call__(self, image: Image.Image, label: int | None, key: SampleKey) -> tuple[Tensor, ...]:
        return (self.views(image, key.rng("views")),)


class TrainLabelledSample:
    """(image, target) with augmentation."""

    def __init__(self, transform: TrainTransform) -> None:
        self.transform = transform
        self.takes_lazy = transform.scaled_decoding

    def __call__(
        self, image: Image.Image | LazyJpeg, label: int | None, key: SampleKey
    ) -> tuple[Tensor, ...]:
        return self.transform(image, key.seed, key.epoch, key.index), _target(label)


class EvalLabelledSample:
    """(image, target) without randomness."""

    def __init__(self, transform: EvalTransform) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image, label: int | None, key: SampleKey) -> tuple[Tensor, ...]:
        return self.transform(image), _target(label)


class Collate:
    """Samples -> a batch of `batch_type`, whose last two fields are indices and failed."""

    def __init__(self, batch_type: type[Any]) -> None:
        self.batch_type = batch_type

    def __call__(self, samples: Sequence[Sample]) -> Any:
        fields = [_joined(field) for field in zip(*(s.tensors for s in samples), strict=True)]
        indices = torch.tensor([sample.index for sample in samples])
        failed = torch.tensor([sample.failed for sample in samples])
        return self.batch_type(*fields, indices, failed)


def _joined(field: Sequence[Tensor | None]) -> Tensor:
    """One field of all samples; of a second view, of those that have one."""
    there = [value for value in field if value is not None]
    return torch.stack(there) if there else torch.empty(0, dtype=torch.uint8)


def _target(label: int | None) -> Tensor:
    assert label is not None, "the data module refuses sources without labels"
    return torch.tensor(label)
