"""What watches a run may not end it: the first failure is told, then the watcher rests."""

import logging
from collections.abc import Callable
from typing import Any

from beit.job.exits import RunEnd
from beit.printable import printable

log = logging.getLogger(__name__)


class Guard:
    """Calls what may fail without harm to the training.

    The first exception is logged; from then on nothing is called any more, in this start of the
    run. (No second attempts: what failed once has mostly left something half written.)

    Args:
        what: rests after a failure.
        lost: what there will be no more of, for the message.
    """

    def __init__(self, what: str, *, lost: str) -> None:
        self.what = what
        self.lost = lost
        self.resting = False

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The function's result; None if it failed, or if an earlier one did."""
        if self.resting:
            return None
        try:
            return function(*args, **kwargs)
        except RunEnd:
            raise
        except Exception as error:
            if "DataLoader worker" in str(error):
                raise  # a worker's end, which torch tells wherever the program happens to be
            self.resting = True
            told = error.__cause__ or error  # Lightning wraps some in words of its own
            log.warning(
                "%s failed (%s: %s); the training goes on, without %s",
                *(self.what, type(told).__name__, printable(str(told)), self.lost),
            )
            log.debug("%s failed", self.what, exc_info=error)
            return None
