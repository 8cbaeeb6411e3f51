"""Our data path on photographs in memory."""

import itertools
from collections.abc import Iterator
from typing import Any

from beit.data.fast_views import FastTwoViewTransform
from beit.data.loading import LoaderSettings
from beit.data.pretraining import PretrainingData
from beit.data.sampler import GlobalBatchSampler
from beit.data.sources import ImageSource
from beit.data.views import TwoViewTransform
from beit.data.workers import WatchedLoader
from beit.tokenizers.base import Tokenizer
from scripts.bench import steps
from scripts.bench.settings import MEAN, STD, Shape


def views(
    shape: Shape, *, fast: bool = False, scaled_decoding: bool | None = None
) -> TwoViewTransform:
    """As views=two_view or two_view_fast has them, unless it is said how JPEGs are decoded."""
    return (FastTwoViewTransform if fast else TwoViewTransform)(
        image_size=shape.image_size,
        token_image_size=shape.token_image_size,
        scaled_decoding=fast if scaled_decoding is None else scaled_decoding,
    )


def pretraining(
    source: ImageSource,
    shape: Shape,
    tokenizer: Tokenizer,
    *,
    fast: bool = False,
    workers: int = 0,
    **options: Any,
) -> PretrainingData:
    """The data module, with everything else as in the released recipe."""
    loader = LoaderSettings(
        global_batch_size=shape.batch_size,
        batch_size_per_device=shape.batch_size,
        num_workers=workers,
        seed=0,
        check_images=0,
    )
    return PretrainingData(
        source,
        None,
        views=views(shape, fast=fast),
        masking=steps.masking(shape, exact=False),
        tokenizer=tokenizer,
        mean=MEAN,
        std=STD,
        loader=loader,
        **options,
    )


def open_loader(data: PretrainingData) -> WatchedLoader:
    """Its training loader, without a trainer."""
    settings = data.loaders.settings
    sampler = GlobalBatchSampler(
        len(data.loaders.train_data),
        batch_size=settings.batch_size_per_device,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
        last_batch="drop",
    )
    several = {"persistent_workers": True, "prefetch_factor": settings.prefetch_factor}
    return WatchedLoader(
        data.loaders.train_data,
        batch_sampler=sampler,
        num_workers=settings.num_workers,
        collate_fn=data.loaders.collate,
        limit=settings.timeout_seconds,
        **(several if settings.num_workers else {}),
    )


def endless(loader: WatchedLoader) -> Iterator[Any]:
    """Its batches, epoch after epoch."""
    for epoch in itertools.count():
        loader.batch_sampler.set_epoch(epoch)
        yield from loader
