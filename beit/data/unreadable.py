"""Unreadable images: named as they are met, counted, recorded, and refused beyond a limit."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch.distributed as dist

from beit.data.images import UnreadableImage
from beit.data.sources import ImageSource
from beit.errors import UserError

log = logging.getLogger(__name__)

RECORD = "unreadable.jsonl"


class UnreadableImages:
    """The unreadable images of a run, as far as this rank has met them.

    They stand in `unreadable.jsonl` of the run's folder too, a line of JSON for each: rank, role,
    index, name, reason. A line is appended by one call to the system as soon as the image is met,
    so a killed run leaves whole lines, and all ranks write to the same file. A resumed run goes on
    with those of its rank: a limit is not got round by starting again.

    Args:
        limit: different images, of training and validation together, that may fail on a rank.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: dict[tuple[str, int], str] = {}  # by role ("training", ...) and index
        self._path: Path | None = None  # not known before there is a run
        self._rank = 0
        self._told: dict[tuple[str, int], str] = {}  # why

    def probe(self, source: ImageSource, role: str, *, count: int, strict: bool) -> None:
        """Decode `count` images, spread evenly over the source.

        Raises UserError if all fail or more than the limit, and if `strict` for a single one.
        """
        count = min(count, len(source))
        failures = []
        for index in np.linspace(0, len(source) - 1, count).round().astype(int).tolist():
            try:
                source.load(index)
            except UnreadableImage as error:
                failures.append(error)
                self.names[role, index] = error.name
                self._told[role, index] = error.reason
        if not failures:
            return
        named = "; ".join(str(error) for error in failures[:3])
        message = f"{len(failures)} of {count} {role} images tried are unreadable: {named}"
        limit = 0 if strict else self.limit
        if len(self.names) > limit or len(failures) == count:
            raise UserError(f"{message} (limit {limit}); mend or remove them")
        log.warning("%s", message)

    def record_in(self, folder: Path, *, rank: int) -> None:
        """From now on the record is kept in this folder; what it holds of this rank counts."""
        self._path, self._rank = folder / RECORD, rank
        recorded = {
            (entry["role"], entry["index"]): entry["name"]
            for entry in read_record(self._path)
            if entry["rank"] == rank
        }
        met = dict(self.names)
        self.names.update(recorded)
        for role, index in met.keys() - recorded.keys():  # when the sources were tried
            self._record(role, index)

    def meet(self, source: ImageSource, role: str, index: int, why: str = "") -> None:
        """Name an image that failed, the first time. Raises UserError beyond the limit.

        Args:
            why: name and reason; empty to find out by reading it once more.
        """
        if (role, index) in self.names:
            return
        why = why or reason(source, index)
        name = source.name(index)
        self.names[role, index] = name
        self._told[role, index] = why.removeprefix(f"{name}: ")
        fate = "another stands in for it" if role == "training" else "left out"
        log.warning("unreadable %s image, %s: %s", role, fate, why)
        self._record(role, index)
        if len(self.names) > self.limit:
            raise UserError(
                f"{len(self.names)} unreadable images, more than max_unreadable_images="
                f"{self.limit}, the last {why}; mend the data set"
            )

    def _record(self, role: str, index: int) -> None:
        if self._path is None:
            return
        entry = {
            "rank": self._rank,
            "role": role,
            "index": index,
            "name": self.names[role, index],
            "reason": self._told[role, index],
        }
        try:
            _append(self._path, json.dumps(entry) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror)
            self._path = None

    def log_total(self, trainer: L.Trainer) -> None:
        """One line, if there were any. All ranks must call it, each at the end of its run."""
        met = set(self.names)
        if trainer.world_size > 1 and dist.is_initialized():
            of_ranks: list[set[tuple[str, int]]] = [set() for _ in range(trainer.world_size)]
            dist.all_gather_object(of_ranks, met)
            met = set().union(*of_ranks)
        if met and trainer.is_global_zero:
            training = sum(role == "training" for role, _ in met)
            log.warning(
                "%d unreadable images in this run: %d training, %d validation%s",
                *(len(met), training, len(met) - training),
                f" (see {self._path})" if self._path else "",
            )


def reason(source: ImageSource, index: int) -> str:
    """Name of an unreadable image and why, found out by reading it once more."""
    try:
        source.load(index)
    except UnreadableImage as error:
        return str(error)
    return f"{source.name(index)}: readable at the second attempt"


def read_record(path: Path) -> list[dict[str, Any]]:
    """The entries of a record; none where there is no file. A torn last line is passed over."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and {"rank", "role", "index", "name"} <= entry.keys():
            entries.append(entry)
    return entries


def _append(path: Path, line: str) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        # a line that was torn by a full disk is ended first
        torn = os.path.getsize(path) and not _ends_line(path)
        os.write(descriptor, (b"\n" if torn else b"") + line.encode())
    finally:
        os.close(descriptor)


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
