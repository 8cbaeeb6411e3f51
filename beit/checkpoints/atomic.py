"""Files that are there as a whole or not at all, also when the disk is full or the process killed.

A temporary file in the same folder (a move from another file system would be a copy that first
empties the target), flushed to the disk, renamed, the folder flushed.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from beit.checkpoints.errors import NoSpace
from beit.errors import UserError

_PART = re.compile(r"\..+\.\d+\.part")


def local_path(path: str | Path) -> Path:
    """A path on this machine's file systems. Raises UserError for a URL."""
    if "://" in str(path):
        raise UserError(f"{path}: checkpoints are local files; fetch it first, or mount the store")
    return Path(path).expanduser()


@contextlib.contextmanager
def temporary_file(path: Path, needed: int) -> Iterator[tuple[BinaryIO, Path]]:
    """A file to write to, locked for as long as it is; gone afterwards if it was not renamed."""
    temporary = part_path(path)
    with explained(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.fdopen(os.open(temporary, flags, 0o644), "wb")
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)  # a killed process may have had the same number
            yield file, temporary
        finally:
            # before it is closed: closing flushes, which fails again on a full disk
            temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                file.close()


def replace_link(link: Path, target: str) -> None:
    """Let a symbolic link point to `target`, a name in its own folder, with no moment without it.

    Raises NoSpace, or UserError where there are no links.
    """
    temporary = part_path(link)
    with explained(link, 0):
        temporary.unlink(missing_ok=True)
        os.symlink(target, temporary)
        os.replace(temporary, link)
        flush_folder(link.parent)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files that killed writers left in a folder; returns them.

    A file that a living process is writing is locked, and stays.
    """
    removed = []
    for path in sorted(folder.glob(".*.part")) if folder.is_dir() else ():
        if not _PART.fullmatch(path.name):
            continue
        if not path.is_symlink():
            with open(path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                except OSError:
                    pass  # a file system without locks: the folder is this run's own
        path.unlink()
        removed.append(path)
    return removed


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


def part_path(path: Path) -> Path:
    """The temporary file of a writer; `remove_leftovers` knows it by its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextlib.contextmanager
def explained(path: Path, needed: int) -> Iterator[None]:
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
