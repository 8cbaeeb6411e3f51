"""Class logits without gradients, in bf16 and in fp32."""

from functools import partial

import torch
from torch import Tensor

from scripts.bench import contenders, flop, steps
from scripts.bench.contenders import Classifier
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings
from scripts.bench.timing import Step, alternate, timed

ROW = "Inference"


def run(settings: Settings) -> list[Table]:
    shape = settings.shape()
    images, _ = steps.labelled_batch(shape, contenders.CLASSES)
    models = {name: make().eval() for name, make in contenders.classification(shape).items()}
    count = flop.inference(shape, contenders.CLASSES)
    tables = []
    for precision in ("bf16", "fp32"):
        seconds = alternate(timed(build(models, images, precision)), rounds=settings.rounds)
        entries = [Entry(name, values, len(images), count) for name, values in seconds.items()]
        title = f"{shape}, {precision}"
        tables.append(Table(title, entries, work="images", precision=precision))
    return tables


def build(models: dict[str, Classifier], images: Tensor, precision: str) -> dict[str, Step]:
    """Each gives logits (B, K)."""
    return {name: partial(_logits, model, images, precision) for name, model in models.items()}


def _logits(model: Classifier, images: Tensor, precision: str) -> Tensor:
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.inference_mode(), autocast:
        return model.logits(images)
