"""Whether a run that was killed and resumed is the run that was not, bit for bit."""

from pathlib import Path
from typing import Any

from scripts.faults.forked import Outcome, run_forked, run_ranks
from scripts.faults.tiny import final, micro_batches, read_record, tiny_config, tiny_run

SECONDS = 120.0  # for one run, on a busy machine

Settings = dict[str, Any]


class Different(AssertionError):
    """The two runs are not the same; the message says where."""


def start(folder: Path, **settings: Any) -> list[Outcome]:
    """One run, on as many processes as the settings say."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = settings.get("ranks", 1)
    if ranks == 1:
        return [run_forked(tiny_run, folder, timeout=SECONDS, **settings)]
    return run_ranks(ranks, tiny_run, folder, timeout=SECONDS, **settings)


def complete(folder: Path, **settings: Any) -> None:
    """One run to its end."""
    for outcome in start(folder, **settings):
        if outcome.returncode != 0 or outcome.timed_out:
            raise RuntimeError(f"exit code {outcome.returncode}: {outcome.output[-2000:]}")


def killed(folder: Path, place: tuple[int, int, str], **settings: Any) -> None:
    """One run that is killed at a place which it must reach."""
    for outcome in start(folder, kill_at=place, **settings):
        if outcome.returncode != -9 or outcome.timed_out:
            raise RuntimeError(f"not killed, {outcome.returncode}: {outcome.output[-2000:]}")


def warm(folder: Path, **settings: Any) -> None:
    """Compose the config here: forks then find it, and all that it imports."""
    tiny_config(folder, **{k: v for k, v in settings.items() if k != "keyed"})


def compare(whole: Path, folder: Path) -> None:
    """Every micro-batch, validation and the end of the runs in `folder` against the whole one.

    Samples, pixels, masks, token ids and the bits of the loss; what was done twice must have been
    the same twice. Raises Different.
    """
    expected = micro_batches(whole)
    validations = {_validation(entry): entry for entry in read_record(whole) if _is_val(entry)}
    seen = set()
    for entry in read_record(folder):
        if "indices" in entry and "loss" in entry:
            key = entry["epoch"], entry["batch"], entry["rank"]
            _check(expected.get(key), entry, f"micro-batch {key}")
            seen.add(key)
        elif _is_val(entry):
            _check(validations.get(_validation(entry)), entry, "validation")
    if missing := set(expected) - seen:
        raise Different(f"never done: {sorted(missing)[:5]}")
    _check(final(whole), final(folder), "final weights")


def _is_val(entry: dict[str, Any]) -> bool:
    return "validated" in entry


def _validation(entry: dict[str, Any]) -> tuple[int, int]:
    return entry["validated"], entry["rank"]


def _check(expected: dict[str, Any] | None, found: dict[str, Any] | None, what: str) -> None:
    ours, theirs = expected or {}, found or {}
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if expected and found and not set(keys) - {"since"}:
        return
    raise Different(f"{what}: other {', '.join(keys)}")
