"""Small text files that are there as a whole or not at all, whoever is killed meanwhile."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file, or put new content in its place; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
