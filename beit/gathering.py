"""The runs of a sweep as one table (CSV, Markdown) and one picture (PNG)."""

import csv
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit.errors import UserError
from beit.files import explained, replace_text
from beit.markdown import table_of
from beit.nearest import did_you_mean
from beit.sweep import Member, recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = "gathered"  # .csv, .md and .png in the sweep's folder
LEAST = "loss"  # of a metric whose name ends so the least is the best
# what the Markdown table and the picture show unless they are told; the CSV has all
SHOWN = ("acc1", "val_acc", "miou", "mim_acc", "loss")
_PANELS, _ACROSS = 6, 3


@dataclass
class Row:
    """The members that differ in nothing but the seed."""

    settings: dict[str, str]
    members: list[Member] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)  # of those that are done

    @property
    def state(self) -> str:
        """`done`, or how many of the members ended how."""
        states = [member.state for member in self.members]
        if len(set(states)) == 1:
            return states[0]
        return ", ".join(f"{states.count(one)} {one}" for one in dict.fromkeys(states))


@dataclass
class Table:
    """A sweep's rows. `metrics` are those to be shown, `all_metrics` those that there are."""

    keys: list[str]
    rows: list[Row]
    metrics: list[str]
    all_metrics: list[str]
    written: list[Path] = field(default_factory=list)

    def markdown(self) -> str:
        """Means over the seeds, with the least and the largest of them."""
        head = [*self.keys, "runs", *self.metrics, "state"]
        lines = []
        for row in self.rows:
            shown = [_shown(row.values.get(name, [])) for name in self.metrics]
            own = [row.settings.get(key, "") for key in self.keys]
            lines.append([*own, str(len(row.members)), *shown, row.state])
        return table_of(head, lines)

    def csv(self) -> str:
        """Every metric: its mean, least, largest and standard deviation, and of how many runs."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        parts = ("mean", "min", "max", "std", "runs")
        columns = [f"{name} {part}" for name in self.all_metrics for part in parts]
        writer.writerow([*self.keys, "seeds", "state", *columns])
        for row in self.rows:
            own = [row.settings.get(key, "") for key in self.keys]
            seeds = " ".join(_seed(member) for member in row.members)
            numbers = [x for name in self.all_metrics for x in _spread(row.values.get(name, []))]
            writer.writerow([*own, seeds, row.state, *numbers])
        return text.getvalue()


def gather(folder: Path, *, metrics: Sequence[str] = ()) -> Table:
    """Gather the sweep in `folder`, and write the table into it, over an earlier one.

    Raises UserError for a folder without a sweep, and for a metric that no run has.
    """
    members = recorded(folder)
    keys = _varied(members)
    rows: dict[tuple[str, ...], Row] = {}
    for member in members:
        settings = _settings(member)
        own = {key: settings[key] for key in keys if key in settings}
        row = rows.setdefault(tuple(own.get(key, "") for key in keys), Row(own))
        row.members.append(member)
        for name, value in _values(member, folder).items() if member.state == "done" else ():
            row.values.setdefault(name, []).append(value)
    known = sorted({name for row in rows.values() for name in row.values})
    for name in metrics:
        if name not in known:
            raise UserError(f"metrics: no run that is done has {name}: {did_you_mean(name, known)}")
    shown = list(metrics) or [name for name in known if name.rpartition("/")[2] in SHOWN]
    table = Table(keys, list(rows.values()), shown, known)
    _write(table, folder)
    return table


def _settings(member: Member) -> dict[str, str]:
    """The words that make the member, by key. They are known also of one that wrote no config."""
    pairs = [word.lstrip("+~").partition("=") for word in member.settings]
    return {key: value for key, _, value in pairs}


def _varied(members: Sequence[Member]) -> list[str]:
    """Keys in which the members differ, besides the seed."""
    all_settings = [_settings(member) for member in members]
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    differing = (key for key in keys if len({settings.get(key) for settings in all_settings}) > 1)
    return [key for key in differing if key != "seed"]


def _seed(member: Member) -> str:
    return _settings(member).get("seed", "0")


def _values(member: Member, folder: Path) -> dict[str, float]:
    """Last metrics of the validations and of what followed the run, and `NAME best` of each.

    The member's files are looked for in the sweep's `folder`, which may have been moved.
    """
    found = {
        name: value
        for name, value in member.metrics.items()
        if value is not None and not name.rpartition("/")[0].endswith("train")
    }
    place = folder / Path(member.folder).name
    for path in sorted(place.glob("**/metrics.csv")):
        stage = path.parent.relative_to(place).as_posix()
        prefix = "" if stage == "." else f"{stage}/"
        for name, values in _columns(path):
            best = min(values) if name.endswith(LEAST) else max(values)
            found[f"{prefix}{name} best"] = best
    return found


def _columns(path: Path) -> Iterator[tuple[str, list[float]]]:
    """The validation's metrics in a run's file, and their finite values in order."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in rows[0] if rows else ():
        values = [float(row[name]) for row in rows if row.get(name)]
        values = [value for value in values if math.isfinite(value)]
        if name.startswith("val/") and values:
            yield name, values


