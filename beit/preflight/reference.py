"""The batch and the learning rate that a recipe has by itself, whatever its user changed."""

import re

from omegaconf import OmegaConf

from beit import config
from beit.preflight.rates import Reference

# of runs without a recipe: the batch that the rate in configs/optim was found at (BEiT, tables 12
# and 13; the released configs of ADE20K; the released linear evaluation)
_BATCHES = {"mim": 2048, "classification": 1024, "segmentation": 16, "linear_probe": 1024}
_CHANGES = re.compile(r"[+~]*(batch|optim)\.")


def reference(words: list[str]) -> Reference | None:
    """What belongs to the run that these words make, without those that change batch and rate.

    None where nothing is known to compare with: our own tokenizer, say, has no batch of its own.
    """
    kept = [word for word in words if not _CHANGES.match(word)]
    cfg = config.compose_within(kept)
    batch = OmegaConf.select(cfg, "batch.global_size", throw_on_missing=False)
    lr = OmegaConf.select(cfg, "optim.lr", throw_on_missing=False)
    recipe = next((word for word in reversed(words) if word.startswith("experiment=")), None)
    if batch is None:
        recipe, batch = f"optim of task={cfg.task_name}", _BATCHES.get(cfg.task_name)
    if batch is None or lr is None:
        return None
    return Reference(int(batch), float(lr), recipe or "the config")
