"""Print the installed versions as a constraints file.

    .venv/bin/python scripts/freeze_constraints.py > constraints.txt

CUDA packages are left out, so that CPU and GPU builds of torch both satisfy it, and so are local
version suffixes (`+cpu`). A package that has dropped Python 3.10 is pinned for newer Pythons only.
"""

from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

LEFT_OUT = {"beit", "pip", "setuptools", "wheel", "triton"}
LEFT_OUT_PREFIXES = ("nvidia-", "cuda-")
HEADER = """\
# the versions that the tests ran with; used by the Makefile, optional for everybody else
# made by scripts/freeze_constraints.py in a fresh environment"""


def main() -> None:
    lines = {}
    for distribution in distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if name in LEFT_OUT or name.startswith(LEFT_OUT_PREFIXES):
            continue
        line = f"{name}=={Version(distribution.version).public}"
        if not SpecifierSet(distribution.metadata.get("Requires-Python", "")).contains("3.10.12"):
            line += ' ; python_version >= "3.11"'
        lines[name] = line
    print(HEADER, *(lines[name] for name in sorted(lines)), sep="\n")


if __name__ == "__main__":
    main()
