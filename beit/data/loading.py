"""Loaders of a data module: batches, workers, where a resumed run goes on, unreadable images."""

import logging
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from beit.data.dataset import Collate, KeyedDataset
from beit.data.images import UnreadableImage
from beit.data.sampler import GlobalBatchSampler, full_steps, limited
from beit.data.sources import ImageSource
from beit.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderSettings:
    """How samples are read.

    Args:
        global_batch_size: images of an optimizer step, over all devices.
        batch_size_per_device: images of a micro-batch on one device.
        num_workers: processes per rank; 0 reads in the main process.
        seed: of order, views and masks.
        max_unreadable_images: different images that may fail on a rank before the run is refused.
        timeout_seconds: how long a batch may take to come from a worker; 0 waits for ever.
        prefetch_factor: batches read ahead by each worker.
        check_images: images of each source that are decoded before training begins.
    """

    global_batch_size: int
    batch_size_per_device: int
    num_workers: int
    seed: int
    max_unreadable_images: int = 100
    timeout_seconds: float = 300.0
    prefetch_factor: int = 4
    check_images: int = 64

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "batch_size_per_device", "prefetch_factor"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in ("num_workers", "seed", "max_unreadable_images", "check_images"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)}: must not be negative")


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
        self.train_data = train
        self.val_data = val
        self.unreadable: dict[int, str] = {}  # of the training source, as met so far
        self._collate = Collate(batch_type)

    def steps_per_epoch(self, *, world_size: int, accumulate: int) -> int:
        """Optimizer steps in an epoch. Raises UserError if the data do not fill one."""
        batch_size = self.settings.batch_size_per_device
        return full_steps(len(self.train_data), batch_size, world_size, accumulate)

    def train(self, trainer: L.Trainer) -> DataLoader:
        """The loader of this rank, which begins where a resumed run left off."""
        self._check_global_batch(trainer)
        sampler = self._sampler(trainer, self.train_data, training=True)
        epoch, micro_batch = resume_position(trainer, len(sampler))
        sampler.set_epoch(epoch)
        sampler.start(micro_batch)
        return self._loader(self.train_data, sampler, trainer)

    def val(self, trainer: L.Trainer) -> DataLoader | list[Any]:
        """All validation images, spread over the ranks; no loader if there are none."""
        if self.val_data is None:
            return []
        sampler = self._sampler(trainer, self.val_data, training=False)
        return self._loader(self.val_data, sampler, trainer)

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
            drop_last=training,
        )

    def _loader(
        self, data: KeyedDataset, sampler: GlobalBatchSampler, trainer: L.Trainer
    ) -> DataLoader:
        workers = self.settings.num_workers
        worker_options: dict[str, Any] = {}
        if workers > 0:
            worker_options = {
                "persistent_workers": True,
                "prefetch_factor": self.settings.prefetch_factor,
                "timeout": self.settings.timeout_seconds,
                "worker_init_fn": _one_thread,
            }
        return DataLoader(
            data,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=self._collate,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            # its own generator: a loader draws a seed for its workers at every epoch, which would
            # otherwise shift the dropout of a resumed run
            generator=torch.Generator().manual_seed(self.settings.seed),
            **worker_options,
        )

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
        if stage == "fit":
            self._check_source(self.train_data.source, "training", limit=self._limit)
        if self.val_data is not None:
            self._check_source(self.val_data.source, "validation", limit=0)

    def _check_source(self, source: ImageSource, role: str, *, limit: int) -> None:
        count = min(self.settings.check_images, len(source))
        failures = []
        for index in np.linspace(0, len(source) - 1, count).round().astype(int).tolist():
            try:
                source.load(index)
            except UnreadableImage as error:
                failures.append(error)
                if limit:
                    self.unreadable[index] = error.name
        if not failures:
            return
        named = "; ".join(str(error) for error in failures[:3])
        message = f"{len(failures)} of {count} {role} images tried are unreadable: {named}"
        if len(failures) > limit or len(failures) == count:
            raise UserError(f"{message} (limit {limit}); mend or remove them")
        log.warning("%s", message)

    @property
    def _limit(self) -> int:
        return self.settings.max_unreadable_images

    def count_failures(self, failed: Tensor, *, training: bool) -> None:
        """Name the images of a batch that were replaced; raise UserError beyond the limit.

        In evaluation the first one is refused, for the result would be of other images.
        `failed` (B,) int64 on the CPU, -1 where nothing failed.
        """
        for index in failed[failed >= 0].tolist():
            data = self.train_data if training else self.val_data
            assert data is not None
            if not training:
                raise UserError(
                    f"unreadable validation image {reason(data.source, index)}; "
                    "none is skipped in evaluation: mend or remove it"
                )
            if index in self.unreadable:
                continue
            self.unreadable[index] = data.source.name(index)
            log.warning("unreadable image replaced: %s", reason(data.source, index))
            if len(self.unreadable) > self._limit:
                raise UserError(
                    f"{len(self.unreadable)} unreadable images, more than max_unreadable_images="
                    f"{self._limit}, the last {reason(data.source, index)}; mend the data set"
                )


def reason(source: ImageSource, index: int) -> str:
    """Name of an unreadable image and why; it is read once more, for workers pass on no text."""
    try:
        source.load(index)
    except UnreadableImage as error:
        return str(error)
    return f"{source.name(index)}: readable at the second attempt"


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


def _one_thread(worker_id: int) -> None:
    torch.set_num_threads(1)  # the workers share the cores with the training step
