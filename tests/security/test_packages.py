"""What an installation may take: no release known to be malicious, and a lock with hashes."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}


def required() -> dict[str, Requirement]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block
    found = [Requirement(line) for line in re.findall(r'^\s*"([^"]+)"', block[1], re.MULTILINE)]
    return {canonicalize_name(one.name): one for one in found}


def pinned() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            one = Requirement(line)
            found.setdefault(canonicalize_name(one.name), []).append(one)
    return found


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_resolver_refuses_the_malicious_releases(name: str) -> None:
    released = ["2.6.0", "2.6.1", "2.6.2", "2.6.3", "2.6.4", "2.6.6"]
    left = list(required()[name].specifier.filter(released, prereleases=True))
    assert left == ["2.6.0", "2.6.1", "2.6.4", "2.6.6"]
    for version in MALICIOUS[name]:
        for written in (version, f"{version}.post0", f"{version}+local"):
            base = Version(written).base_version
            assert not required()[name].specifier.contains(base, prereleases=True)
        assert all(not one.specifier.contains(version) for one in pinned()[name])


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("torch", "2.10"),  # weights_only=True could overwrite memory before
        ("datasets", "4.0"),  # ran scripts of data sets before
    ],
)
def test_releases_with_known_holes_are_excluded(name: str, first: str) -> None:
    specifier = required()[name].specifier
    assert specifier.contains(first)
    assert not specifier.contains(f"{Version(first).major - 1}.99")
    assert not specifier.contains("2.9.1")


def test_the_lock_has_a_hash_for_every_package_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    entries = re.split(r"\n(?=[A-Za-z])", text.split("\n", 2)[2])
    locked: dict[str, set[str]] = {}
    for entry in entries:
        one = Requirement(entry.partition("\\")[0].strip())
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry[:60]
        (version,) = [clause.version for clause in one.specifier]
        locked.setdefault(canonicalize_name(one.name), set()).add(version)
    assert set(required()) <= set(locked)
    for name, requirements in pinned().items():  # the versions that the tests ran with
        for one in requirements:
            if name in locked:
                (clause,) = one.specifier
                assert clause.version in locked[name], name
    for name, versions in MALICIOUS.items():
        assert not locked[name] & set(versions)
