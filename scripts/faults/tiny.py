"""A run small enough to be killed hundreds of times, and what it did, micro-batch by micro-batch.

It goes through `beit.runner.fit` as any run does: a ViT of width 22 on generated images of 24x40
pixels, visual tokens from an untrained dVAE that the seed determines.
"""

import copy
import functools
import hashlib
import json
import os
import random
import signal
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from beit import config, runner
from beit.callbacks.randomness import KeyedRandomness
from beit.data.dataset import SampleKey

TRAIN_IMAGES, VAL_IMAGES, CLASSES = 45, 7, 3
GLOBAL_BATCH = 12  # 3 steps an epoch; 9 images are left over
RECORD = "record.jsonl"

_VIT = [
    "model=micro",
    "model.image_size=[16,24]",
    "model.width=22",
    "model.num_heads=2",
    "model.depth=3",
]
_DVAE = [
    "tokenizer=dvae_tiny",
    "tokenizer.image_size=[16,24]",
    "tokenizer.vocab_size=13",
    "tokenizer.codebook_dim=5",
    "tokenizer.hidden_dim=8",
]
_TASKS = {
    "mim": [
        "task=mim",
        *_VIT,
        *_DVAE,
        "data=folder",
        "data.train.root=${paths.data_dir}/train",
    ],
    "classification": ["task=classification", *_VIT, "data=folder"],
    "tokenizer": ["task=tokenizer", *_DVAE, "data=folder"],
}
_ALL = [
    f"batch.global_size={GLOBAL_BATCH}",
    "loader.check_images=0",
    "loader.timeout_seconds=60",
    "logger=csv",
    "trainer.log_every_n_steps=1",
    "callbacks=checkpoints",
    "optim.warmup_epochs=0",
    "optim.warmup_steps=0",
]


def make_images(folder: Path) -> Path:
    """`folder`/train and /val, class folders of noise images; made once. Returns `folder`."""
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for number in range(count):
            path = folder / split / f"class{number % CLASSES}" / f"{number:03d}.png"
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (24, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path, compress_level=0)
    return folder


def tiny_config(
    folder: Path,
    *,
    task: str = "mim",
    epochs: int = 2,
    workers: int = 0,
    per_device: int = GLOBAL_BATCH,
    ranks: int = 1,
    precision: str = "32-true",
    drop_path: float = 0.3,
    ema: bool = False,
    keep_last: bool = False,
    save_every: int = 1,
    seed: int = 0,
    resume: str | None = None,
    words: Sequence[str] = (),
) -> DictConfig:
    """The config of a tiny run in `folder`/run, on images in `folder`/images.

    Args:
        per_device: images of a micro-batch; what is missing to 12 is spread over `ranks` and
            accumulated.
        save_every: optimizer steps between two checkpoints.
        words: more words of the command line.
    """
    settings = [
        f"trainer.max_epochs={epochs}",
        f"trainer.precision={precision}",
        f"loader.num_workers={workers}",
        f"batch.per_device={per_device}",
        f"callbacks.checkpoints.every_n_steps={save_every}",
        "callbacks.checkpoints.every_n_epochs=0",
        *([f"model.drop_path_rate={drop_path}"] if task != "tokenizer" else []),
        *(["trainer=ddp_cpu", f"trainer.devices={ranks}"] if ranks > 1 else []),
        "callbacks=checkpoints" if not ema else "callbacks=[checkpoints,ema]",
        *(["callbacks.ema.decay=0.9"] if ema else []),
        *(["loader.last_batch=keep"] if keep_last else []),
        *words,
    ]
    cfg = copy.deepcopy(_composed(task, tuple(settings)))
    cfg.paths.data_dir = str(make_images(folder / "images"))
    cfg.paths.output_dir = str(folder / "run")
    cfg.seed = seed
    cfg.resume = resume
    cfg.callbacks.checkpoints.every_n_steps = save_every
    return cfg


@functools.lru_cache(maxsize=64)
def _composed(task: str, settings: tuple[str, ...]) -> DictConfig:
    cfg = config.compose([*_TASKS[task], *_ALL, "name=run", *settings])
    config.check(cfg)  # imports what the config names, once for all the forks
    Image.init()
    return cfg


