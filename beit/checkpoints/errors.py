"""What can go wrong with checkpoints, by name. A damaged file is a UserError like any other."""

from pathlib import Path

from beit.errors import UserError
from beit.job.exits import Exit, RunEnd


class DamagedCheckpoint(UserError):
    """A file that is not what was written: damaged, cut short, or not a checkpoint at all."""


class NewerSchema(UserError):
    """A file that a newer version of this package wrote."""


class NoSpace(RunEnd):
    """No space left on a disk. `needed` and `free` are bytes; `needed` 0 where it is not known."""

    code = Exit.NO_SPACE

    def __init__(self, path: str | Path, needed: int = 0, free: int = 0) -> None:
        super().__init__(path, needed, free)  # all three, or it could not be pickled
        self.path, self.needed, self.free = str(path), needed, free

    def __str__(self) -> str:
        sizes = f"{_size(self.needed)} are needed, " if self.needed else ""
        return (
            f"no space left for {self.path}: {sizes}{_size(self.free)} are free; older checkpoints "
            "are intact: make room and go on with resume=auto"
        )


class NonFiniteWeights(RunEnd):
    """A checkpoint that would hold NaN or infinite weights was not written."""

    code = Exit.NOT_FINITE

    def __init__(self, path: str | Path, names: list[str]) -> None:
        super().__init__(path, names)
        self.path, self.names = str(path), names

    def __str__(self) -> str:
        more = f" and {len(self.names) - 4} more" if len(self.names) > 4 else ""
        return (
            f"{self.path} was not written: NaN or infinite numbers in "
            f"{', '.join(self.names[:4])}{more}; older checkpoints are kept, go on from one of them"
        )


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
