"""From a config to objects, and from objects to a run. Knows no task in particular."""

import logging
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from beit import config, run_folder
from beit.callbacks.randomness import KeyedRandomness
from beit.callbacks.record import ConfigRecord
from beit.checkpoint import (
    Checkpoint,
    check_resumable,
    initialise,
    load_part,
    read_checkpoint,
)
from beit.console import RunLog, only_warnings, quiet_lightning
from beit.errors import UserError
from beit.recorded import composed
from beit.tasks.planning import plan

log = logging.getLogger(__name__)


def fit(cfg: DictConfig) -> dict[str, float]:
    """Train as the config says. Returns the last logged metrics.

    Raises UserError, before any training, for what cannot be done.
    """
    first = run_folder.is_first_process()
    with RunLog() as run_log:
        if not first:
            only_warnings()
        config.check(cfg)
        world_size = config.settle_devices(cfg)
        folder = Path(cfg.paths.output_dir)
        if first:
            run_folder.check_free(folder, resume=cfg.resume)
        checkpoint = run_folder.resume_from(folder, cfg.resume)
        quiet_lightning()
        torch.set_float32_matmul_precision("high")
        L.seed_everything(cfg.seed, workers=False, verbose=False)
        task, data = build(cfg, world_size)
        settled = config.plain(cfg)
        if checkpoint:
            for line in check_resumable(task, checkpoint, settled):
                log.info("other than before: %s", line)
        trainer = build_trainer(cfg, settled)
        if first:  # only now: what is refused leaves nothing behind
            run_folder.make(folder)
            run_log.open(folder / "train.log")
            run_folder.write_records(folder, OmegaConf.to_yaml(OmegaConf.create(settled)))
        _announce(cfg, task, world_size)
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        log.info("run folder: %s", folder)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def build(cfg: DictConfig, world_size: int) -> tuple[L.LightningModule, L.LightningDataModule]:
    """The task and its data. The data come first: they know how many classes there are."""
    data = config.instantiate(cfg.datamodule)
    config.settle_classes(cfg, len(getattr(data, "classes", None) or ()))
    data.check(world_size=world_size, accumulate=cfg.trainer.accumulate_grad_batches)
    task = config.instantiate(cfg.task)
    task.optim.warmup_length(*_plan(cfg, data, world_size))
    if cfg.init_from:
        if not hasattr(task, "backbone"):
            raise UserError(
                f"init_from={cfg.init_from}: {type(task).__name__} has no backbone to start from"
            )
        report = initialise(task, cfg.init_from)
        log.info("init_from %s\n%s", cfg.init_from, report)
    return task, data


def _plan(cfg: DictConfig, data: L.LightningDataModule, world_size: int) -> tuple[int, int]:
    """Optimizer steps of an epoch and of the run, before there is a trainer."""
    accumulate = cfg.trainer.accumulate_grad_batches
    return plan(
        data.steps_per_epoch(world_size=world_size, accumulate=accumulate),
        accumulate=accumulate,
        limit=cfg.trainer.get("limit_train_batches"),
        max_epochs=cfg.trainer.max_epochs,
        max_steps=cfg.trainer.max_steps,
    )


def build_trainer(cfg: DictConfig, settled: dict[str, Any]) -> L.Trainer:
    """The trainer with its callbacks and loggers."""
    callbacks = [config.instantiate(node) for node in (cfg.callbacks or {}).values() if node]
    loggers = [config.instantiate(node) for node in (cfg.logger or {}).values() if node]
    return config.instantiate(
        cfg.trainer,
        callbacks=[
            KeyedRandomness(cfg.seed),
            ConfigRecord(settled, composed(cfg)),
            *callbacks,
        ],
        logger=loggers or False,
    )


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Validate the weights of a checkpoint; `cfg` is that run's config, changed as the user said.

    `cfg.init_from` names the checkpoint. Nothing is written.
    """
    world_size = config.settle_devices(cfg)
    quiet_lightning()
    L.seed_everything(cfg.seed, workers=False, verbose=False)
    checkpoint = read_checkpoint(cfg.init_from)
    data = config.instantiate(cfg.datamodule)
    data.check(world_size=world_size, accumulate=1, stage="validate")
    task = config.instantiate(cfg.task)
    _load_children(task, checkpoint)
    trainer = config.instantiate(cfg.trainer, logger=False, enable_checkpointing=False)
    metrics = trainer.validate(task, datamodule=data, verbose=False)
    return {key: float(value) for key, value in metrics[0].items()}


def load_model(path: str | Path) -> torch.nn.Module:
    """The network of a checkpoint, rebuilt from the file alone, in eval mode on the CPU.

    A whole task (backbone and head) where there is a backbone, else the tokenizer.
    """
    checkpoint = read_checkpoint(path)
    task = config.instantiate(checkpoint.config["task"])
    _load_children(task, checkpoint)
    network = task if hasattr(task, "backbone") else task.tokenizer
    return network.eval()


def _load_children(task: L.LightningModule, checkpoint: Checkpoint) -> None:
    for name, child in task.named_children():
        if child.state_dict():
            load_part(child, checkpoint, name)


def _announce(cfg: DictConfig, task: L.LightningModule, world_size: int) -> None:
    accumulate = cfg.trainer.accumulate_grad_batches
    log.info(
        "%s: %s trainable parameters, precision %s, pid %d",
        type(task).__name__,
        f"{sum(p.numel() for p in task.parameters() if p.requires_grad):,}",
        cfg.trainer.precision,
        os.getpid(),
    )
    log.info(
        "global batch %d = %d devices x %d images x %d accumulated",
        cfg.batch.global_size,
        world_size,
        cfg.batch.per_device,
        accumulate,
    )
