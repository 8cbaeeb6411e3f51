"""Images, masks and visual tokens for masked image modelling."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit.data import fingerprint
from beit.data.batches import MIMBatch, TwoViewBatch
from beit.data.dataset import Masking, TwoViewSample
from beit.data.image_data import ImageData
from beit.data.limits import whole_number
from beit.data.loading import LoaderSettings
from beit.data.normalization import Normalization
from beit.data.sources import ImageSource
from beit.data.token_cache import TokenCache
from beit.data.tokenization import fill
from beit.data.views import TwoViewTransform
from beit.errors import UserError
from beit.sizes import height_width
from beit.tokenizers.base import Tokenizer, to_value_range

log = logging.getLogger(__name__)


class PretrainingData(ImageData):
    """Images, masks and visual tokens for masked image modelling.

    The loader yields a TwoViewBatch of bytes; on the device it becomes a MIMBatch: the encoder's
    view normalised by `mean` and `std`, the tokenizer's view as token ids. The tokenizer is frozen,
    follows the batch to its device, and is part of no checkpoint.

    Args:
        views_per_image: K views of each image, that come again every K epochs; None: new ones in
            every epoch, as in the paper. Masks are new in every epoch either way.
        token_cache: a folder that keeps the token ids of those views; None: they are worked out
            each time. Validation has one view an image, and a cache of its own.

    Raises:
        UserError: the tokenizer's grid is not the grid of the masking, `mean` and `std` are not
            three numbers each, or a cache without `views_per_image`; see also `check`.
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
        views_per_image: int | None = None,
        token_cache: str | Path | None = None,
    ) -> None:
        if tokenizer_precision not in ("bf16", "fp32"):
            raise UserError(f"tokenizer_precision '{tokenizer_precision}': expected bf16 or fp32")
        _check_grids(views, masking, tokenizer)
        if views_per_image is not None:
            whole_number("views_per_image", views_per_image, at_least=1)
        elif token_cache is not None:
            raise UserError(
                f"token_cache={token_cache} without views_per_image: new views in every epoch have "
                "new tokens; set views_per_image=K to draw K views of each image"
            )
        assert isinstance(tokenizer, nn.Module)
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.tokenizer_precision = tokenizer_precision
        self.views = views
        self.normalize = Normalization(mean, std)
        self.caches: dict[str, TokenCache] = {}  # by role
        samples = {}
        for role, source, count in (("train", train, views_per_image), ("val", val, 1)):
            if token_cache is not None and source is not None:
                assert count is not None
                self.caches[role] = TokenCache(
                    Path(token_cache) / role,
                    images=len(source),
                    views=count,
                    grid=masking.grid,
                    vocab_size=tokenizer.vocab_size,
                    made_of=self._made_of(role, source, loader.seed),
                )
            cache = self.caches.get(role)
            samples[role] = TwoViewSample(views, masking, views_per_image=count, cache=cache)
        super().__init__(
            loader,
            TwoViewBatch,
            train=(train, samples["train"]),
            val=(val, samples["val"]),
            described=(
                f"views {views!r}, {_again(views_per_image)}",
                f"encoder's view normalised by {self.normalize!r}",
                f"masking {masking!r}",
                f"tokenizer {_name(tokenizer)}",
            ),
            warned_of=_size_warning(tokenizer, height_width(views.token_image_size)),
        )

    def _made_of(self, role: str, source: ImageSource, seed: int) -> dict[str, Any]:
        """All that the tokens of a source's views are a function of, for their cache to compare."""
        return {
            "data": self.fingerprint_of(role, source)["sha256"],
            "drawn_by": repr(self.views),
            "seed": seed,
            "tokenizer": self._tokenizer_hash,
            "tokenizer_precision": self.tokenizer_precision,
        }

    @functools.cached_property
    def _tokenizer_hash(self) -> str:
        """Worked out when it is first asked for: an evaluation has no use for it."""
        return fingerprint.of_module(self.tokenizer)

    def check(self, *, world_size: int, accumulate: int, stage: str = "fit") -> None:
        """As of every data module; and UserError for a cache that holds other tokens."""
        super().check(world_size=world_size, accumulate=accumulate, stage=stage)
        for cache in self.caches.values():
            cache.check()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for cache in self.caches.values():
            cache.open()
            if self.running_trainer.is_global_zero:
                log.info("%r, about %.0f %% of it there", cache, 100 * cache.share_there())

    def fingerprint(self) -> dict[str, Any]:
        """The same with the tokenizer's weights, which make the targets."""
        return {**super().fingerprint(), "tokenizer": self._tokenizer_hash}

    def on_after_batch_transfer(self, batch: TwoViewBatch, dataloader_idx: int) -> MIMBatch:
        return MIMBatch(
            self.normalize(batch.images), batch.mask, self.token_ids(batch), batch.indices
        )

    def token_ids(self, batch: TwoViewBatch) -> Tensor:
        """(B, h, w) int64: what the cache knew, and the tokenizer for the rest, which is kept."""
        known = batch.token_ids.long()
        if len(batch.token_images) == 0:
            return known
        fresh = self.tokenize(batch.token_images)
        if len(fresh) < len(known):
            missing = batch.has_view
            known[missing], rows = fresh, batch.cache_rows[missing]
        else:
            known, rows = fresh, batch.cache_rows
        if self.caches:
            role = "train" if self.running_trainer.training else "val"
            kept = rows >= 0
            self.caches[role].write(rows[kept].tolist(), fresh[kept])
        return known

    def fill_caches(self, device: torch.device, *, rank: int, world_size: int) -> dict[str, int]:
        """Work out this rank's share of the tokens that the caches do not hold yet.

        Returns the rows that were worked out and, as `unreadable`, those that could not be. Raises
        UserError where there is no cache, or for too many unreadable images.
        """
        if not self.caches:
            raise UserError("there is no cache to fill: set token_cache=FOLDER views_per_image=K")
        counts = {"unreadable": 0}
        datasets = {"train": self.loaders.train_data, "val": self.loaders.val_data}
        for role, cache in self.caches.items():
            cache.open()
            data = datasets[role]
            assert data is not None
            counts[role], left_out = fill(
                cache,
                data,
                self.views,
                lambda token_images: self.tokenize(token_images.to(device, non_blocking=True)),
                settings=self.loaders.settings,
                role={"train": "training", "val": "validation"}[role],
                rank=rank,
                world_size=world_size,
            )
            counts["unreadable"] += left_out
        return counts

    def denormalize(self, images: Tensor) -> Tensor:
        """The encoder's images (B, 3, H, W) back to [0, 1]."""
        return self.normalize.undone(images)

    @torch.no_grad()
    def tokenize(self, token_images: Tensor) -> Tensor:
        """uint8 (B, 3, H', W') -> token ids (B, h, w) int64."""
        device = token_images.device
        self.tokenizer.to(device)  # moves once; afterwards there is nothing to move
        pixels = to_value_range(token_images.float().div_(255), self.tokenizer.value_range)
        bf16 = self.tokenizer_precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.tokenizer.encode(pixels)


