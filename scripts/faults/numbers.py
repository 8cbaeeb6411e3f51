"""NaN and infinity in a loss or a gradient, on one rank, at any micro-batch of a step."""

import json
import math
import random
import unittest.mock
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import safe_open
from torch import Tensor

from beit.job.exits import Exit, RunEnd
from beit.job.numbers import FiniteGuard
from scripts.faults.forked import Outcome, run_forked, run_ranks
from scripts.faults.tiny import add_callbacks, digest, tiny_run

ROW = "NaN or infinity in the loss or a gradient, on one rank"
TRIALS = 20
SHARE = 2
STEPS = 6  # of the run: two epochs of three


@dataclass(frozen=True)
class Trial:
    """What is injected where."""

    task: str
    ranks: int
    per_device: int
    what: str  # loss | gradient
    value: float
    step: int  # 1 is the first
    micro_batch: int  # of the step
    rank: int
    allowed: int

    @property
    def accumulate(self) -> int:
        return 12 // (self.per_device * self.ranks)


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    rng = random.Random(seed)
    passed, failures = 0, []
    for number in range(trials):
        trial = draw(rng, ranks=2 if number % 5 == 4 else 1)
        reason = check(trial, folder / f"{number:03d}")
        passed += not reason
        failures += [f"{trial}: {reason}"] if reason else []
    detail = f"stopped with {int(Exit.NOT_FINITE)} or left out, weights finite, samples named"
    return passed, trials, "; ".join(failures[:3]) or detail


def control(folder: Path, seed: int) -> bool:
    """Without the check the weights are NaN after the step."""
    trial = Trial("mim", 1, 4, "loss", math.nan, 2, 1, 0, 0)
    return "weights" in check(trial, folder / "unguarded", guarded=False)


def draw(rng: random.Random, *, ranks: int) -> Trial:
    """A trial. The step is not the first, so that the optimizer has a state."""
    accumulate = rng.choice((1, 3))
    return Trial(
        task=rng.choice(("mim", "mim", "classification", "tokenizer")),
        ranks=ranks,
        per_device=12 // ranks // accumulate,
        what=rng.choice(("loss", "loss", "gradient")),
        value=rng.choice((math.nan, math.inf, -math.inf)),
        step=rng.randrange(2, STEPS),
        micro_batch=rng.randrange(accumulate),
        rank=rng.randrange(ranks),
        allowed=rng.choice((0, 1)),
    )


def check(trial: Trial, folder: Path, *, guarded: bool = True) -> str:
    """What is wrong with how the run took it; empty if nothing is."""
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {"timeout": 60.0, "trial": trial, "guarded": guarded}
    if trial.ranks == 1:
        outcomes = [run_forked(_train, folder, **settings)]
    else:
        outcomes = run_ranks(trial.ranks, _train, folder, **settings)
    witness = [json.loads(line) for line in (folder / "witness").read_text().splitlines()]
    return _weights(trial, witness) or _ends(trial, outcomes, witness) or _told(trial, folder)


def _weights(trial: Trial, witness: list[dict[str, Any]]) -> str:
    if not all(entry["finite"] for entry in witness):
        return "weights are not finite"
    states = {entry["step"]: entry["state"] for entry in witness if entry["rank"] == 0}
    if trial.allowed and states[trial.step] != states[trial.step - 1]:
        return "a weight or the optimizer moved in the step that was left out"
    return ""


def _ends(trial: Trial, outcomes: list[Outcome], witness: list[dict[str, Any]]) -> str:
    expected = 0 if trial.allowed else int(Exit.NOT_FINITE)
    codes = [outcome.returncode for outcome in outcomes]
    if codes != [expected] * trial.ranks:
        return f"exit codes {codes}: {outcomes[0].output[-2000:]}"
    last = STEPS if trial.allowed else trial.step - 1
    if max(entry["step"] for entry in witness) != last:
        return "other steps than expected"
    text = "".join(outcome.output for outcome in outcomes)
    return "" if f"step {trial.step}: the {trial.what} is not finite" in text else "not told"


def _told(trial: Trial, folder: Path) -> str:
    """Whether the file has the samples that were on the rank."""
    victims = json.loads((folder / "victims").read_text())
    name = f"step{trial.step:07d}-rank{trial.rank}.safetensors"
    with safe_open(folder / "run" / "faults" / name, "pt") as file:
        about = json.loads(file.metadata()["beit"])
        samples = [indices for _, indices in about["samples"].values()]
        keys = [key for key in file.keys() if key.endswith(".images")]  # noqa: SIM118 - no dict
        images = sum(len(file.get_tensor(key)) for key in keys)
    if trial.what == "loss" and samples != [victims]:
        return f"samples {samples} instead of {victims}"
    if victims not in samples or images != sum(map(len, samples)):
        return f"samples {samples} and {images} images, {victims} not among them"
    return ""


def _train(folder: Path, trial: Trial, guarded: bool) -> int:
    from beit.console import log_to_console

    log_to_console()
    words = [f"job.max_nonfinite_steps={trial.allowed}"]
    add_callbacks(Poison(trial, folder), Witness(folder))
    with nullcontext() if guarded else _unguarded():
        try:
            tiny_run(
                folder,
                task=trial.task,
                ranks=trial.ranks,
                per_device=trial.per_device,
                record=False,
                words=words,
            )
        except RunEnd as end:
            return int(end.code)
    return 0


@contextmanager
def _unguarded() -> Iterator[None]:
    with unittest.mock.patch.object(FiniteGuard, "_leave_out"):
        yield


class Poison(L.Callback):
    """Puts a number that is not finite into one loss, or one gradient."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        self.trial, self.folder = trial, folder
        self._here = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        inner: Any = pl_module.training_step

        def training_step(batch: Any, batch_idx: int) -> Tensor:
            loss = inner(batch, batch_idx)
            return loss * self.trial.value if self._here and self.trial.what == "loss" else loss

        pl_module.training_step = training_step
        weight = next(p for p in pl_module.parameters() if p.requires_grad)
        weight.register_hook(self._poisoned)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        trial = self.trial
        place = trainer.global_step + 1, batch_idx % trial.accumulate, trainer.global_rank
        self._here = place == (trial.step, trial.micro_batch, trial.rank)
        if self._here:
            (self.folder / "victims").write_text(json.dumps(batch.indices.tolist()))

    def _poisoned(self, gradient: Tensor) -> Tensor:
        if self._here and self.trial.what == "gradient":
            gradient = gradient.clone()
            gradient.view(-1)[0] = self.trial.value
        return gradient


class Witness(L.Callback):
    """Writes after each step whether the weights are finite, and a hash of the training state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._step = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        weights = list(pl_module.parameters())
        moments = [
            value
            for state in trainer.optimizers[0].state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        entry = {
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "finite": all(bool(torch.isfinite(weight).all()) for weight in weights),
            "state": digest([*weights, *moments]),
        }
        with (self.folder / "witness").open("a") as file:
            file.write(json.dumps(entry) + "\n")
