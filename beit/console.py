"""What the user reads while it runs: our own log lines, on the console and in the run folder."""

import logging
import logging.handlers
import warnings
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def log_to_console() -> None:
    """Show our log lines on stderr, once."""
    logger = logging.getLogger("beit")
    if logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


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
        self._file = logging.FileHandler(path, encoding="utf-8")
        self._file.setFormatter(logging.Formatter(_FORMAT))
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


def quiet_lightning() -> None:
    """Drop Lightning's advertisements and the warnings that our own design answers."""
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
    # resuming goes on in the same folder
    warnings.filterwarnings("ignore", message=r".*directory .* exists and is not empty.*")
    # a run without validation images
    warnings.filterwarnings("ignore", message=r".*Total length of `list` across ranks is zero.*")