def _check_grids(views: TwoViewTransform, masking: Masking, tokenizer: Tokenizer) -> None:
    height, width = height_width(views.token_image_size)
    token_grid = tuple(tokenizer.grid((height, width)))
    if token_grid != tuple(masking.grid):
        raise UserError(
            f"the tokenizer makes {token_grid[0]}x{token_grid[1]} tokens of its "
            f"{height}x{width} view, but the mask has "
            f"{masking.grid[0]}x{masking.grid[1]} patches; set the view to "
            f"{masking.grid[0] * tokenizer.stride}x{masking.grid[1] * tokenizer.stride}"
        )


def _again(views_per_image: int | None) -> str:
    if views_per_image is None:
        return "new ones in every epoch"
    return f"{views_per_image} an image (views_per_image), again every {views_per_image} epochs"


def _name(tokenizer: Tokenizer) -> str:
    low, high = tokenizer.value_range
    return (
        f"{type(tokenizer).__name__}(vocab_size={tokenizer.vocab_size}, "
        f"stride={tokenizer.stride}, value_range={low:.4g}..{high:.4g})"
    )


def _size_warning(tokenizer: Tokenizer, view: tuple[int, int]) -> tuple[str, ...]:
    """A line for a tokenizer that was trained on another size; some do not say which."""
    trained = getattr(tokenizer, "image_size", None)
    if trained is None or height_width(trained) == view:
        return ()
    height, width = height_width(trained)
    return (
        f"the tokenizer was trained at {height}x{width} px and gets {view[0]}x{view[1]} px: in "
        f"crops of the same extent it sees things {view[0] / height:.3g} times as tall as it has "
        "learnt, and its tokens may be poor; train one at this size, or change the image or patch "
        "size, or the crops (views.min_scale, views.max_scale)",
    )
