"""What the documentation tells people to type can be typed."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from beit import cli, config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [found for page in PAGES for found in pattern.findall(page.read_text())]


def commands(start: str) -> list[list[str]]:
    """Words of the shell commands that begin with `start`, variables before them dropped."""
    found = []
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words[: len(start.split())] == start.split():
                found.append(words)
    return found


@pytest.mark.parametrize("words", commands("beit train"), ids=" ".join)
def test_training_commands_compose(words: list[str]) -> None:
    overrides = [word for word in words[2:] if not word.startswith("-")]
    if "--config-dir" in words:
        pytest.skip("a folder of the reader's")
    cfg = config.compose(overrides)
    assert cfg.task_name in ("tokenizer", "mim", "classification", "segmentation")
    config.check(cfg)


@pytest.mark.parametrize(
    "words", [w for w in commands("beit evaluate") if "evaluation=" in " ".join(w)], ids=" ".join
)
def test_evaluations_compose(words: list[str]) -> None:
    rest = [word for word in words[2:] if not word.startswith(("checkpoint=", "output="))]
    cfg = config.compose(rest, config_name="evaluate")
    node = OmegaConf.to_container(cfg.evaluation, resolve=True)
    assert isinstance(node, dict)
    config.instantiate({**node, "masking": None} if "masking" in node else node)


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_other_verbs_exist(verb: str) -> None:
    assert commands(f"beit {verb}")
    assert verb in cli._VERBS


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", (ROOT / "README.md").read_text()))
    assert {"demo", "test", "check", "help"} <= named & targets


def test_python_blocks_use_what_there_is() -> None:
    import beit

    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "beit":
                assert callable(getattr(beit, node.attr))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_tables_name_every_choice() -> None:
    text = (ROOT / "README.md").read_text()
    groups = ("task", "model", "masking", "trainer", "logger", "tokenizer", "data")
    for group in (*groups, "pyramid", "head", "inference"):
        for path in (config.config_dir() / group).glob("*.yaml"):
            if path.stem not in ("default",):
                assert f"`{path.stem}`" in text, f"{group}={path.stem}"
