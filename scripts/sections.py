"""Parts of a document that a program writes: the text between two marks, and nothing else."""

from pathlib import Path


def marks(name: str, command: str) -> tuple[str, str]:
    """First and last line of a part, invisible in the rendered document."""
    return f"<!-- begin {name}: written by {command} -->", f"<!-- end {name} -->"


def read_section(path: Path, name: str, command: str) -> str:
    """The part's text; ValueError where its marks don't stand in the file exactly once."""
    return _split(path, name, command)[1]


def write_section(path: Path, name: str, command: str, text: str) -> None:
    """Put `text` in the place of the part; ValueError as in `read_section`."""
    before, _, after = _split(path, name, command)
    path.write_text(f"{before}\n\n{text.strip()}\n\n{after}", encoding="utf-8")


def _split(path: Path, name: str, command: str) -> tuple[str, str, str]:
    """What stands up to the first mark, between the marks, and from the last mark on."""
    document, (begin, end) = path.read_text(encoding="utf-8"), marks(name, command)
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"{path}: expected one line {begin!r} and one {end!r}")
    before, rest = document.split(begin)
    text, after = rest.split(end)
    return before + begin, text.strip(), end + after
