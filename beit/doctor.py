"""A run examined before it begins; the part that `beit train` does too is `preflight.quick`."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from beit import config, runner
from beit.checkpoints.keeper import CheckpointKeeper
from beit.console import quiet_lightning
from beit.data.images import UnreadableImage
from beit.explain import explained
from beit.preflight import quick, space, trial
from beit.preflight.findings import Finding, told
from beit.preflight.machine import Machine, uses_gpu
from beit.preflight.space import Weights
from beit.sizes import height_width, patch_grid

_IMAGES = 2  # of the step that shows what a step needs
_LOOKED_AT = 16  # images whose sizes are read
_EFFICIENCY = 0.4  # of the speed of large products: what a step reaches, by our own measurements
_KEEPER = f"{CheckpointKeeper.__module__}.{CheckpointKeeper.__qualname__}"
_AVERAGING = "lightning.pytorch.callbacks.EMAWeightAveraging"


def examine(words: list[str], *, steps: int = 0) -> list[Finding]:
    """All findings on the run that `beit train WORDS` would begin. Nothing is written.

    `steps` micro-batches are run and timed on one device of the run; 0: the time is worked out.
    """
    findings: list[Finding] = []
    machine = Machine.here()
    quiet_lightning()
    with told(findings, "config"), explained(words):
        config.refuse_sweep(words)
        cfg = config.compose(words)
        config.check(cfg)
        world_size = config.settle_devices(cfg)
        findings.append(Finding("ok", "config", _batch_told(cfg, world_size)))
        findings += quick.look(cfg, words, machine)
        findings += _of_run(cfg, world_size, machine, steps)
    return findings


def _of_run(cfg: DictConfig, world_size: int, machine: Machine, steps: int) -> Iterator[Finding]:
    """Of network and data, as far as they can be built."""
    findings: list[Finding] = []
    cfg, cache = _unwritten(cfg), cfg.token_cache
    data: Any = None
    with told(findings, "data"):
        data = config.instantiate(cfg.datamodule)
        config.settle_classes(cfg, len(getattr(data, "classes", None) or ()))
        data.check(world_size=world_size, accumulate=cfg.trainer.accumulate_grad_batches)
        findings += _of_data(cfg, data, cache)
    known = OmegaConf.select(cfg, "task.num_classes", throw_on_missing=False) != "auto"
    weights = None
    if data is not None or known:
        with told(findings, "network"):
            weights = _weights(cfg)
            findings.append(_weights_told(weights))
            plan = (0, 0) if data is None else runner.plan_of(cfg, data, world_size)
            findings.append(_disk(cfg, weights, *plan))
    if data is not None and weights is not None:
        with told(findings, "step"):
            findings += _of_steps(cfg, data, weights, world_size, machine, steps)
    elif weights is not None:
        findings.append(_memory(cfg, weights, None, machine))
    yield from findings


def _batch_told(cfg: DictConfig, world_size: int) -> str:
    """The arithmetic of the global batch."""
    accumulate = cfg.trainer.accumulate_grad_batches
    return (
        f"global batch {cfg.batch.global_size} = {world_size} devices x {cfg.batch.per_device} "
        f"images x {accumulate} accumulated"
    )


def _unwritten(cfg: DictConfig) -> DictConfig:
    """The run without what would write: a token cache, downloads."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.token_cache = None
        for node in (cfg.data.get("train"), cfg.data.get("val")):
            if node and "download" in node:
                node.download = False
    return cfg


def _of_data(cfg: DictConfig, data: Any, cache: str | None) -> Iterator[Finding]:
    """Numbers of images, labels and their range, sizes of images, the token cache."""
    source, val = data.loaders.train_data.source, data.loaders.val_data
    validated = f"{len(val):,} for validation" if val is not None else "none for validation"
    yield Finding("ok", "data", f"{data.loaders.last_batch_told()}; {validated}")
    labels, classes = getattr(source, "labels", None), getattr(data, "num_classes", None)
    if labels is not None and classes and np.ndim(labels) == 1:
        found = np.unique(labels)
        text = f"{found.min()} to {found.max()}, {len(found)} of {classes} classes have images"
        yield Finding("ok" if len(found) == classes else "warn", "labels", text)
    if cfg.model is None:
        return
    places = np.linspace(0, len(source) - 1, min(_LOOKED_AT, len(source))).astype(int)
    sizes = [_size(source, int(place)) for place in places]
    yield from space.check_patches(
        [found for found in sizes if found],
        image_size=height_width(cfg.model.image_size),
        patch_size=cfg.model.patch_size,
    )
    if cache:
        grid = patch_grid(cfg.model.image_size, cfg.model.patch_size)
        images = {"images": len(source), "views": cfg.views_per_image, "tokens": grid[0] * grid[1]}
        yield space.check_cache(**images, folder=Path(cache))


def _size(source: Any, index: int) -> tuple[int, int] | None:
    """(H, W) of an image; None of one that cannot be read, which the data module's check names."""
    try:
        image = source.load(index)[0]
    except UnreadableImage:
        return None
    width, height = image.size
    return height, width


def _weights(cfg: DictConfig) -> Weights:
    """Of the task, built without memory for it."""
    with torch.device("meta"):
        task = config.instantiate(cfg.task)
    parameters = list(task.parameters())
    callbacks = (cfg.callbacks or {}).values()
    return Weights(
        total=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        averaged=any(node and node.get("_target_") == _AVERAGING for node in callbacks),
    )


