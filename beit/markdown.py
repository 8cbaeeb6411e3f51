"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, whatever is in them."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
