"""What the documents name is there."""

import re
from pathlib import Path

import pytest

from beit.job.exits import MEANINGS
from scripts.faults import rows

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_and_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|scripts|configs|beit|docs)/[\w./-]*)`", text)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    missing += [path for path in linked if not (document.parent / path).exists()]
    assert not missing


def test_the_exit_codes_are_those_of_the_program() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE)) == {
        str(int(code)): meaning for code, meaning in MEANINGS.items()
    }


def test_each_row_of_the_fault_sweep_holds_a_promise() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = {
        name
        for words in re.findall(r"rows? (`\w+`(?: and `\w+`)*)", text)
        for name in re.findall(r"\w+", words.replace("and", ""))
    }
    assert named == set(rows.names())
