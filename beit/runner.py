"""From a config to objects, and from objects to a run. Knows no task in particular."""

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from beit import config, run_folder
from beit.callbacks.epoch_metrics import EpochMetrics
from beit.callbacks.plan import PlanCheck, conclude
from beit.callbacks.randomness import KeyedRandomness
from beit.checkpoints import resume
from beit.checkpoints.elastic import respread
from beit.checkpoints.keeper import CheckpointKeeper
from beit.checkpoints.models import Checkpoint, initialise
from beit.checkpoints.plugin import CheckpointFiles
from beit.checkpoints.record import RunRecord
from beit.console import RunLog, only_warnings, quiet_lightning
from beit.data.sampler import limited
from beit.data.workers import losses_named
from beit.errors import UserError
from beit.interop.convert import any_checkpoint
from beit.job import restarts, signals
from beit.job.agreement import Agreement
from beit.job.numbers import FiniteGuard
from beit.job.ranks import RankWatch
from beit.job.stopping import Stopping
from beit.loggers.guarded import GuardedLogger, RewindLoggers
from beit.memory import keep_freed_memory
from beit.networks import load_children
from beit.preflight import quick
from beit.recorded import composed
from beit.tasks.planning import plan

log = logging.getLogger(__name__)


def fit(cfg: DictConfig, words: Sequence[str] | None = None) -> dict[str, float]:
    """Train as the config says. Returns the last logged metrics.

    With the `words` that it was composed of, it is compared with the recipe that they name.

    Raises UserError, before any training, for what cannot be done.
    """
    first = run_folder.is_first_process()
    with RunLog() as run_log, contextlib.ExitStack() as guards:
        if not first:
            only_warnings()
        config.settle_tokenizer(cfg)
        config.check(cfg)
        world_size = _settle(cfg)
        watch = RankWatch(
            config.instantiate(cfg.job),
            world_size=world_size,
            first=first,
            num_nodes=cfg.trainer.get("num_nodes", 1),
        )
        guards.enter_context(watch)
        folder = Path(cfg.paths.output_dir)
        checkpoints = _checkpoint_folder(cfg)
        wanted = resume.implied(cfg.resume, checkpoints)
        if first:
            run_folder.check_free(folder, resume=wanted)
        beginning = resume.find(folder, wanted, checkpoints)
        quiet_lightning()
        torch.set_float32_matmul_precision("high")
        L.seed_everything(cfg.seed, workers=False, verbose=False)
        task, data = build(cfg, world_size, begins=beginning.path is None)
        guards.enter_context(losses_named(data))
        settled = config.plain(cfg)
        facts = {"config": settled, "composed": composed(cfg), "data": data.fingerprint()}
        resume.check(beginning, task, allowed=list(cfg.allow_changes), **facts)
        # that file may be removed in time, and an open one would keep its disk space
        beginning = dataclasses.replace(beginning, checkpoint=None)
        record = RunRecord(
            **facts,
            run_id=beginning.run_id,
            environment=run_folder.describe_environment() if first else {},
            global_batch_size=cfg.batch.global_size,
        )
        goes_on = functools.partial(
            respread,
            world_size=world_size,
            accumulate=cfg.trainer.accumulate_grad_batches,
            micro_batches=_micro_batches(cfg, data, world_size),
        )
        trainer = build_trainer(cfg, record, watch, goes_on)
        for callback in trainer.callbacks:
            if hasattr(callback, "check"):
                callback.check(task, data)
        if hasattr(task, "check"):
            ranks = world_size if cfg.trainer.get("sync_batchnorm") else 1
            images = cfg.batch.per_device * ranks
            task.check(trainer.strategy.root_device, normalised_together=images)
        if first:  # only now: what is refused leaves nothing behind
            guards.enter_context(run_folder.claimed(folder))
            resume.write_run_id(folder, beginning.run_id)
            run_log.open(folder / "train.log")
            run_folder.write_records(folder, OmegaConf.to_yaml(OmegaConf.create(settled)))
            quick.warn(cfg, words)
        _announce(cfg, task, world_size)
        restarts.meet_again(trainer)
        with signals.handled(ends_process=False):  # where the command line has not done so before
            trainer.fit(task, datamodule=data, ckpt_path=beginning.path, weights_only=True)
        conclude(trainer)
        log.info("run folder: %s", folder)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def build(
    cfg: DictConfig, world_size: int, *, begins: bool = True
) -> tuple[L.LightningModule, L.LightningDataModule]:
    """The task and its data. The data come first: they know how many classes there are.

    `begins` is False for a run that goes on: `init_from` is of its past.
    """
    data = config.instantiate(cfg.datamodule)
    config.settle_classes(cfg, len(getattr(data, "classes", None) or ()))
    task = config.instantiate(cfg.task)  # its mistakes are told before files are looked at
    data.check(world_size=world_size, accumulate=cfg.trainer.accumulate_grad_batches)
    data.labelled = config.instantiate(cfg.labelled) if cfg.labelled else None
    task.optim.warmup_length(*plan_of(cfg, data, world_size))
    if cfg.init_from and begins:
        if not hasattr(task, "backbone"):
            raise UserError(
                f"init_from={cfg.init_from}: {type(task).__name__} has no backbone to start from"
            )
        report = initialise(task, cfg.init_from)
        log.info("init_from %s\n%s", cfg.init_from, report)
    if cfg.compile:
        for name, network in task.named_children():
            network.compile()  # in place: the names of its weights stay
            log.info("%s is compiled at its first call", name)
    return task, data


def _settle(cfg: DictConfig) -> int:
    """Fix devices and accumulation, and how memory is handled. Returns the world size."""
    if cfg.trainer.get("accelerator") == "cpu":
        keep_freed_memory()
    return config.settle_devices(cfg)