def _spread(values: list[float]) -> list[Any]:
    if not values:
        return ["", "", "", "", 0]
    deviation: Any = statistics.stdev(values) if len(values) > 1 else ""
    return [statistics.fmean(values), min(values), max(values), deviation, len(values)]


def _shown(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


def _write(table: Table, folder: Path) -> None:
    texts = {".csv": table.csv(), ".md": table.markdown() + "\n"}
    for suffix, text in texts.items():
        path = folder / f"{FILES}{suffix}"
        with explained(path):
            replace_text(path, text)
        table.written.append(path)
    if table.metrics:
        path = folder / f"{FILES}.png"
        with explained(path):
            from matplotlib.backends.backend_agg import FigureCanvasAgg  # seconds, and a cache

            FigureCanvasAgg(_figure(table)).print_png(str(path))
        table.written.append(path)


def _figure(table: Table) -> "Figure":
    """A panel for each metric: over the one key that was varied by number, or a line for each row.

    A point is the mean over the seeds, its bar reaches from the least to the largest.
    """
    from matplotlib.figure import Figure

    names = table.metrics[:_PANELS]
    places = _places(table)
    height = 3.0 if places else 0.7 + 0.28 * len(table.rows)
    across = min(_ACROSS, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(4.2 * across, height * down), dpi=120, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, name in zip(panels, names):
        _panel(panel, table, name, places)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    return figure


def _places(table: Table) -> list[float]:
    """The values of the one key that was varied; empty where they are not numbers, or more keys."""
    try:
        return [float(row.settings[key]) for (key,) in [table.keys] for row in table.rows]
    except (ValueError, KeyError):
        return []


def _panel(panel: Any, table: Table, name: str, places: list[float]) -> None:
    points = [(i, row.values[name]) for i, row in enumerate(table.rows) if row.values.get(name)]
    means = [statistics.fmean(values) for _, values in points]
    below = [mean - min(values) for mean, (_, values) in zip(means, points)]
    above = [max(values) - mean for mean, (_, values) in zip(means, points)]
    look = {"fmt": "o", "markersize": 4, "capsize": 2, "linewidth": 1}
    if places:
        order = sorted(range(len(points)), key=lambda i: places[points[i][0]])
        x = [places[points[i][0]] for i in order]
        y = [means[i] for i in order]
        errors = [[below[i] for i in order], [above[i] for i in order]]
        panel.errorbar(x, y, yerr=errors, **(look | {"fmt": "o-"}))
        panel.set_xlabel(table.keys[0], fontsize=8)
        if min(x, default=0) > 0 and max(x) / min(x) > 20:
            panel.set_xscale("log")
    else:
        panel.errorbar(means, [i for i, _ in points], xerr=[below, above], **look)
        labels = [" ".join(row.settings.values()) or "run" for row in table.rows]
        panel.set_yticks(range(len(labels)), labels, fontsize=7)
        panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.set_title(name, fontsize=9)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.3)
