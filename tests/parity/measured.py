"""What the parity tests measured: each difference beside what is allowed, as tables."""

import re
from dataclasses import dataclass, field

from torch import Tensor

Cell = tuple[str, str]  # what was compared, against what


@dataclass
class Measured:
    """The largest difference of each comparison. A part of the document is a dict of cells."""

    parts: dict[str, dict[Cell, tuple[float, float]]] = field(default_factory=dict)

    def __call__(
        self, part: str, what: str, against: str, found: float | Tensor, allowed: float
    ) -> None:
        """Note a difference and assert that it is allowed; the largest of several is kept."""
        cells = self.parts.setdefault(part, {})
        before, same = cells.get((what, against), (0.0, allowed))
        assert same == allowed, "one limit for each cell"
        found = float(found.detach() if isinstance(found, Tensor) else found)
        cells[what, against] = max(before, found), allowed
        assert found <= allowed, f"{what} against {against}: {found:.3g}, allowed {allowed:.3g}"

    def tables(self, matrices: tuple[str, ...]) -> str:
        """Markdown: each part a heading and a table; those named in `matrices` two-way."""
        texts = []
        for part in sorted(self.parts, key=lambda part: (part not in matrices, part)):
            cells = self.parts[part]
            table = _matrix(cells) if part in matrices else _list(cells)
            texts.append("\n".join([f"### {part}", "", *table]))
        return "\n\n".join(texts)


def skeleton(text: str) -> list[str]:
    """The lines of tables with the measured digits taken out: what must not go stale."""
    lines = [line for line in text.splitlines() if line.startswith(("|", "#"))]
    return [re.sub(r"\d\.\de[+-]\d\d", "x", line) for line in lines]


def _matrix(cells: dict[Cell, tuple[float, float]]) -> list[str]:
    """A row for each thing compared, a column for each thing compared with."""
    rows, columns = (list(dict.fromkeys(cell[axis] for cell in cells)) for axis in (0, 1))
    allowed = {against: limit for (_, against), (_, limit) in cells.items()}
    lines = [
        _line("", *columns),
        _line("---", *["---:"] * len(columns)),
        _line("*allowed*", *(f"*{allowed[column]:g}*" for column in columns)),
    ]
    for row in rows:
        found = (cells.get((row, column)) for column in columns)
        lines.append(_line(row, *("" if cell is None else _shown(*cell) for cell in found)))
    return lines


def _list(cells: dict[Cell, tuple[float, float]]) -> list[str]:
    lines = [
        _line("what", "against", "largest difference", "allowed"),
        _line("---", "---", "---:", "---:"),
    ]
    for (what, against), (found, limit) in cells.items():
        lines.append(_line(what, against, _shown(found, limit), f"{limit:g}" if limit else ""))
    return lines


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(found: float, allowed: float) -> str:
    return f"{found:.1e}" if allowed else "equal"
