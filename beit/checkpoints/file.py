"""A checkpoint as one safetensors file that tells when it is damaged.

All tensors lie in it under readable names (`state_dict.backbone.cls_token`), so that
`safetensors.torch.load_file` opens it too; all else is JSON in its metadata. Beside each tensor
lies a SHA-256 of its name, type, shape and bytes, and one more covers the rest with all of these.
safetensors itself has no checksum: of random changes to a file nearly half went unnoticed.

Writing replaces nothing before the new file is whole: a temporary file in the same folder, flushed
to the disk, read back and compared, renamed, the folder flushed. Reading copies: a mapped file
would keep its disk space for as long as the run lives, and end it with SIGBUS if it were cut short.
"""

import contextlib
import json
import os
import shutil
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from beit.checkpoints.errors import DamagedCheckpoint
from beit.checkpoints.header import (
    DTYPE_NAMES,
    DTYPES,
    HEADER_LIMIT,
    Entry,
    check_places,
    checked_metadata,
    damaged,
    digest_of,
    read_entries,
    read_header,
    written_header,
)
from beit.checkpoints.plain import join, split
from beit.errors import UserError
from beit.files import explained, flush_folder, local_path, part_path, replacing

THREADS = min(4, os.cpu_count() or 1)  # hashing and reading leave Python's lock
_CHUNK = 8 * 2**20


def write_file(path: str | Path, content: Any) -> None:
    """Write a tree of tensors and plain data; the file is there as a whole or not at all.

    It is read back before it takes its name: from the kernel's cache, so a disk that returns other
    bytes than it was given is not found out here, but when the file is read.

    Raises:
        UserError: something else than tensors and plain data, or the folder cannot be written to.
        NoSpace: the disk is full. Nothing is left behind, and what stood at `path` still does.
    """
    path = local_path(path)
    text, tensors = split(content)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise UserError(f"a checkpoint cannot hold {name} of type {tensor.dtype}")
    # aligned by their size, as safetensors writes them
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    with explained(path, _total(ordered)), replacing(path) as file:
        _write(file, text, ordered)
        file.flush()
        verify(file.name)


def read_file(path: str | Path) -> Any:
    """The whole tree, all of it verified; tensors are on the CPU.

    Raises DamagedCheckpoint or NewerSchema, both UserErrors.
    """
    file = CheckpointFile.open(path)
    tensors = file.read(file.entries)
    return file.tree(tensors.__getitem__)


def verify(path: str | Path) -> "CheckpointFile":
    """Compare all of a file with its checksums; returns its header.

    Raises DamagedCheckpoint or NewerSchema, both UserErrors.
    """
    file = CheckpointFile.open(path)
    for name, digest in zip(file.entries, file.digests(), strict=True):
        file.compare(name, digest)
    return file


