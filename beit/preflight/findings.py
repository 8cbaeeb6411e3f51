"""What an examination before training found: one line for each thing looked at."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from beit.errors import UserError

Level = Literal["ok", "warn", "error"]


@dataclass(frozen=True)
class Finding:
    """`check` names what was looked at; an "error" would end the run, or make it worthless."""

    level: Level
    check: str
    text: str


@contextlib.contextmanager
def told(findings: list[Finding], check: str) -> Iterator[None]:
    """Within it, a user's mistake becomes an error among the findings."""
    try:
        yield
    except UserError as error:
        findings.append(Finding("error", check, " ".join(str(error).split())))


def failed(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


def print_findings(findings: Iterable[Finding]) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from beit.printable import printable_lines
    from beit.security.secrets import redacted

    styles = {"ok": "green", "warn": "yellow", "error": "bold red"}
    table = Table("level", "check", "finding")
    for finding in findings:
        level = Text(finding.level, style=styles[finding.level])
        table.add_row(level, finding.check, Text(printable_lines(redacted(finding.text))))
    Console(highlight=False).print(table)
