"""What can be known of a run without its network and its data, in well under a second."""

import logging
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from beit.preflight import rates
from beit.preflight.findings import Finding
from beit.preflight.machine import Machine, check_machine
from beit.preflight.reference import reference

log = logging.getLogger(__name__)


def look(cfg: DictConfig, words: Sequence[str] | None, machine: Machine) -> list[Finding]:
    """Findings on a config that is checked and whose devices are settled.

    `words` are those that it was composed of; None: not known, and so neither is the recipe.
    """
    findings = []
    if words is not None and cfg.optim is not None and (known := reference(list(words))):
        batch, lr = cfg.batch.global_size, cfg.optim.lr
        findings.append(rates.compare(batch=batch, lr=lr, reference=known))
    findings += check_machine(
        {key: cfg.trainer.get(key) for key in ("accelerator", "precision")},
        processes=processes(cfg),
        workers=cfg.loader.num_workers,
        machine=machine,
    )
    pooling = OmegaConf.select(cfg, "task.head.pooling", throw_on_missing=False)
    if pooling == "cls" and not cfg.model.final_norm:
        text = "task.head.pooling=cls sees CLS without a norm: say pooling=cls, which gives it one"
        findings.append(Finding("warn", "pooling", text))
    return findings


def warn(cfg: DictConfig, words: Sequence[str] | None) -> None:
    """Those that are not as they should be, as warnings in the log."""
    for finding in look(cfg, words, Machine.here()):
        if finding.level != "ok":
            log.warning("%s: %s", finding.check, finding.text)


def processes(cfg: DictConfig) -> int:
    """Of this machine, one for each device."""
    devices = cfg.trainer.devices
    return len(devices) if OmegaConf.is_list(devices) else int(devices)
