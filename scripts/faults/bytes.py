"""Checkpoint files with random damage: none is read as anything but what was written."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from beit.checkpoints import file as files
from beit.checkpoints import header as headers
from beit.checkpoints.file import CheckpointFile, read_file, write_file
from beit.checkpoints.plain import split
from beit.errors import UserError
from scripts.faults.forked import run_forked

ROW = "mutated checkpoint bytes"
TRIALS = 2000
SHARE = 60
_BATCH = 250  # mutants of a child


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    """(passed, tried, what was seen)."""
    counts = dict.fromkeys(("refused", "same", "different", "crashed"), 0)
    for begin in range(0, trials, _BATCH):
        mutants = range(begin, min(begin + _BATCH, trials))
        told = folder / f"{begin}.txt"
        outcome = run_forked(_read_mutants, folder, seed, mutants, told, timeout=300)
        lines = told.read_text().split() if told.exists() else []
        for kind in lines:
            counts[kind] += 1
        counts["crashed"] += len(mutants) - len(lines)  # it took the process with it, or hung
        if outcome.returncode:
            counts["crashed"] = max(counts["crashed"], 1)
    detail = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return counts["refused"] + counts["same"], trials, detail


def control(folder: Path, seed: int) -> bool:
    """Without the checksums, as safetensors itself is: some are accepted with other content."""
    _, tried, detail = _unchecked(folder, seed)
    return tried > 0 and " 0 different" not in f" {detail}"


def _unchecked(folder: Path, seed: int) -> tuple[int, int, str]:
    compare, rest = CheckpointFile.compare, files.checked_metadata

    def metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
        found = header.get("__metadata__")
        if not isinstance(found, dict) or not all(key in found for key in headers.KEYS):
            raise UserError("not a checkpoint")
        return found

    CheckpointFile.compare = lambda self, name, digest: None  # type: ignore[method-assign]
    files.checked_metadata = metadata
    try:
        return run(100, folder, seed)
    finally:
        CheckpointFile.compare = compare  # type: ignore[method-assign]
        files.checked_metadata = rest


def _read_mutants(folder: Path, seed: int, mutants: range, told: Path) -> None:
    path, mutant = folder / "good.safetensors", folder / "mutant.safetensors"
    tree = _tree()
    write_file(path, tree)
    good = path.read_bytes()
    with told.open("w") as log:
        for number in mutants:
            mutant.write_bytes(_mutated(good, random.Random(f"{seed} {number}")))
            try:
                found = read_file(mutant)
            except UserError:
                kind = "refused"
            except Exception as error:  # noqa: BLE001 - whatever else comes is what is looked for
                print(number, type(error).__name__, error)
                kind = "crashed"
            else:
                kind = "same" if _facts(found) == _facts(tree) else "different"
            log.write(f"{kind}\n")
            log.flush()


def _tree() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = {f"blocks.{i}.w": torch.randn(7, 11, generator=generator) for i in range(6)}
    average = torch.randn(7, 11, generator=generator)
    moments = {i: {"exp_avg": average * i, "step": torch.tensor(3.0)} for i in range(6)}
    return {
        "state_dict": {**weights, "mask": torch.tensor([True, False]), "none": torch.empty(0)},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 1)}]}],
        "global_step": 17,
        "beit": {"config": {"seed": 0, "name": "x", "list": [1, 2.5, None, float("inf")]}},
    }


def _facts(tree: Any) -> tuple[str, list[tuple[str, str, bytes]]]:
    text, tensors = split(tree)
    raw = {name: bytes(files.bytes_of(tensor)) for name, tensor in tensors.items()}
    shapes = {name: f"{t.dtype} {tuple(t.shape)}" for name, t in tensors.items()}
    return text, [(name, shapes[name], raw[name]) for name in tensors]


def _mutated(good: bytes, rng: random.Random) -> bytes:
    """A flipped bit, bytes written over, cut short, or bytes put in; up to three of these."""
    content = bytearray(good)
    for change in _changes(rng):
        place = rng.randrange(len(content)) if rng.random() < 0.7 else rng.randrange(16)
        place = min(place, len(content) - 1)
        length = rng.choice((1, 2, 8, 64))
        if change == "flip":
            content[place] ^= 1 << rng.randrange(8)
        elif change == "over":
            content[place : place + length] = rng.randbytes(len(content[place : place + length]))
        elif change == "cut":
            del content[max(place, 1) :]
        else:
            content[place:place] = rng.randbytes(length)
    return bytes(content)


def _changes(rng: random.Random) -> Iterator[str]:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        yield rng.choice(("flip", "flip", "over", "over", "cut", "in"))
