"""Fills a token cache ahead of a training, so that the training never waits for the tokenizer."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import Sampler

from beit.data.dataset import Collate, KeyedDataset, SampleKey
from beit.data.images import LazyJpeg
from beit.data.loading import LoaderSettings
from beit.data.token_cache import TokenCache
from beit.data.unreadable import UnreadableImages
from beit.data.views import TwoViewTransform
from beit.data.workers import WatchedLoader


class TokenViewBatch(NamedTuple):
    """The tokenizer's views alone."""

    token_images: Tensor  # (B, 3, H', W') uint8
    cache_rows: Tensor  # (B,) int64, where their tokens belong; -1: nowhere, it is a stand-in's
    indices: Tensor  # (B,) int64
    failed: Tensor  # (B,) int64


class TokenViewSample:
    """(token_image, cache row): the second view of a TwoViewSample, of view `key.epoch`."""

    def __init__(self, views: TwoViewTransform, cache: TokenCache) -> None:
        self.views = views
        self.takes_lazy = views.scaled_decoding
        self.cache = cache

    def __call__(
        self, image: Image.Image | LazyJpeg, label: int | None, key: SampleKey
    ) -> tuple[Tensor, ...]:
        row = -1 if key.stands_in else self.cache.row(key.epoch, key.index)
        return self.views.token_view(image, key.rng("views")), torch.tensor(row)


class RowBatches(Sampler[list[tuple[int, int]]]):
    """A rank's share of cache rows in order, as batches of (view, index)."""

    def __init__(self, rows: np.ndarray, *, images: int, batch_size: int) -> None:
        self.rows, self.images, self.batch_size = rows, images, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for begin in range(0, len(self.rows), self.batch_size):
            rows = self.rows[begin : begin + self.batch_size].tolist()
            yield [divmod(row, self.images) for row in rows]


def fill(
    cache: TokenCache,
    data: KeyedDataset,
    views: TwoViewTransform,
    encode: Callable[[Tensor], Tensor],
    *,
    settings: LoaderSettings,
    role: str,
    rank: int,
    world_size: int,
) -> tuple[int, int]:
    """Work out what is missing in a cache, this rank's share of it.

    Views that are there are not read again, so an interrupted call is gone on with by another one.
    Unreadable images are named and their rows left out.

    Args:
        encode: uint8 (B, 3, H', W') on the CPU -> token ids (B, h, w).
        role: of the data, for messages.

    Returns:
        (rows that were worked out, rows that could not be).

    Raises:
        UserError: more unreadable images than `settings` bears.
    """
    rows = cache.missing()
    rows = rows[rows % world_size == rank]  # whatever the others have written by now
    unreadable = UnreadableImages(settings.max_unreadable_images)
    workers = settings.num_workers if len(rows) else 0
    loader = WatchedLoader(
        KeyedDataset(data.source, TokenViewSample(views, cache), seed=data.seed),
        batch_sampler=RowBatches(
            rows, images=cache.images, batch_size=settings.batch_size_per_device
        ),
        num_workers=workers,
        collate_fn=Collate(TokenViewBatch),
        limit=settings.timeout_seconds,
        pin_memory=torch.cuda.is_available(),
        **({"prefetch_factor": settings.prefetch_factor} if workers else {}),
    )
    done = left_out = 0
    with _progress(role, len(rows), shown=rank == 0) as advance:
        for batch in loader:
            advance(len(batch.indices))
            for index in batch.failed[batch.failed >= 0].tolist():
                unreadable.meet(data.source, role, index, loader.reasons.get(index, ""))
            kept = batch.cache_rows >= 0
            left_out += int((~kept).sum())
            if bool(kept.any()):
                cache.write(batch.cache_rows[kept].tolist(), encode(batch.token_images[kept]))
            done += int(kept.sum())
    return done, left_out


@contextlib.contextmanager
def _progress(role: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn(f"tokens of the {role} images"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(role, total=total)
        yield lambda count: bar.advance(task, count)
