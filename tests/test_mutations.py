"""The faults of `make mutations` still fit the program, and docs/parity.md has each of them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.faulty import MUTATIONS, Mutation
from scripts.mutations import table
from scripts.sections import read_section, write_section

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_fits_the_program(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    broken = mutation.applied(source)
    compile(broken, mutation.file, "exec")
    assert broken != source
    assert all((ROOT / test).is_file() for test in mutation.tests)


def test_the_document_lists_each_mutation_as_caught() -> None:
    written = read_section(ROOT / "docs" / "parity.md", "mutations", "make mutations")
    rows = [line.split(" | ") for line in written.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [m.name for m in MUTATIONS]
    assert all("::" in row[2] for row in rows), "a mutation survived"


def test_a_survivor_is_shown() -> None:
    caught: dict[str, list[str]] = {mutation.name: [] for mutation in MUTATIONS}
    assert all("**nothing**" in line for line in list(table(caught))[2:])


def test_what_was_not_tried_keeps_its_row() -> None:
    first, second, third = (mutation.name for mutation in MUTATIONS[:3])
    before = "\n".join(table({first: [], second: ["a::b"]}))
    after = list(table({first: ["c::d"], third: []}, before))[2:]
    assert [line.split(" | ")[2] for line in after] == ["`c::d` |", "`a::b` |", "**nothing** |"]


def test_sections_leave_the_rest_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    page = "# a\n<!-- begin x: written by make x -->\nold\n<!-- end x -->\nrest\n"
    path.write_text(page)
    write_section(path, "x", "make x", "new\n")
    assert read_section(path, "x", "make x") == "new"
    assert path.read_text().startswith("# a\n<!-- begin x")
    assert path.read_text().endswith("<!-- end x -->\nrest\n")
    with pytest.raises(ValueError, match="begin y"):
        write_section(path, "y", "make y", "new")