def plan_of(cfg: DictConfig, data: L.LightningDataModule, world_size: int) -> tuple[int, int]:
    """Optimizer steps of an epoch and of the run, before there is a trainer."""
    return plan(
        _micro_batches(cfg, data, world_size),
        accumulate=cfg.trainer.accumulate_grad_batches,
        limit=None,
        max_epochs=cfg.trainer.max_epochs,
        max_steps=cfg.trainer.max_steps,
    )


def _checkpoint_folder(cfg: DictConfig) -> Path:
    """Where the run keeps its checkpoints, or would."""
    keeper = f"{CheckpointKeeper.__module__}.{CheckpointKeeper.__qualname__}"
    for node in (cfg.callbacks or {}).values():
        if node and node.get("_target_") == keeper:
            return Path(node.folder)
    return Path(cfg.paths.output_dir) / resume.CHECKPOINTS


def _micro_batches(cfg: DictConfig, data: L.LightningDataModule, world_size: int) -> int:
    """Training batches of a rank in an epoch of this run."""
    accumulate = cfg.trainer.accumulate_grad_batches
    whole = data.micro_batches(world_size=world_size, accumulate=accumulate)
    return limited(whole, cfg.trainer.get("limit_train_batches"))


def build_trainer(
    cfg: DictConfig,
    record: RunRecord,
    watch: RankWatch,
    goes_on: Callable[[dict[str, Any]], dict[str, Any]],
) -> L.Trainer:
    """The trainer with its callbacks and loggers."""
    callbacks = [config.instantiate(node) for node in (cfg.callbacks or {}).values() if node]
    loggers = [config.instantiate(node) for node in (cfg.logger or {}).values() if node]
    job, agreement = config.instantiate(cfg.job), Agreement()
    finite = FiniteGuard(
        Path(cfg.paths.output_dir) / "faults",
        agreement=agreement,
        max_nonfinite_steps=job.max_nonfinite_steps,
    )
    return config.instantiate(
        cfg.trainer,
        callbacks=[
            watch,  # first: it must hear of an exception before anything waits for other ranks
            KeyedRandomness(cfg.seed),
            EpochMetrics(),
            PlanCheck(),
            record,
            finite,  # before what reads the gradients
            RewindLoggers(),
            *callbacks,
            Stopping(job, agreement=agreement),  # after what changes weights
        ],
        logger=[GuardedLogger(logger) for logger in loggers] or False,
        # a checkpoint passes through `goes_on` before Lightning restores anything from it
        plugins=[CheckpointFiles(on_load=goes_on)],
    )


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Validate the weights of a checkpoint; `cfg` is that run's config, changed as the user said.

    `cfg.init_from` names the checkpoint. Nothing is written. Of a task that measures each class by
    itself (it has a `table`) its rows stand under `per_class`.
    """
    world_size = _settle(cfg)
    if cfg.get("token_cache"):
        cfg.token_cache = None  # the same tokens, and nothing is written
    quiet_lightning()
    L.seed_everything(cfg.seed, workers=False, verbose=False)
    checkpoint = any_checkpoint(cfg.init_from, tell="nothing", config=False)
    data = config.instantiate(cfg.datamodule)
    task = config.instantiate(cfg.task)
    load_children(task, checkpoint)
    _check_classes(checkpoint, data)
    data.check(world_size=world_size, accumulate=1, stage="validate")
    trainer = config.instantiate(cfg.trainer, logger=False, enable_checkpointing=False)
    if hasattr(task, "check"):
        task.check(trainer.strategy.root_device)
    metrics = trainer.validate(task, datamodule=data, verbose=False)
    found: dict[str, Any] = {key: float(value) for key, value in metrics[0].items()}
    return found | ({"per_class": task.table(data.classes)} if hasattr(task, "table") else {})


def _check_classes(checkpoint: Checkpoint, data: Any) -> None:
    """Raises UserError for the checkpoint's classes in another order: they are told by number."""
    own, given = checkpoint.classes, getattr(data, "classes", None)
    if own is None or given is None or list(own) == list(given):
        return
    place = next((i for i, pair in enumerate(zip(own, given)) if pair[0] != pair[1]), len(given))
    names = [classes[place] if place < len(classes) else "none" for classes in (own, given)]
    told = f"class {place} of the checkpoint is '{names[0]}', and of the data '{names[1]}'"
    if sorted(own) == sorted(given):
        raise UserError(f"{told}: the data's classes must stand in the checkpoint's order")
    log.warning("%s; they are compared by their numbers", told)


def tokenize(cfg: DictConfig) -> dict[str, int]:
    """Fill the token cache of a pretraining, on the devices of its trainer. Returns the counts.

    What is there stays, so an interrupted call is gone on with by the next one.
    """
    config.check(cfg)
    world_size = _settle(cfg)
    trainer = cfg.trainer
    fabric = L.Fabric(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.get("num_nodes", 1),
        strategy="ddp" if world_size > 1 else "auto",
    )
    fabric.launch()
    data = config.instantiate(cfg.datamodule)
    if not hasattr(data, "fill_caches"):
        raise UserError(f"task={cfg.task_name} has no visual tokens to keep: say task=mim")
    data.check(world_size=world_size, accumulate=trainer.accumulate_grad_batches)
    begin = time.monotonic()
    counts = data.fill_caches(fabric.device, rank=fabric.global_rank, world_size=world_size)
    fabric.barrier()
    seconds = time.monotonic() - begin
    views = counts["train"] + counts.get("val", 0)
    if fabric.is_global_zero:
        log.info(
            "%s: %d views of this process in %.1f s (%.1f/s), %d unreadable",
            *(cfg.token_cache, views, seconds, views / seconds, counts["unreadable"]),
        )
    return counts


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