def _weights_told(weights: Weights) -> Finding:
    text = f"{weights.total:,} parameters, {weights.trained:,} of them trained"
    return Finding("ok", "network", text + (", and averaged" if weights.averaged else ""))


def _disk(cfg: DictConfig, weights: Weights, per_epoch: int, total: int) -> Finding:
    """Of a run of `total` steps, `per_epoch` an epoch; 0 where its images cannot be read."""
    nodes = [node for node in (cfg.callbacks or {}).values() if node]
    keepers = [node for node in nodes if node.get("_target_") == _KEEPER]
    kept = sum(_kept(node, per_epoch, total) + bool(node.best_by) for node in keepers)
    folder = Path(keepers[0].folder) if keepers else Path(cfg.paths.output_dir)
    return space.check_disk(weights, kept=kept, folder=folder)


def _kept(keeper: DictConfig, per_epoch: int, total: int) -> int:
    """Checkpoints that stay; of a keeper of all those by steps and epochs, not those by minutes."""
    if keeper.keep != -1:
        return int(keeper.keep)
    between = [keeper.every_n_steps, keeper.every_n_epochs * per_epoch]
    return max(1, len({step for n in between if n for step in range(n, total + 1, n)} | {total}))


def _memory(
    cfg: DictConfig, weights: Weights, activations: float | None, machine: Machine
) -> Finding:
    on_gpu = uses_gpu(dict(cfg.trainer), machine)
    kept = None if activations is None else int(activations * cfg.batch.per_device)
    return space.check_memory(
        weights,
        activations=kept,
        copies=1 if on_gpu else quick.processes(cfg),
        available=machine.gpu_memory if on_gpu else machine.memory,
        where="the GPU" if on_gpu else "this machine",
    )


def _of_steps(
    cfg: DictConfig, data: Any, weights: Weights, world_size: int, machine: Machine, steps: int
) -> Iterator[Finding]:
    """What a step uses and costs."""
    small = _one_device(cfg, images=_IMAGES, on_cpu=True)
    task, images = runner.build(small, 1)
    found = trial.examine(task, images, _plain(small.trainer), images=_IMAGES)
    unused = ", ".join(found.unused[:8]) + (", ..." if len(found.unused) > 8 else "")
    text = f"{len(found.unused)} get no gradient: {unused}" if found.unused else "all get gradients"
    yield Finding("warn" if found.unused else "ok", "unused parameters", text)
    yield _memory(cfg, weights, found.activations, machine)
    per_epoch, total = runner.plan_of(cfg, data, world_size)
    seen = total * cfg.batch.global_size
    plan = f"{total:,} steps, {per_epoch:,} an epoch, {seen:,} images"
    on_gpu = uses_gpu(dict(cfg.trainer), machine)
    if on_gpu and not machine.gpus:
        need = (
            f"{seen * found.flop:.3g} FLOP, {seen * found.flop / 3.6e17:.3g} hours of 100 TFLOP/s"
        )
        yield Finding("ok", "time", f"{plan}: {need}; no such device is here to measure")
        return
    if steps:
        real = _one_device(cfg, images=cfg.batch.per_device, on_cpu=False)
        task, images = runner.build(real, 1)
        seconds = trial.seconds_per_batch(task, images, _plain(real.trainer), steps=steps)
        how = f"{steps} micro-batches of {cfg.batch.per_device} took {seconds:.3g} s each"
        hours = seen / (cfg.batch.per_device * world_size) * seconds / 3600
    else:
        half = str(cfg.trainer.precision).startswith(("bf16", "16"))
        device = torch.device("cuda" if on_gpu else "cpu")
        speed = trial.flop_per_second(device, torch.bfloat16 if half else torch.float32)
        how = (
            f"{found.flop / 1e9:.3g} GFLOP an image at {_EFFICIENCY:.0%} of {speed / 1e12:.3g} "
            "TFLOP/s, images not counted; steps=10 measures it"
        )
        shared = world_size if on_gpu else 1  # processes of one processor share its units
        hours = seen * found.flop / (speed * _EFFICIENCY * shared) / 3600
    yield Finding("ok", "time", f"about {_duration(hours)}: {plan}; {how}")


def _one_device(cfg: DictConfig, *, images: int, on_cpu: bool) -> DictConfig:
    """The run on one device, a micro-batch of so many images a step, without warm-up."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.batch.global_size = cfg.batch.per_device = images
        cfg.loader.repeats, cfg.loader.check_images = 1, 0
        changes = {"devices": 1, "num_nodes": 1, "strategy": "auto", "sync_batchnorm": False}
        changes |= {"accumulate_grad_batches": 1, "max_epochs": -1, "max_steps": 1}
        changes |= {"limit_train_batches": None, "enable_progress_bar": False}
        if on_cpu:
            changes["accelerator"] = "cpu"
            half = str(cfg.trainer.precision).startswith(("bf16", "16"))
            changes["precision"] = "bf16-mixed" if half else "32-true"
            cfg.loader.num_workers = 0
        cfg.trainer.update(changes)
        cfg.optim.warmup_epochs = cfg.optim.warmup_steps = 0
        cfg.compile, cfg.resume = False, None
    return cfg


def _plain(node: DictConfig) -> dict[str, Any]:
    """Arguments of the Trainer."""
    content: Any = OmegaConf.to_container(node, resolve=True)
    return {key: value for key, value in content.items() if not key.startswith("_")}


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.2g} minutes"
    return f"{hours:.3g} hours" if hours < 72 else f"{hours / 24:.3g} days"
