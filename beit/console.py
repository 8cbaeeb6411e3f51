"""What the user reads while it runs: our own log lines, on the console and in the run folder."""

import contextlib
import logging
import logging.handlers
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beit.printable import printable_lines
from beit.security.secrets import redacted

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


class RedactingFormatter(logging.Formatter):
    """Leaves out what comes from the environment, in tracebacks too; escapes what would act."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(redacted(super().format(record)))


def log_to_console() -> None:
    """Show our log lines on stderr, once."""
    logger = logging.getLogger("beit")
    if logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same columns, on stderr; numbers to four places."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(stderr=True, highlight=False).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else printable_lines(str(value))


class LogFile(logging.FileHandler):
    """A log file whose disk may be full: that is told once on stderr, and the run goes on.

    Each further line is another attempt.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._told = False

    def handleError(self, record: logging.LogRecord) -> None:
        self._tell(sys.exc_info()[1])

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: BaseException | None) -> None:
        if not self._told and sys.stderr is not None:
            self._told = True
            with contextlib.suppress(OSError):
                print(f"beit: {self.baseFilename} cannot be written: {error}", file=sys.stderr)


class RunLog:
    """Our log lines, dated, in the run folder: those of the preparation too.

    The folder is made only once the run is known to be possible, so lines are kept until then.
    """

    def __init__(self) -> None:
        self._buffer = logging.handlers.MemoryHandler(
            capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False
        )
        self._file: logging.Handler | None = None

    def __enter__(self) -> "RunLog":
        logging.getLogger("beit").addHandler(self._buffer)
        return self

    def open(self, path: Path) -> None:
        """Append to this file from now on, what was kept first."""
        self._file = LogFile(path)
        self._file.setFormatter(RedactingFormatter(_FORMAT))
        self._buffer.setTarget(self._file)
        self._buffer.flush()
        logger = logging.getLogger("beit")
        logger.removeHandler(self._buffer)
        logger.addHandler(self._file)

    def __exit__(self, *exception: object) -> None:
        logger = logging.getLogger("beit")
        for handler in (self._buffer, self._file):
            if handler is not None:
                logger.removeHandler(handler)
                handler.close()


def only_warnings() -> None:
    """For the processes beside the first: what all of them would say is said once."""
    logging.getLogger("beit").setLevel(logging.WARNING)


def quiet_pillow() -> None:
    """Drop what Pillow warns of in damaged images: those that cannot be read are named by us."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def quiet_lightning() -> None:
    """Drop Lightning's advertisements and the warnings that our own design answers."""
    quiet_pillow()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # the number of workers is the config's business
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    # a small labelled set has short epochs; the recipe chooses how often to log
    warnings.filterwarnings("ignore", message=r".*smaller than the logging interval.*")
    # Lightning's own use of a deprecated torch function
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated.*")
    # our sampler finds its place by itself
    warnings.filterwarnings("ignore", message=r".*dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=r".*ended before the epoch ended.*")
    # a frozen backbone
    warnings.filterwarnings("ignore", message=r".*in eval mode at the start of training.*")
    # resuming goes on in the same folder
    warnings.filterwarnings("ignore", message=r".*directory .* exists and is not empty.*")
    # a run without validation images
    warnings.filterwarnings("ignore", message=r".*Total length of `list` across ranks is zero.*")
