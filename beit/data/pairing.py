"""Which label file belongs to which image."""

import os
from collections.abc import Sequence
from pathlib import Path

from beit.data.paths import image_files, known_extensions
from beit.errors import UserError
from beit.printable import printable


def paired(roots: tuple[Path, Path], image_suffix: str, label_suffix: str) -> list[tuple[str, str]]:
    """Images below the first folder and their label maps below the second, sorted.

    Raises UserError for no images, one without a label map, and two of either of one name.
    """
    found, labels = _by_key(roots[0], image_suffix), _by_key(roots[1], label_suffix)
    if roots[0].resolve() == roots[1].resolve() and label_suffix:
        theirs = {file for files in labels.values() for file in files}
        found = {key: [f for f in files if f not in theirs] for key, files in found.items()}
        found = {key: files for key, files in found.items() if files}
    if not found:
        end = f"*{image_suffix}" if "." in image_suffix else f"*{image_suffix}.EXTENSION"
        raise UserError(
            f"{printable(str(roots[0]))}: no images {printable(end)} found (looked for "
            f"{known_extensions()})"
        )
    _check_keys(found, labels, roots, label_suffix)
    return sorted((files[0], labels[key][0]) for key, files in found.items())


def _by_key(root: Path, suffix: str) -> dict[str, list[str]]:
    """Image files below a folder by what is left of their paths without suffix and extension."""
    found: dict[str, list[str]] = {}
    for file in image_files(root):
        whole = file if "." in suffix else os.path.splitext(file)[0]
        if whole.endswith(suffix):
            found.setdefault(whole.removesuffix(suffix), []).append(file)
    return found


def _check_keys(
    found: dict[str, list[str]],
    labels: dict[str, list[str]],
    roots: tuple[Path, Path],
    label_suffix: str,
) -> None:
    missing = [files[0] for key, files in found.items() if key not in labels]
    if missing:
        end = label_suffix if "." in label_suffix else f"{label_suffix}.png"
        key = next(key for key in found if key not in labels)
        raise UserError(
            told_missing(str(roots[0]), len(found), missing)
            + f" (looked for {printable(str(roots[1] / key) + end)}; see image_suffix and "
            "label_suffix for other names)"
        )
    for role, root, files_of in (("images", roots[0], found), ("label maps", roots[1], labels)):
        for key in found:
            if len(files := files_of[key]) > 1:
                raise UserError(
                    f"{printable(str(root))}: {printable(', '.join(files[:3]))} are {role} of one "
                    "name; keep one of them, or say which in image_suffix or label_suffix"
                )


def told_missing(origin: str, count: int, missing: Sequence[str]) -> str:
    """A line for messages: how many, and the first few."""
    few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return printable(f"{origin}: no label map for {len(missing)} of {count} images: {few}")
