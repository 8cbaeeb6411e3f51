"""What the user reads while it runs: our own log lines, on the console and in the run folder."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
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


@contextlib.contextmanager
def write_log_to(path: Path) -> Iterator[None]:
    """Append our log lines, dated, to a file for as long as the context lasts."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    logger = logging.getLogger("beit")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


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
    # a run without validation images
    warnings.filterwarnings("ignore", message=r".*Total length of `list` across ranks is zero.*")
