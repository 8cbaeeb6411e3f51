"""Decides when a checkpoint is written and how long it is kept."""

import logging
import math
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging

from beit.checkpoints.file import replace_by_copy
from beit.checkpoints.folder import BEST, LAST, file_name, header_facts, numbered_files, step_of
from beit.checkpoints.loops import (
    at_boundary,
    begin_epoch_afresh,
    ends_epoch,
    ends_run,
    settle,
    validation_due,
)
from beit.checkpoints.plugin import CheckpointFiles
from beit.checkpoints.ranks import check_same_step, on_first_rank
from beit.checkpoints.record import run_id_of
from beit.checkpoints.space import check_space
from beit.data.limits import whole_number
from beit.errors import UserError
from beit.files import explained, remove_leftovers, replace_link
from beit.job import signals

log = logging.getLogger(__name__)


class CheckpointKeeper(Checkpoint):
    """Writes `epoch0001-step0000123.safetensors`, lets `last` point to the newest, keeps the best.

    Only at optimizer boundaries: no accumulated gradient is ever lost. An epoch's own checkpoint is
    written after its validation, and serves for what else is due at its last step. The end of a run
    is always written.

    Of the files that this run wrote into `folder` the newest `keep` stay; an older one is removed
    once a newer one has been read back. Files of others are left alone. Where the run goes on from
    an older one, later ones are given another name, which no `resume=auto` looks for.

    Args:
        folder: where the files go.
        every_n_epochs, every_n_steps, every_minutes: when; 0 for never. The minutes are those of
            rank 0's clock. Several may be given.
        keep: how many of the newest; -1 keeps all. With 1, a damaged file leaves none.
        best_by: a metric of the validation; `best.safetensors` is the checkpoint with the best, of
            those in this folder. Empty for none.
        best_mode: whether the best is the largest or the smallest.

    Raises:
        UserError: a number out of range, nothing would ever be written, or no such metric.
        NoSpace: before the first step, if `keep` checkpoints and one more do not fit on the disk;
            later, if it is full. The older checkpoints are intact.
        NonFiniteWeights: weights or optimizer state are not finite. Nothing was written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_n_epochs: int = 1,
        every_n_steps: int = 0,
        every_minutes: float = 0.0,
        keep: int = 2,
        best_by: str = "",
        best_mode: Literal["max", "min"] = "max",
    ) -> None:
        whole_number("every_n_epochs", every_n_epochs, at_least=0)
        whole_number("every_n_steps", every_n_steps, at_least=0)
        if not math.isfinite(every_minutes) or every_minutes < 0:
            raise UserError(f"every_minutes {every_minutes}: expected a number from 0")
        if keep != -1:
            whole_number("keep", keep, at_least=1)
        if best_mode not in ("max", "min"):
            raise UserError(f"best_mode '{best_mode}': expected max or min")
        self.folder = Path(folder)
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.every_minutes, self.keep = every_minutes, keep
        self.best_by, self.best_mode = best_by, best_mode
        self.best_score: float | None = None
        self.best_step = -1
        self._files: list[Path] = []  # numbered ones of this run in this folder, oldest first
        self._saved_step, self._saved_at = -1, time.monotonic()
        self._score = math.nan  # of the validation at this boundary
        self._validated_at = -1  # the micro-batch, over all epochs, that it followed
        self._validating = False
        self._late = False  # what was due at an epoch's last step is written at its end
        self._clock_group: Any = None

    def save_now(self, trainer: L.Trainer) -> Path:
        """Write a checkpoint of this moment; call it on all ranks, at an optimizer boundary.

        In `on_train_batch_end` or later: also within a validation, which a resumed run then does
        again from its beginning. Returns the file's path, on every rank.
        """

        def write() -> Path:
            path = self._free_path(trainer)
            trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
            self._point_to(path)
            self._rotate(path)
            return path

        with signals.held(), self._trained_weights(trainer):
            checkpoint = self._dump(trainer)
            path = on_first_rank(trainer, write)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        return path

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        plugin = trainer.strategy.checkpoint_io
        assert isinstance(plugin, CheckpointFiles), "give the trainer plugins=[CheckpointFiles()]"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        begin_epoch_afresh(trainer)
        if self.every_minutes and trainer.world_size > 1:
            self._clock_group = torch.distributed.new_group(backend="gloo")
        check_same_step(trainer, self.folder)
        self._saved_step, self._saved_at = trainer.global_step or -1, time.monotonic()
        if not on_first_rank(trainer, lambda: self._take_over(trainer)):
            self.best_score, self.best_step = None, -1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not at_boundary(trainer) or trainer.global_step == self._saved_step:
            return
        due = self._minutes_due()
        due |= self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0
        # without a validation to come the epoch has as good as ended; after a resume its end would
        # not come again
        at_end = self._epoch_due(trainer) or not validation_due(trainer)
        self._late = due and ends_epoch(trainer) and at_end
        if due and not self._late:
            self.save_now(trainer)

    def on_validation_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._validating = not trainer.sanity_checking

    def on_validation_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._validating = False

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.sanity_checking or not at_boundary(trainer):
            return
        self._validated_at = trainer.fit_loop.total_batch_idx
        self._score = self._read_score(trainer)
        if not ends_epoch(trainer) and self._is_best(trainer):
            self._write_best(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not at_boundary(trainer):
            return
        is_best = self._is_best(trainer)
        due = self._late or (ends_epoch(trainer) and self._epoch_due(trainer))
        self._late = False
        if due or (ends_run(trainer) and trainer.global_step != self._saved_step):
            path = self.save_now(trainer)
            if is_best:
                on_first_rank(trainer, lambda: replace_by_copy(self.folder / BEST, path))
        elif is_best:
            self._write_best(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        validated = self._validated_at == trainer.fit_loop.total_batch_idx
        settle(checkpoint, trainer, validated=validated)

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    def _epoch_due(self, trainer: L.Trainer) -> bool:
        every = self.every_n_epochs
        return every > 0 and (trainer.current_epoch + 1) % every == 0

    def _minutes_due(self) -> bool:
        if not self.every_minutes:
            return False
        due = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        if self._clock_group is None:
            return due
        flag = torch.tensor([due])  # on the CPU: no device is made to wait for it
        torch.distributed.broadcast(flag, src=0, group=self._clock_group)
        return bool(flag)

    def _take_over(self, trainer: L.Trainer) -> bool:
        """Find what this run wrote here before; returns whether its best is among it."""
        for path in remove_leftovers(self.folder):
            log.info("removed %s, which an interrupted save had left", path)
        self._files = numbered_files(self.folder, run_id_of(trainer))
        best = self.folder / BEST
        self._set_aside(trainer)
        present = [*self._files, *([best] if best.is_file() else [])]
        files = max(self.keep, 1) + bool(self.best_by)
        check_space(trainer, self.folder, present, files=files)
        for path in self._files:  # killed between the checkpoint and its becoming the best
            if step_of(path) == self.best_step and step_of(best) != self.best_step:
                replace_by_copy(best, path)
        return best.is_file()

    def _set_aside(self, trainer: L.Trainer) -> None:
        """What this run wrote of later steps, before its user went back, is of another past."""
        step, run_id = trainer.global_step, run_id_of(trainer)
        last, best = self.folder / LAST, self.folder / BEST
        found = {path: header_facts(path) for path in [*self._files, best]}
        for path, facts in found.items():
            if facts is not None and facts[0] > step and facts[1] == run_id:
                aside = path.with_name(f"{path.name}.later-{secrets.token_hex(4)}")
                path.rename(aside)
                log.warning("%s is of a step after %d: it is now %s", path, step, aside.name)
        self._files = [path for path in self._files if path.exists()]
        if last.is_symlink() and not last.exists():
            last.unlink()
            if self._files:
                self._point_to(self._files[-1])

    def _point_to(self, path: Path) -> None:
        """Let `last` be this file."""
        last = self.folder / LAST
        with explained(last):
            linked = replace_link(last, path.name)
        if not linked:
            replace_by_copy(last, path)

    def _dump(self, trainer: L.Trainer) -> dict[str, Any]:
        return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)

    @contextmanager
    def _trained_weights(self, trainer: L.Trainer) -> Iterator[None]:
        """The model's own weights in their place, also in a validation of the averaged ones.

        Until a checkpoint is on the disk: the tensors in it are the model's, not copies.
        """
        averages: list[Any] = []
        if self._validating:
            averages = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]
        for average in averages:
            average._swap_models(trainer.lightning_module)
        try:
            yield
        finally:
            for average in averages:
                average._swap_models(trainer.lightning_module)

    def _free_path(self, trainer: L.Trainer) -> Path:
        """A name that no file of another run has."""
        path = self.folder / file_name(trainer.current_epoch, trainer.global_step)
        taken = path not in self._files and header_facts(path) is not None
        return path.with_stem(f"{path.stem}-{run_id_of(trainer)}") if taken else path

    def _rotate(self, path: Path) -> None:
        """`path` was written and read back: of what is older, too much goes."""
        self._files = [*(file for file in self._files if file != path), path]
        while self.keep != -1 and len(self._files) > self.keep:
            self._files.pop(0).unlink(missing_ok=True)

    def _write_best(self, trainer: L.Trainer) -> None:
        checkpoint, plugin = self._dump(trainer), trainer.strategy.checkpoint_io
        with signals.held():
            on_first_rank(trainer, lambda: plugin.save_checkpoint(checkpoint, self.folder / BEST))

    def _read_score(self, trainer: L.Trainer) -> float:
        """The metric of the validation that has just ended, as rank 0 has it."""
        if not self.best_by:
            return math.nan
        found = trainer.callback_metrics
        if self.best_by not in found:
            raise UserError(
                f"best_by={self.best_by}: the validation has no such metric; there are "
                f"{', '.join(sorted(found))}"
            )
        return trainer.strategy.broadcast(float(found[self.best_by]))

    def _is_best(self, trainer: L.Trainer) -> bool:
        """Whether the validation at this boundary was the best so far; asked once for each."""
        score, self._score = self._score, math.nan
        if math.isnan(score):
            return False
        sign = 1 if self.best_mode == "max" else -1
        if self.best_score is not None and sign * score <= sign * self.best_score:
            return False
        self.best_score, self.best_step = score, trainer.global_step
        return True
