"""Image files on disk as sources: folders of classes, flat folders, lists of files.

The names of the files are kept in one block of bytes: a Python list of a million strings would be
copied, page by page, into every worker of a loader as its reference counts are touched.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beit.data.images import LazyJpeg, open_lazily, open_rgb
from beit.data.paths import (
    PathTable,
    existing_folder,
    image_files,
    known_extensions,
    subfolders,
)
from beit.errors import UserError
from beit.printable import printable


class _Files:
    """Image files below `root`, with a label each or none."""

    classes: list[str] | None
    labels: np.ndarray | None

    def __init__(self, root: Path, files: Iterable[str]) -> None:
        self.root = root
        self._files = PathTable(files)

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        return open_rgb(self.root / self._files[index], self.name(index)), self._label(index)

    def open(self, index: int) -> tuple[Image.Image | LazyJpeg, int | None]:
        return open_lazily(self.root / self._files[index], self.name(index)), self._label(index)

    def _label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return printable(str(self.root / self._files[index]))

    def identity(self) -> tuple[bytes | bytearray, ...]:
        return self._files.blocks()


class ClassFolder(_Files):
    """A folder of class folders: root/CLASS/**/IMAGE, numbered as torchvision's ImageFolder does.

    Labels are the rank of the class name; names starting with a dot are passed over.

    Raises:
        UserError: the folder is missing, has no class folders, or one of them has no images.
    """

    def __init__(self, root: str | Path) -> None:
        folder = existing_folder(root)
        self.classes = subfolders(folder)
        if not self.classes:
            raise UserError(
                f"{folder}: no class folders; expected root/CLASS/IMAGE "
                "(for images without classes use data=unlabelled)"
            )
        counts: list[int] = []
        super().__init__(folder, self._walk(folder, counts))
        self.labels = np.repeat(np.arange(len(counts)), counts)

    def _walk(self, folder: Path, counts: list[int]) -> Iterator[str]:
        """The images class by class; their numbers come to stand in `counts`."""
        assert self.classes is not None
        for name in self.classes:
            count = 0
            for file in image_files(folder / name):
                count += 1
                yield f"{name}{os.sep}{file}"
            if not count:
                raise UserError(
                    f"{printable(str(folder / name))}: no images in this class folder "
                    f"(looked for {known_extensions()}); add some or remove the folder"
                )
            counts.append(count)

    def __repr__(self) -> str:
        return f"ClassFolder({self.root}: {len(self)} images, {len(self.classes or [])} classes)"


class FlatFolder(_Files):
    """All images in a folder and, if recursive, below it, in the order of their names; no labels.

    Raises:
        UserError: the folder is missing or holds no images.
    """

    def __init__(self, root: str | Path, *, recursive: bool = True) -> None:
        folder = existing_folder(root)
        self.classes = self.labels = None
        super().__init__(folder, image_files(folder, recursive=recursive))
        if not len(self):
            raise UserError(f"{folder}: no images found (looked for {known_extensions()})")

    def __repr__(self) -> str:
        return f"FlatFolder({self.root}: {len(self)} images, no labels)"


class ListFile(_Files):
    """A list of image files, with labels or without.

    CSV with a header row `path` or `path,label`, or JSON lines {"path": ..., "label": ...}. Paths
    are relative to `root`, or to the list's own folder when root is empty. Labels are numbers from
    0 on, or names that are in `classes`; with no classes given, names are numbered in sorted order.

    Raises:
        UserError: with the line number, for a row without a path, a file that does not exist, a
            label that is missing, unknown, negative or out of range.
    """

    def __init__(self, path: str | Path, *, root: str = "", classes: Sequence[str] = ()) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such list file; expected a .csv or .jsonl file")
        self.root = Path(root) if root else self.path.parent
        rows = list(_rows(self.path))
        if not rows:
            raise UserError(f"{self.path}: the list names no images")
        for line, row in rows:
            self._check_path(line, row.get("path"))
        super().__init__(self.root, [str(row["path"]) for _, row in rows])
        self.classes, self.labels = self._read_labels(rows, list(classes))

    def _check_path(self, line: int, file: Any) -> None:
        if not isinstance(file, str) or not file:
            raise UserError(f"{self.path} line {line}: no path in this row (key 'path')")
        if not os.path.isfile(self.root / file):
            raise UserError(
                f"{self.path} line {line}: {printable(str(self.root / file))} does not exist or "
                "is no file; paths are relative to root, or to the list's folder when root is empty"
            )

    def _read_labels(
        self, rows: list[tuple[int, dict[str, Any]]], classes: list[str]
    ) -> tuple[list[str] | None, np.ndarray | None]:
        values = [row.get("label") for _, row in rows]
        if all(value in (None, "") for value in values):
            return None, None
        for (line, _), value in zip(rows, values, strict=True):
            if value in (None, ""):
                raise UserError(f"{self.path} line {line}: no label, though other rows have one")
        numbers = [_as_number(value) for value in values]
        named = bool(classes) and set(map(str, values)) <= set(classes)
        for (line, _), value, number in zip(rows, values, numbers, strict=True):
            if number is not None and number < 0 and not named:
                raise UserError(
                    f"{self.path} line {line}: label {_shown(value)}; numbers of classes begin at "
                    "0 (leave the label out of all rows if there are none)"
                )
        if None in numbers or named:
            classes = classes or sorted({str(value) for value in values})
            known = {name: number for number, name in enumerate(classes)}
            numbers = [known.get(str(value), -1) for value in values]
        classes = classes or [str(number) for number in range(max(n or 0 for n in numbers) + 1)]
        for (line, _), value, number in zip(rows, values, numbers, strict=True):
            if number is None or not 0 <= number < len(classes):
                raise UserError(
                    f"{self.path} line {line}: label {_shown(value)} is not one of the "
                    f"{len(classes)} classes (0 to {len(classes) - 1}, or their names)"
                )
        return classes, np.array(numbers, dtype=np.int64)

    def __repr__(self) -> str:
        labels = f"{len(self.classes)} classes" if self.classes else "no labels"
        return f"ListFile({self.path}: {len(self)} images, {labels})"


def find_images(path: str | Path) -> list[Path]:
    """The image files in a folder and below it, or the one file that was named.

    Raises:
        UserError: nothing there, or no images in the folder.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    files = [path / file for file in image_files(existing_folder(path))]
    if not files:
        raise UserError(f"{path}: no images found (looked for {known_extensions()})")
    return files


