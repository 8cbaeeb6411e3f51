"""One fault of `make mutations`: what is replaced where, and which tests ought to notice."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One fault. Each text to replace stands in the file exactly once."""

    name: str
    file: str
    replaced: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]

    def applied(self, source: str) -> str:
        """The file with the fault in it; ValueError where a text is not found exactly once."""
        for old, new in self.replaced:
            if source.count(old) != 1:
                raise ValueError(f"{self.file}: {source.count(old)} times {old!r}, expected once")
            source = source.replace(old, new)
        return source


def mutation(name: str, file: str, tests: str, *replaced: tuple[str, str]) -> Mutation:
    """`file` in the package and `tests` in theirs, without `.py`; tests are parted by spaces."""
    paths = tuple(f"tests/{test}.py" for test in tests.split())
    return Mutation(name, f"beit/{file}.py", replaced, paths)
