"""A few steps of a run, to learn what it costs and which parameters it does not use."""

import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

_MATRIX = 1024  # side of the products that a device's speed is measured by
_SECONDS = 0.3  # for that


@dataclass(frozen=True)
class Trial:
    """What a step of a few images told."""

    unused: list[str]  # parameters that got no gradient
    flop: float  # of an image: forward, backward and the tokenizer
    activations: float  # bytes of an image that are kept for the backward pass


class Watch(L.Callback):
    """Notes which parameters got no gradient, and how long each step took."""

    def __init__(self) -> None:
        self.unused: list[str] = []
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        # the images are there: loading them is not of the step, but of the time between two
        self._began = self._began or time.perf_counter()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.unused = [
            name
            for name, parameter in pl_module.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now


def examine(
    task: L.LightningModule, data: L.LightningDataModule, trainer: dict[str, Any], *, images: int
) -> Trial:
    """One step of so many images; `trainer` are arguments for that."""
    watch, counted = Watch(), FlopCounterMode(display=False)
    kept = _Kept(task)
    with counted, saved_tensors_hooks(kept, lambda tensor: tensor):
        _fit(task, data, trainer, watch, steps=1)
    return Trial(watch.unused, counted.get_total_flops() / images, kept.bytes / images)


def seconds_per_batch(
    task: L.LightningModule, data: L.LightningDataModule, trainer: dict[str, Any], *, steps: int
) -> float:
    """Median over steps of a micro-batch each, the loading of its images included.

    The first, which makes workers, memory and the optimizer's state, is not counted.
    """
    watch = Watch()
    _fit(task, data, trainer, watch, steps=steps + 1)
    return statistics.median(watch.seconds[1:] or watch.seconds)


def _fit(
    task: L.LightningModule,
    data: L.LightningDataModule,
    trainer: dict[str, Any],
    watch: Watch,
    *,
    steps: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            **trainer,
            "max_steps": steps,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "limit_train_batches": None,
            "enable_checkpointing": False,
            "callbacks": [watch],
            "logger": False,
            "default_root_dir": folder,
        }
        L.Trainer(**arguments).fit(task, datamodule=data)


class _Kept:
    """Counts the bytes of tensors that autograd keeps, each storage once, without parameters.

    Nor their casts of an autocast: there are as many of those for one image as for a hundred.
    """

    def __init__(self, module: nn.Module) -> None:
        shapes = [tuple(parameter.shape) for parameter in module.parameters()]
        self._parameters = {*shapes, *(shape[::-1] for shape in shapes)}
        self._seen: set[int] = set()
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tuple(tensor.shape) not in self._parameters and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def flop_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of products of large matrices, which a training step stays below."""
    left, right = (torch.randn(_MATRIX, _MATRIX, device=device, dtype=dtype) for _ in range(2))
    left @ right
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        left @ right
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return 2 * _MATRIX**3 * count / (time.perf_counter() - began)
