"""The token cache: the visual tokens of a fixed set of views, computed once and read ever after.

A tokenizer of DALL-E's size costs more than the encoder's own forward pass. With K views an image
(`views_per_image`) the crops come again every K epochs, so their tokens can be kept: 2 bytes each,
392 a view of 14x14.
"""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from beit.errors import UserError
from beit.files import replace_text
from beit.job.exits import Exit, RunEnd

FORMAT = 1
MAX_VOCAB_SIZE = 2**16 - 1  # 0 says that a token is not there yet
_ROWS_AT_ONCE = 2**16


class TokenCacheFull(RunEnd):
    """The disk cannot hold the token cache. `needed` and `free` are bytes."""

    code = Exit.NO_SPACE

    def __init__(self, path: str | Path, needed: int, free: int) -> None:
        super().__init__(path, needed, free)
        self.path, self.needed, self.free = str(path), needed, free

    def __str__(self) -> str:
        return (
            f"no space left for the token cache {self.path}: it still needs "
            f"{self.needed / 1e9:.3f} GB, {self.free / 1e9:.3f} GB are free; what it holds stays "
            "good: make room, choose another token_cache, or fewer views_per_image"
        )


class TokenCache:
    """Token ids of `views` x `images` views, in one memory-mapped file that processes share.

    Row `view * images + index` holds the h·w tokens of a view, each as its id + 1 in 2 bytes. The
    file starts as one hole, all zeros; a row is there once none of its tokens is 0. So nothing else
    needs to be kept in step: whoever is killed while writing leaves rows that are there and rows
    that are not. Processes that write the same row write the same bytes.

    Args:
        folder: of this cache alone, with `about.json` beside `tokens.u16`.
        images, views: how many there are of each.
        grid: (h, w).
        vocab_size: V, at most 65,535.
        made_of: what the tokens are a function of, as plain data (see `PretrainingData`).

    Raises:
        UserError: the vocabulary is too large for 2 bytes.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        images: int,
        views: int,
        grid: tuple[int, int],
        vocab_size: int,
        made_of: dict[str, Any],
    ) -> None:
        if vocab_size > MAX_VOCAB_SIZE:
            raise UserError(
                f"a token cache holds ids of 2 bytes, up to {MAX_VOCAB_SIZE} tokens, and this "
                f"tokenizer has {vocab_size}: set token_cache=null"
            )
        self.folder = Path(folder).expanduser()
        self.images, self.views, self.grid = images, views, tuple(grid)
        self.vocab_size = vocab_size
        self.made_of = made_of
        self._tokens: np.ndarray | None = None

    def __len__(self) -> int:
        """Rows."""
        return self.views * self.images

    def __repr__(self) -> str:
        return f"TokenCache({self.folder}, {self.images} images x {self.views} views)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}  # a spawned worker maps the file for itself

    @property
    def path(self) -> Path:
        return self.folder / "tokens.u16"

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self) * self.grid[0] * self.grid[1] * 2

    def check(self) -> None:
        """Before anything is made: whether what lies there is this cache, and fits on the disk.

        Raises:
            UserError: it holds other tokens, named by what made them; or is no cache at all.
            TokenCacheFull: there is no room for the rest of it.
        """
        about = self.folder / "about.json"
        if about.is_file():
            self._compare(about)
        elif self.path.exists() or _below_a_file(self.folder):
            raise UserError(f"token_cache: {self.folder} is not a token cache: choose another path")
        needed = self.size - self._held()
        free = shutil.disk_usage(_nearest_folder(self.folder)).free
        if needed > free:
            raise TokenCacheFull(self.folder, needed, free)

    def open(self) -> None:
        """Make the files where they are missing, and map them. For every process, in any order.

        Raises as `check`, and UserError where nothing can be written.
        """
        self.check()
        try:
            about = self.folder / "about.json"
            if not about.is_file():
                replace_text(about, json.dumps(self._facts(), indent=2) + "\n")
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.fstat(descriptor).st_size < self.size:
                    os.ftruncate(descriptor, self.size)  # a hole: takes no room yet
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"token_cache: {self.folder} cannot be written ({error.strerror}): choose another"
            ) from error
        self._compare(about)  # another process may have been faster, with other tokens
        self._map()

    def share_there(self) -> float:
        """About how much of it is there, from the room it takes: `missing` knows, but reads all."""
        return min(1.0, self._held() / self.size)

    def row(self, view: int, index: int) -> int:
        return view * self.images + index

    def read(self, row: int) -> np.ndarray | None:
        """Token ids (h,w) int32 of a row; None where they are not there yet.

        Raises UserError for an id outside the vocabulary: the file was damaged.
        """
        stored = self._map()[row]
        if not stored.all():
            return None
        ids = stored.astype(np.int32) - 1
        if int(ids.max()) >= self.vocab_size:
            raise UserError(
                f"{self.path} is damaged: image {row % self.images} has token {int(ids.max())} of "
                f"{self.vocab_size}; delete the folder, its tokens are computed anew"
            )
        return ids.reshape(self.grid)

    def write(self, rows: Sequence[int], token_ids: Tensor) -> None:
        """Keep the token ids (B,h,w) of the rows (B).

        Raises TokenCacheFull where the disk is full.
        """
        values = (token_ids.cpu().flatten(1).numpy() + 1).astype(np.uint16)
        width = values.shape[1] * 2
        # not through the mapping: on a full disk that would be a SIGBUS, and on a network file
        # system whole pages, with the neighbours' rows as this machine last saw them
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for row, value in zip(rows, values, strict=True):
                os.pwrite(descriptor, value.tobytes(), row * width)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise TokenCacheFull(self.folder, self.size, 0) from error
        finally:
            os.close(descriptor)

    def missing(self) -> np.ndarray:
        """The rows that are not there yet, in order (int64)."""
        tokens = self._map()
        found = [
            begin + np.flatnonzero(~tokens[begin : begin + _ROWS_AT_ONCE].all(axis=1))
            for begin in range(0, len(self), _ROWS_AT_ONCE)
        ]
        return np.concatenate(found)

    def _held(self) -> int:
        return self.path.stat().st_blocks * 512 if self.path.exists() else 0

    def _map(self) -> np.ndarray:
        if self._tokens is None:
            shape = (len(self), self.grid[0] * self.grid[1])
            self._tokens = np.memmap(self.path, np.uint16, "r", shape=shape)
        return self._tokens

    def _facts(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "images": self.images,
            "views": self.views,
            "grid": list(self.grid),
            "vocab_size": self.vocab_size,
            **self.made_of,
        }

    def _compare(self, about: Path) -> None:
        try:
            there = json.loads(about.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = None
        if not isinstance(there, dict):
            raise UserError(f"{about} is not a token cache's: choose another token_cache")
        wanted = self._facts()
        other = [
            f"{key} was {_short(there.get(key))} and is {_short(wanted.get(key))}"
            for key in {**wanted, **there}
            if there.get(key) != wanted.get(key)
        ]
        if other:
            raise UserError(
                f"the token cache {self.folder} holds other tokens: {', '.join(other)}; choose "
                "another token_cache, or delete that folder"
            )


def _below_a_file(path: Path) -> bool:
    return any(part.exists() and not part.is_dir() for part in (path, *path.absolute().parents))


def _nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _short(value: Any) -> str:
    text = str(value)
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:8] if is_digest else text
