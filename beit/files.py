"""Files that are there as a whole or not at all, also when the disk is full or the process killed.

A temporary file in the same folder (a move from another file system would be a copy that first
empties the target), flushed to the disk, renamed, the folder flushed.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from beit.checkpoints.errors import NoSpace
from beit.errors import UserError

_PART = re.compile(r"\..+\.[0-9a-f]+\.part")
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP)


def local_path(path: str | Path) -> Path:
    """A path on this machine's file systems. Raises UserError for a URL."""
    if "://" in str(path):
        raise UserError(f"{path}: checkpoints are local files; fetch it first, or mount the store")
    return Path(path).expanduser()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` at the end; its folder is made.

    Where the body raises, what stood at `path` still does, and nothing else is left behind. The
    file's own name, until then, is its `name`; `remove_leftovers` knows it. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = part_path(path)
    file = temporary.open("xb")
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        # before it is closed: closing flushes, which fails again on a full disk
        temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.close()


def replace_text(path: Path, text: str) -> None:
    """Write a file, or put new content in its place. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode())


def replace_link(link: Path, target: str) -> bool:
    """Let a symbolic link point to `target`, a name in its own folder, with no moment without it.

    False where the file system has no links. Raises OSError.
    """
    temporary = part_path(link)
    try:
        os.symlink(target, temporary)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    os.replace(temporary, link)
    flush_folder(link.parent)
    return True


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files that killed writers left in a folder; returns them.

    A file that a living process is writing is locked, and stays.
    """
    removed = []
    for path in sorted(folder.glob(".*.part")) if folder.is_dir() else ():
        if not _PART.fullmatch(path.name):
            continue
        if not path.is_symlink():
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                except OSError:
                    pass  # a file system without locks: the folder is this run's own
        path.unlink()
        removed.append(path)
    return removed


def part_path(path: Path) -> Path:
    """A temporary name that no other writer has, whatever its machine; see `remove_leftovers`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def flush_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: Path, needed: int = 0) -> Iterator[None]:
    """Raises NoSpace, or UserError, where `path` cannot be written; `needed` is in bytes."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(path, needed, _free(path.parent)) from error
        raise UserError(
            f"{path} cannot be written ({error.strerror}): choose another folder, or mend this one"
        ) from error


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
