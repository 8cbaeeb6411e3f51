"""What a row measures: a table of contenders, each with the values of its rounds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One contender of a table."""

    name: str
    values: Sequence[float]  # of each round, in the table's unit
    work: float = 1.0  # done for each value
    flop: float = 0.0  # of it, in matrix products

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    @property
    def cost(self) -> float:
        """Median of a unit of work."""
        return self.median / self.work


@dataclass(frozen=True)
class Table:
    """Contenders side by side; the first is what the others are compared with.

    Args:
        unit: of the values: s, or MB (10^6 bytes).
        work: what work is counted in ("images"); with "" no rate is given.
        precision: bf16 or fp32, whose product ceiling the entries' flop are a share of.
        compared: what stands over the column of ratios; "" leaves it out.
        notes: lines beneath.
    """

    title: str
    entries: Sequence[Entry]
    unit: str = "s"
    work: str = ""
    precision: str = ""
    compared: str = "against ours"
    notes: Sequence[str] = field(default_factory=tuple)

    def header(self) -> list[str]:
        several = any(len(entry.values) > 1 for entry in self.entries)
        spread = [f"quartiles, {self.unit}", f"least, {self.unit}"] if several else []
        return [
            "",
            f"median, {self.unit}" if several else self.unit,
            *spread,
            *([self._rate_name()] if self.work else []),
            *([self.compared] if self.compared else []),
            *([f"of the {self.precision} ceiling"] if self.precision else []),
        ]

    def cells(self, ceilings: Mapping[str, float]) -> list[list[str]]:
        """A line for each entry. `ceilings` are in flop/s, by precision."""
        width = len(self.header())
        lines = []
        for entry in self.entries:
            line = [entry.name, _digits(entry.median)]
            if any(len(other.values) > 1 for other in self.entries):
                low, high = entry.quartiles
                line += [f"{_digits(low)} to {_digits(high)}", _digits(min(entry.values))]
            if self.work:
                line.append(_digits(self._rate(entry)))
            if self.compared:
                first = self.entries[0]
                line.append("" if entry is first else f"{entry.cost / first.cost:.2f}×")
            if self.precision:
                share = entry.flop / entry.median / ceilings[self.precision]
                line.append(f"{100 * share:.0f} %" if entry.flop else "")
            assert len(line) == width
            lines.append(line)
        return lines

    def _rate_name(self) -> str:
        return f"{self.work}/s" if self.unit == "s" else f"bytes/{self.work.removesuffix('s')}"

    def _rate(self, entry: Entry) -> float:
        return 1 / entry.cost if self.unit == "s" else 1e6 * entry.cost


def _digits(value: float) -> str:
    """Three significant digits; from 100 on a whole number with its thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
