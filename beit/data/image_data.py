"""What the data modules have in common."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from beit.data import fingerprint
from beit.data.dataset import KeyedDataset, MakeSample
from beit.data.loading import Loaders, LoaderSettings
from beit.data.sources import ImageSource
from beit.data.workers import WorkerLost
from beit.errors import UserError

log = logging.getLogger(__name__)


class ImageData(L.LightningDataModule):
    """What the data modules have in common: sources, the loaders that read them, their checks.

    Args:
        batch_type: what the loaders yield.
        train, val: the source, and what makes a sample of its images.
        described: lines for the log of a run.
        warned_of: warnings for it.
    """

    def __init__(
        self,
        settings: LoaderSettings,
        batch_type: type[Any],
        *,
        train: tuple[ImageSource, MakeSample],
        val: tuple[ImageSource | None, MakeSample],
        described: Sequence[str],
        warned_of: Sequence[str] = (),
    ) -> None:
        super().__init__()
        source, make_sample = val
        val_data = None if source is None else KeyedDataset(source, make_sample, seed=settings.seed)
        train_data = KeyedDataset(*train, seed=settings.seed)
        self.loaders = Loaders(settings, batch_type, train=train_data, val=val_data)
        self.classes: list[str] | None = None
        self.labelled: dict[str, Any] | None = None  # other sources, for those who look on
        self.lost: WorkerLost | None = None  # a process that read images, once one is gone
        self._described, self._warned_of = described, warned_of

    @property
    def running_trainer(self) -> L.Trainer:
        assert self.trainer is not None, "Lightning attaches the trainer before it asks for loaders"
        return self.trainer

    def micro_batches(self, *, world_size: int, accumulate: int) -> int:
        """Training batches of each rank in an epoch."""
        return self.loaders.micro_batches(world_size=world_size, accumulate=accumulate)

    def steps_per_epoch(self, *, world_size: int, accumulate: int) -> int:
        """Optimizer steps in an epoch."""
        return self.loaders.steps_per_epoch(world_size=world_size, accumulate=accumulate)

    def check(self, *, world_size: int, accumulate: int, stage: str = "fit") -> None:
        """Raises UserError for too few or unreadable images. `stage` is fit or validate."""
        if stage == "fit":
            self.steps_per_epoch(world_size=world_size, accumulate=accumulate)
        elif self.loaders.val_data is None:
            raise UserError("there is no validation data to evaluate on; set data.val")
        self.loaders.check_validation(world_size=world_size)
        self.loaders.check_sources(stage=stage)

    def fingerprint(self) -> dict[str, Any]:
        """What the run is trained on and validated on, see `beit.data.fingerprint`."""
        val = self.loaders.val_data
        return {
            "train": self.fingerprint_of("train", self.loaders.train_data.source),
            "val": None if val is None else self.fingerprint_of("val", val.source),
        }

    def fingerprint_of(self, role: str, source: ImageSource) -> dict[str, Any]:
        """Of the source that has this role; worked out once, for millions of names take seconds."""
        if role not in self._fingerprints:
            self._fingerprints[role] = fingerprint.of_source(source)
        return self._fingerprints[role]

    @functools.cached_property
    def _fingerprints(self) -> dict[str, dict[str, Any]]:
        return {}

    def setup(self, stage: str) -> None:
        if stage == "fit":
            trainer = self.running_trainer
            folder = Path(trainer.default_root_dir)
            self.loaders.unreadable.record_in(folder, rank=trainer.global_rank)
        if not self.running_trainer.is_global_zero:
            return
        val = self.loaders.val_data
        log.info("training %r", self.loaders.train_data.source)
        log.info("validation %r", val.source if val is not None else None)
        if stage == "fit":
            log.info("%s", self.loaders.last_batch_told())
        for line in self._described:
            log.info("%s", line)
        for line in self._warned_of:
            log.warning("%s", line)

    def train_dataloader(self) -> DataLoader:
        return self.loaders.train(self.running_trainer)

    def val_dataloader(self) -> DataLoader | list[Any]:
        return self.loaders.val(self.running_trainer)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # here the batch is still on the CPU: counting costs no synchronisation
        return self.loaders.without_failures(batch, self.running_trainer)

    def on_exception(self, exception: BaseException) -> None:
        # torch may tell of a dead worker anywhere in the program, and soon ends all the others
        self.lost = self.loaders.lost_worker()

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self.loaders.unreadable.log_total(self.running_trainer)
