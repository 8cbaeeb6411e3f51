"""How a task is optimised: AdamW, its groups and the schedule of its learning rate."""

import functools
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from beit.errors import UserError
from beit.optim.groups import parameter_groups
from beit.optim.schedules import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class AdamWRecipe:
    """AdamW with warm-up and a falling rate, stepped once per optimizer step.

    Args:
        lr: peak learning rate of the recipe's global batch; never scaled by the batch here.
        min_lr: rate at the end; layer decay scales it as it scales `lr`.
        weight_decay: of matrices, bias tables and the mask token (see `groups`).
        warmup_epochs, warmup_steps: length of the warm-up in one unit or the other.
        layer_decay: rate of a layer relative to the one above it; 1.0 is off.
        schedule: how the rate falls: "cosine", or "linear" as in segmentation (see `schedules`).

    Raises:
        UserError: no number where one is due, rates, decays or betas out of range, warm-up given
            in both units, an unknown schedule.
    """

    lr: float
    min_lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    layer_decay: float = 1.0
    schedule: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # a YAML list must do
        for name in ("lr", "min_lr", "weight_decay", "eps", "warmup_epochs", "layer_decay"):
            value = getattr(self, name)
            _require(_is_number(value), f"{name} {value} must be a finite number")
        _require(self.lr > 0, f"lr {self.lr} must be positive")
        _require(
            0 <= self.min_lr <= self.lr, f"min_lr {self.min_lr} must lie between 0 and lr {self.lr}"
        )
        _require(self.weight_decay >= 0, f"weight_decay {self.weight_decay} must not be negative")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas {list(self.betas)} must be two numbers in [0, 1)",
        )
        _require(self.eps > 0, f"eps {self.eps} must be positive")
        _require(
            0 < self.layer_decay <= 1,
            f"layer_decay {self.layer_decay} must lie in (0, 1]; 1 is off",
        )
        _require(
            self.warmup_epochs >= 0 and self.warmup_steps >= 0,
            f"warmup_epochs {self.warmup_epochs} and warmup_steps {self.warmup_steps} must not be"
            " negative",
        )
        _require(
            not (self.warmup_epochs and self.warmup_steps),
            f"warmup_epochs {self.warmup_epochs} and warmup_steps {self.warmup_steps} exclude each"
            " other; set one of them to 0",
        )
        _require(
            self.schedule in SCHEDULES,
            f"schedule {self.schedule!r} must be one of {', '.join(SCHEDULES)}",
        )

    def build(
        self,
        modules: Mapping[str, nn.Module],
        *,
        steps_per_epoch: float,
        total_steps: int,
        depth: int = 0,
    ) -> tuple[torch.optim.AdamW, LambdaLR]:
        """Optimizer over the trainable parameters of `modules` and its schedule, one tick a step.

        Args:
            modules: see `parameter_groups`.
            steps_per_epoch: optimizer steps of an epoch, not micro-batches.
            total_steps: optimizer steps of the whole run.
            depth: blocks of the backbone, for layer decay.

        Raises:
            UserError: no steps, or a warm-up longer than the run.
        """
        warmup_steps = self.warmup_length(steps_per_epoch, total_steps)
        groups = parameter_groups(
            modules, weight_decay=self.weight_decay, layer_decay=self.layer_decay, depth=depth
        )
        for group in groups:
            group["lr"] = self.lr * group["lr_scale"]
        optimizer = torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=_supports_fused(groups)
        )
        # a fused step offers to unscale float16 gradients itself, after anyone could clip them;
        # declined, the scaler unscales before, and Lightning agrees to clip
        optimizer._step_supports_amp_scaling = False
        # relative to lr, so that one form serves every group and scales its min_lr too
        factor = functools.partial(
            SCHEDULES[self.schedule],
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            lr=1.0,
            min_lr=self.min_lr / self.lr,
        )
        return optimizer, LambdaLR(optimizer, lambda step: factor(step))

    def rate_at(self, step: int, *, steps_per_epoch: float, total_steps: int) -> float:
        """Learning rate of a step, before layer decay, in the closed form of the schedule."""
        return SCHEDULES[self.schedule](
            step,
            total_steps=total_steps,
            warmup_steps=self.warmup_length(steps_per_epoch, total_steps),
            lr=self.lr,
            min_lr=self.min_lr,
        )

    def warmup_length(self, steps_per_epoch: float, total_steps: int) -> int:
        """Optimizer steps of the warm-up; UserError where the run is shorter than that."""
        warmup_steps = self.warmup_steps or round(self.warmup_epochs * steps_per_epoch)
        _require(total_steps > 0, f"total_steps {total_steps} must be at least 1")
        _require(
            warmup_steps <= total_steps,
            f"warm-up of {warmup_steps} steps is longer than the run of {total_steps} steps;"
            " shorten the warm-up or train longer",
        )
        return warmup_steps


def _supports_fused(groups: list[dict]) -> bool:
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
