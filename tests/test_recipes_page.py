"""docs/recipes.md is what the configs come to."""

import re

import pytest

from beit import config
from scripts import recipes
from scripts.sections import read_section


@pytest.fixture(scope="module")
def written() -> str:
    return recipes.text()


def test_the_page_is_current(written: str) -> None:
    hint = "docs/recipes.md is out of date: make recipes writes it anew"
    assert read_section(recipes.PAGE, recipes.SECTION, recipes.COMMAND) == written.strip(), hint


def test_every_recipe_has_a_row(written: str) -> None:
    folder = config.config_dir() / "experiment"
    for path in folder.rglob("*.yaml"):
        family, name = str(path.parent.relative_to(folder)), path.stem
        part = written.split(f"## {family}\n")[1].split("\n## ")[0]
        assert f"| `{name}` |" in part


def test_a_row_has_the_numbers_of_its_config(written: str) -> None:
    part = written.split("## finetune\n")[1].split("\n## ")[0]
    header, row = (
        next(line for line in part.splitlines() if line.startswith(f"| {start} |"))
        for start in ("recipe", "`large_pt22k_ft22k_512`")
    )
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    # microsoft/unilm, beit/README
    assert (cells["px"], cells["batch"], cells["lr"]) == ("512", "512", "2e-05")
    assert (cells["layer decay"], cells["drop path"], cells["epochs"]) == ("0.9", "0.4", "30")
    assert cells["starts from"] == "given by its user"
    shared = re.search(r"The same in all of them: (.*)\.\n", part)
    assert shared
    assert "min lr 1e-06" in shared[1]
    assert "smoothing 0.1" in shared[1]