def tiny_run(
    folder: Path,
    *,
    kill_at: Sequence[Any] = (),
    record: bool = True,
    keyed: bool = True,
    **settings: Any,
) -> None:
    """Train as `tiny_config` says; in this process, so call it through `run_forked`.

    Args:
        kill_at: (epoch, micro-batch, where); SIGKILL there. `where` is "start" of the micro-batch,
            "step" (after the backward pass, before the optimizer) or "end".
        record: write `folder`/record.jsonl, see `Recorder`.
        keyed: False puts the fault back: crops, masks and drops from global generators, which are
            seeded once at the start.
    """
    if not keyed:
        _draw_from_globals()
    cfg = tiny_config(folder, **settings)
    added: list[L.Callback] = [Recorder(folder / RECORD)] if record else []
    if kill_at:
        added.append(Kill(*kill_at))
    add_callbacks(*added)
    runner.fit(cfg)


def add_callbacks(*callbacks: L.Callback, at: int = 0) -> None:
    """More callbacks for the trainers that the runner builds in this process, from position `at`.

    For good, so call it in a child.
    """
    build = runner.build_trainer

    def build_and_add(*args: Any, **kwargs: Any) -> L.Trainer:
        trainer = build(*args, **kwargs)
        trainer.callbacks[at:at] = callbacks  # type: ignore[attr-defined]
        return trainer

    runner.build_trainer = build_and_add


def _draw_from_globals() -> None:
    SampleKey.rng = lambda self, stream: random._inst  # type: ignore[attr-defined,method-assign]
    KeyedRandomness.on_train_batch_start = lambda *_: None  # type: ignore[method-assign]


class Kill(L.Callback):
    """SIGKILL at a given place."""

    def __init__(self, epoch: int, micro_batch: int, where: str) -> None:
        self.place = epoch, micro_batch
        self.where = where

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._maybe(trainer, "start")

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self._maybe(trainer, "step")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._maybe(trainer, "end")

    def _maybe(self, trainer: L.Trainer, where: str) -> None:
        loop: Any = trainer.fit_loop.epoch_loop
        if where == self.where and (trainer.current_epoch, loop.batch_idx) == self.place:
            os.kill(os.getpid(), signal.SIGKILL)


class Recorder(L.Callback):
    """Appends a JSON line per micro-batch, and one at the end with the weights' SHA-256.

    A killed process's lines are in the file: they were handed to the kernel.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entry: dict[str, Any] = {}
        self._since = 0  # the step at which this process began

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        tensors = batch._asdict()
        self._entry = {
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "rank": trainer.global_rank,
            "step": trainer.global_step,
            "indices": tensors.pop("indices").tolist(),
            "since": self._since,
            **{name: [digest([part])[:16] for part in value] for name, value in tensors.items()},
        }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._entry["loss"] = struct.pack(">d", float(outputs["loss"])).hex()
        average = getattr(pl_module, "average", None)
        if average is not None:
            self._entry["sum"], self._entry["count"] = float(average.total), int(average.count)
        self._write(self._entry)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("val/")
        }
        self._write({"validated": trainer.global_step, "rank": trainer.global_rank, **metrics})

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        optimizer = [
            value
            for state in trainer.optimizers[0].state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        self._write(
            {
                "final": digest(pl_module.state_dict().values()),
                "optimizer": digest(optimizer),
                "rank": trainer.global_rank,
                "step": trainer.global_step,
            }
        )

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def digest(tensors: Any) -> str:
    """SHA-256 of the bytes of some tensors, in hex."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def read_record(folder: Path) -> list[dict[str, Any]]:
    """All entries that the runs in `folder` wrote, killed ones included."""
    path = folder / RECORD
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def micro_batches(folder: Path) -> dict[tuple[int, int, int], dict[str, Any]]:
    """Entries by (epoch, micro-batch, rank); where one was done again the later one counts."""
    return {
        (entry["epoch"], entry["batch"], entry["rank"]): entry
        for entry in read_record(folder)
        if "indices" in entry
    }


def final(folder: Path) -> dict[str, Any] | None:
    """Rank 0's entry of the run's end, None where it was never reached."""
    ends = [entry for entry in read_record(folder) if "final" in entry and entry["rank"] == 0]
    return ends[-1] if ends else None