def open_image(path: str | Path) -> Image.Image:
    """An upright RGB image. Raises UnreadableImage."""
    return open_rgb(path, str(path))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and fields of each row. Raises UserError for what is not text, or not CSV."""
    number = 1
    try:
        for number, row in _rows_of(path):
            yield number, row
    except (csv.Error, UnicodeDecodeError) as error:
        where = f"{path} after line {number}" if number > 1 else str(path)
        raise UserError(
            f"{where}: {printable(str(error))}; expected UTF-8 text, one image a line"
        ) from error


def _rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file, skipinitialspace=True)
            if "path" not in (reader.fieldnames or ()):
                raise UserError(
                    f"{path} line 1: header {_shown(reader.fieldnames)}; expected 'path' or "
                    "'path,label'"
                )
            for row in reader:
                yield reader.line_num, row
            return
        for line, text in enumerate(file, start=1):
            if text.strip():
                yield line, _json_row(path, line, text)


def _json_row(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number too long, a nest too deep
        said = getattr(error, "msg", str(error))
        raise UserError(f"{path} line {line}: not JSON ({said}); use .csv for tables") from error
    if not isinstance(row, dict):
        raise UserError(
            f'{path} line {line}: {_shown(row)}; expected {{"path": ..., "label": ...}}'
        )
    return row


def _as_number(value: Any) -> int | None:
    if isinstance(value, str):  # int() alone would take 1_000 too, which may be a name
        return int(value) if re.fullmatch(r"\s*[+-]?\d+\s*", value) else None
    return value if isinstance(value, int) else None


def _shown(value: Any) -> str:
    return printable(repr(value), limit=200)