@dataclass(frozen=True)
class CheckpointFile:
    """The header of a checkpoint file, verified; tensors are read, and verified, when asked for.

    The file stays open for as long as this lives: under its name another may lie meanwhile.
    """

    path: Path
    entries: dict[str, Entry]
    text: str  # the plain data, as JSON
    descriptor: int

    @classmethod
    def open(cls, path: str | Path) -> "CheckpointFile":
        """Read the header. Raises DamagedCheckpoint or NewerSchema, both UserErrors."""
        path = local_path(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, start = read_header(path, file, size)
                descriptor = os.dup(file.fileno())
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from error
        with contextlib.ExitStack() as unless_returned:
            unless_returned.callback(os.close, descriptor)
            opened = cls(path, *_content(path, header, start, size), descriptor)
            unless_returned.pop_all()
        weakref.finalize(opened, os.close, descriptor)
        return opened

    def tree(self, tensor: Callable[[str], Any] | None = None) -> Any:
        """The tree of plain data; an Entry, or what `tensor` gives, stands for each tensor."""
        return join(self.text, tensor or self.entries.__getitem__)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, verified."""
        names = list(names)
        with ThreadPoolExecutor(THREADS) as pool:
            return dict(zip(names, pool.map(self._read, names), strict=True))

    def digests(self) -> Iterator[str]:
        """The checksums of what lies in the file, tensor by tensor, without keeping any."""
        with ThreadPoolExecutor(THREADS) as pool:
            yield from pool.map(self._digest, self.entries)

    def compare(self, name: str, digest: str) -> None:
        """Raises DamagedCheckpoint where a checksum is not the one that was written."""
        if digest != self.entries[name].digest:
            raise damaged(self.path, f"the bytes of {name} are not those that were written")

    def _read(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        view = bytes_of(tensor)
        self._fill(view, entry.begin, name)
        self.compare(name, digest_of(name, entry.dtype, entry.shape, [view]))
        return tensor

    def _digest(self, name: str) -> str:
        entry = self.entries[name]
        return digest_of(name, entry.dtype, entry.shape, self._chunks(name))

    def _chunks(self, name: str) -> Iterator[memoryview]:
        _, _, begin, end, _ = self.entries[name]
        buffer = memoryview(bytearray(min(end - begin, _CHUNK)))
        for place in range(begin, end, _CHUNK):
            chunk = buffer[: end - place]
            self._fill(chunk, place, name)
            yield chunk

    def _fill(self, view: memoryview, place: int, name: str) -> None:
        """Read from a place of the file; several threads may, for there is no position to share."""
        while len(view):
            try:
                got = os.preadv(self.descriptor, [view], place)  # at most 2 GB at once
            except OSError as error:  # a disk that fails
                raise damaged(self.path, f"{name} cannot be read ({error.strerror})") from error
            if not got:
                raise damaged(self.path, f"it ends within {name}")
            view, place = view[got:], place + got


def _content(
    path: Path, header: dict[str, Any], start: int, size: int
) -> tuple[dict[str, Entry], str]:
    """(where the tensors lie, the plain data as JSON) of a header, verified."""
    metadata = checked_metadata(path, header)
    try:
        entries = read_entries(header, json.loads(metadata["beit.digests"]), start)
        check_places(entries, start, size)
        join(metadata["beit.tree"], entries.__getitem__)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path, f"its header is not consistent ({error})") from error
    return entries, metadata["beit.tree"]


def replace_by_copy(path: Path, source: Path) -> None:
    """Let `path` be the same file as `source`, or a copy of it where there are no hard links."""
    temporary = part_path(path)
    with explained(path, source.stat().st_size):
        try:
            os.link(source, temporary)
        except OSError:
            with open(source, "rb") as original, replacing(path) as file:
                shutil.copyfileobj(original, file, _CHUNK)
                file.flush()
                verify(file.name)
        else:
            os.replace(temporary, path)
            temporary.unlink(missing_ok=True)  # rename does nothing to two names of one file
            flush_folder(path.parent)


def _total(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _write(file: BinaryIO, text: str, tensors: dict[str, Tensor]) -> None:
    """Header and tensors. The header is written last: its length is known before its content."""
    header = written_header(text, tensors, dict.fromkeys(tensors, "0" * 64))
    if len(header) > HEADER_LIMIT:
        raise UserError(
            f"a checkpoint with {len(header)} bytes of names and plain data: at most "
            f"{HEADER_LIMIT} are read back; keep large data in tensors"
        )
    start = 8 + len(header)
    file.seek(start)
    digests = {}
    # hashed in threads while the next are written; a few at a time, for each may be a copy from a
    # device
    waiting: deque[tuple[str, Future[str]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for name, tensor in tensors.items():
            view = bytes_of(tensor)
            facts = (name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            waiting.append((name, pool.submit(digest_of, *facts, [view])))
            file.write(view)
            if len(waiting) > 2 * THREADS:
                done, future = waiting.popleft()
                digests[done] = future.result()
        digests.update({name: future.result() for name, future in waiting})
    header = written_header(text, tensors, digests)
    assert len(header) == start - 8
    file.seek(0)
    file.write(len(header).to_bytes(8, "little") + header)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; the tensor's own where it is there already."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
