"""Finding image files, and holding many paths."""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from beit.errors import UserError
from beit.printable import printable

# extensions taken for images (the released code's, and GIF and AVIF)
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".avif",
)  # fmt: skip

_CHUNK = 65_536  # paths


class PathTable:
    """Many paths in one block of bytes."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._bytes, ends = bytearray(), bytearray()
        remaining = iter(paths)
        # so many at a time: as strings all of them would take eight times the room
        while chunk := list(itertools.islice(remaining, _CHUNK)):
            # encoded in one go and told apart by NUL, which no path holds
            joined = os.fsencode("\0".join(chunk) + "\0")
            nul = np.flatnonzero(np.frombuffer(joined, dtype=np.uint8) == 0)
            assert len(nul) == len(chunk), "a path with a NUL"
            ends += (nul - np.arange(len(nul)) + len(self._bytes)).tobytes()
            self._bytes += joined.replace(b"\0", b"")
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def blocks(self) -> tuple[bytearray, bytes]:
        """All of them in order as two blocks of bytes: the characters, and where each path ends."""
        return self._bytes, self._ends.tobytes()

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"path {index} of {len(self)}")
        begin = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(bytes(self._bytes[begin : int(self._ends[index])]))


def image_files(root: Path, *, recursive: bool = True) -> Iterator[str]:
    """Paths of the images below root, relative to it, folder by folder in sorted order.

    Raises UserError for a folder that cannot be read: its images would be missed without a word.
    """
    walk = ((folder, _images(names)) for folder, names in _folders(root))
    for folder, names in sorted(walk) if recursive else [next(walk)]:
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == os.curdir else os.path.join(relative, "")
        for name in names.split("\0") if names else ():
            yield prefix + name


def _images(names: list[str]) -> str:
    """Those of images, sorted, in one string: a folder may hold millions."""
    chosen = [n for n in names if n.lower().endswith(EXTENSIONS) and not n.startswith(".")]
    return "\0".join(sorted(chosen))


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder and its files, links followed. Hidden folders are left out, and so are links to
    a folder that the way came through, or to one above it: they would never end."""
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse):
        yield folder, names
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not _leads_back(os.path.join(folder, name), root)
        ]


def _refuse(error: OSError) -> NoReturn:
    folder = printable(os.fspath(error.filename))
    raise UserError(
        f"{folder}: this folder cannot be read ({error.strerror}); mend its permissions, or move "
        "it out of the data set"
    ) from error


def _leads_back(path: str, root: Path) -> bool:
    if not os.path.islink(path):
        return False
    target, passed = os.path.realpath(path), [os.path.realpath(root)]
    folder = os.path.dirname(path)
    while not os.path.samefile(folder, root):
        passed.append(os.path.realpath(folder))
        folder = os.path.dirname(folder)
    return any(os.path.commonpath([target, real]) == target for real in passed)


def existing_folder(root: str | Path, *, of: str = "images") -> Path:
    """The folder as a path. Raises UserError if there is none, which says what it is to hold."""
    path = Path(root).expanduser()
    try:
        if path.is_dir():
            return path
        kind = "is a file, not a folder" if path.is_file() else "no such folder"
    except OSError as error:  # of a folder above it
        _refuse(error)
    raise UserError(f"{printable(str(path))}: {kind}; give the folder that holds the {of}")


def subfolders(root: Path) -> list[str]:
    """Names of the folders in a folder, sorted; those starting with a dot are passed over.

    Raises UserError if it cannot be read.
    """
    try:
        with os.scandir(root) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        _refuse(error)


def known_extensions() -> str:
    """For messages: jpg jpeg png ..."""
    return " ".join(extension[1:] for extension in EXTENSIONS)
