"""Loaders of a data module: batches, workers, where a resumed run goes on, unreadable images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from beit.data import opening
from beit.data.batches import SegmentationBatch, TwoViewBatch
from beit.data.dataset import Collate, KeyedDataset
from beit.data.limits import not_negative, whole_number
from beit.data.sampler import (
    GlobalBatchSampler,
    evaluation_batches,
    full_steps,
    limited,
    tail_sizes,
)
from beit.data.unreadable import UnreadableImages, reason
from beit.data.workers import WatchedLoader, WorkerLost
from beit.errors import UserError


@dataclass(frozen=True)
class LoaderSettings:
    """How samples are read.

    Args:
        global_batch_size: images of an optimizer step, over all devices.
        batch_size_per_device: images of a micro-batch on one device; of a validation batch at most.
        num_workers: processes per rank; 0 reads in the main process.
        seed: of order, views and masks.
        max_unreadable_images: different images, of training and validation together, that may fail
            on a rank before the run is refused.
        timeout_seconds: how long a batch may take to come from a worker; 0 waits for ever.
        prefetch_factor: batches read ahead by each worker.
        max_image_pixels: an image of more is not decoded; it counts as unreadable.
        check_images: images of each source that are decoded before training begins.
        last_batch: the images of an epoch that fill no global batch: "drop" leaves them out (others
            in each epoch), "keep" has a last step of fewer images.
        repeats: draws of each image in a global batch, so many fewer images in an epoch; see
            `GlobalBatchSampler`.
    """

    global_batch_size: int
    batch_size_per_device: int
    num_workers: int
    seed: int
    max_unreadable_images: int = 100
    timeout_seconds: float = 300.0
    prefetch_factor: int = 4
    max_image_pixels: int = opening.MAX_PIXELS
    check_images: int = 64
    last_batch: Literal["drop", "keep"] = "drop"
    repeats: int = 1

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "batch_size_per_device", "prefetch_factor", "repeats"):
            whole_number(name, getattr(self, name), at_least=1)
        whole_number("max_image_pixels", self.max_image_pixels, at_least=1)
        for name in ("num_workers", "seed", "max_unreadable_images", "check_images"):
            whole_number(name, getattr(self, name), at_least=0)
        not_negative("timeout_seconds", self.timeout_seconds)
        if self.last_batch not in ("drop", "keep"):
            raise UserError(f"last_batch {self.last_batch!r}: expected drop or keep")
        if self.repeats > self.global_batch_size:
            raise UserError(
                f"repeats {self.repeats}: a global batch of {self.global_batch_size} images has no "
                "room for so many draws of one image; give at most its size"
            )


class Loaders:
    """The training and the validation loader of one data module; `val` may be missing."""

    def __init__(
        self,
        settings: LoaderSettings,
        batch_type: type[Any],
        *,
        train: KeyedDataset,
        val: KeyedDataset | None,
    ) -> None:
        self.settings = settings
        opening.limit_pixels(settings.max_image_pixels)
        self.train_data = train
        self.val_data = val
        self.unreadable = UnreadableImages(settings.max_unreadable_images)
        self.collate = Collate(batch_type)
        self.collate_val: Callable[[Sequence[Any]], Any] = self.collate
        self._open: dict[str, WatchedLoader] = {}  # by the role of their data

    def micro_batches(self, *, world_size: int, accumulate: int) -> int:
        """Training batches of each rank in an epoch.

        Raises UserError if the data do not fill an optimizer step, or the last one cannot be dealt
        out.
        """
        batch_size = self.settings.batch_size_per_device
        full = full_steps(len(self.train_data), batch_size, world_size, accumulate)
        tail = self.tail_sizes(world_size=world_size, accumulate=accumulate)
        return full * accumulate + len(tail) // world_size

    def steps_per_epoch(self, *, world_size: int, accumulate: int) -> int:
        """Optimizer steps in an epoch; raises as `micro_batches`."""
        return -(-self.micro_batches(world_size=world_size, accumulate=accumulate) // accumulate)

    def tail_sizes(self, *, world_size: int, accumulate: int) -> list[int]:
        """Sizes of all ranks' batches in an epoch's last incomplete step; empty: there is none."""
        if self.settings.last_batch == "drop":
            return []
        batch_size = self.settings.batch_size_per_device
        return tail_sizes(len(self.train_data), batch_size, world_size, accumulate)

    def last_batch_told(self) -> str:
        """A line for the log: what becomes of the images that fill no global batch."""
        size, batch = len(self.train_data), self.settings.global_batch_size
        steps = f"{size} training images, {size // batch} steps of {batch} an epoch"
        if (repeats := self.settings.repeats) > 1:
            steps += f", {repeats} draws each of {-(-size // repeats)} images (loader.repeats)"
        rest = size % batch
        if rest == 0:
            return steps
        if self.settings.last_batch == "drop":
            return f"{steps}; the last {rest} of its order are left out (loader.last_batch=drop)"
        return f"{steps}; a last step sees the remaining {rest} (loader.last_batch=keep)"

    def check_validation(self, *, world_size: int) -> None:
        """Raises UserError if the validation images do not reach every rank."""
        if self.val_data is not None:
            batch_size = self.settings.batch_size_per_device
            evaluation_batches(len(self.val_data), batch_size, world_size)

    def train(self, trainer: L.Trainer) -> DataLoader:
        """The loader of this rank, which begins where a resumed run left off."""
        self._check_global_batch(trainer)
        sampler = self._sampler(trainer, self.train_data, training=True)
        epoch, micro_batch = resume_position(trainer, len(sampler))
        sampler.set_epoch(epoch)
        sampler.start(micro_batch)
        return self._loader("training", sampler, trainer)

    def val(self, trainer: L.Trainer) -> DataLoader | list[Any]:
        """All validation images, spread over the ranks; no loader if there are none."""
        if self.val_data is None:
            return []
        sampler = self._sampler(trainer, self.val_data, training=False)
        return self._loader("validation", sampler, trainer)

    def lost_worker(self) -> WorkerLost | None:
        """What is known of workers that have ended by themselves; None if all live."""
        found = (loader.lost() for loader in self._open.values())
        return next((lost for lost in found if lost), None)

    def _sampler(
        self, trainer: L.Trainer, data: KeyedDataset, *, training: bool
    ) -> GlobalBatchSampler:
        return GlobalBatchSampler(
            len(data),
            batch_size=self.settings.batch_size_per_device,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches if training else 1,
            seed=self.settings.seed,
            shuffle=training,
            last_batch=self.settings.last_batch if training else "even",
            repeats=self.settings.repeats if training else 1,
        )

    def _loader(self, role: str, sampler: GlobalBatchSampler, trainer: L.Trainer) -> DataLoader:
        workers = self.settings.num_workers
        worker_options: dict[str, Any] = {}
        if workers > 0:
            worker_options = {
                "persistent_workers": True,
                "prefetch_factor": self.settings.prefetch_factor,
            }
        self._open[role] = WatchedLoader(
            self.train_data if role == "training" else self.val_data,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=self.collate if role == "training" else self.collate_val,
            limit=self.settings.timeout_seconds,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            # its own generator: a loader draws a seed for its workers at every epoch, which would
            # otherwise shift the dropout of a resumed run
            generator=torch.Generator().manual_seed(self.settings.seed),
            **worker_options,
        )
        return self._open[role]

    def _check_global_batch(self, trainer: L.Trainer) -> None:
        per_device, accumulate = (
            self.settings.batch_size_per_device,
            trainer.accumulate_grad_batches,
        )
        actual = per_device * trainer.world_size * accumulate
        if actual != self.settings.global_batch_size:
            raise UserError(
                f"global batch {self.settings.global_batch_size}: {per_device} per device x "
                f"{trainer.world_size} devices x {accumulate} accumulated make {actual}; "
                "change one of the four"
            )

    def check_sources(self, *, stage: str) -> None:
        """Decode some images of each source before anything else is done."""
        count = self.settings.check_images
        if stage == "fit":
            self.unreadable.probe(self.train_data.source, "training", count=count, strict=False)
        if self.val_data is not None:
            strict = stage != "fit"
            self.unreadable.probe(self.val_data.source, "validation", count=count, strict=strict)

    def without_failures(self, batch: Any, trainer: L.Trainer) -> Any:
        """A batch, still on the CPU, whose unreadable images are named and dealt with.

        In training others stand in for them. In the validations of a fit they are left out, and so
        are their stand-ins; only a batch without a single readable image keeps one stand-in, for a
        rank may not skip a step. In an evaluation of its own the first one is refused, for the
        result would be of other images.

        Raises:
            UserError: refused, or more than `max_unreadable_images` were met.
        """
        failed = batch.failed
        kept = failed < 0
        if bool(kept.all()):
            return batch
        role = "training" if trainer.training else "validation"
        data = self.train_data if trainer.training else self.val_data
        assert data is not None
        reasons = self._open[role].reasons if role in self._open else {}
        fitting = trainer.state.fn == TrainerFn.FITTING
        for index in failed[~kept].tolist():
            if not fitting:
                why = reasons.get(index) or reason(data.source, index)
                raise UserError(
                    f"unreadable validation image {why}; none is skipped in evaluation: mend or "
                    "remove it"
                )
            self.unreadable.meet(data.source, role, index, reasons.get(index, ""))
        if trainer.training:
            return batch
        if not bool(kept.any()):
            kept[0] = True
        if isinstance(batch, TwoViewBatch | SegmentationBatch):
            return batch.kept(kept)
        return type(batch)(*(field[kept] for field in batch))


def resume_position(trainer: L.Trainer, micro_batches: int) -> tuple[int, int]:
    """(epoch, micro-batch) at which training goes on, from Lightning's restored counters.

    (0, 0) for a fresh run. `micro_batches` is the length of an epoch. Lightning restores the
    counters before it asks for the loader, and tells the sampler its epoch only after it called
    iter(); so this is the one place where both are known.
    """
    loop: Any = trainer.fit_loop
    micro_batches = limited(micro_batches, trainer.limit_train_batches)
    done = loop.epoch_loop.batch_progress.current.ready
    if 0 < done < micro_batches:
        return loop.epoch_progress.current.processed, done
    # saved on an epoch's last batch (that epoch counts as started, not as processed), or after its
    # end (as both): the next one is the number of epochs that were started
    return loop.epoch_progress.current.started, 0
