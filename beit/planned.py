"""A member of a sweep as its config plans it: what comes before, what follows, or a search."""

import logging
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from beit import gathering, search, stages
from beit.errors import UserError
from beit.schema import SweepConfig
from beit.sweep import Member, Sweep

log = logging.getLogger(__name__)


def run(sweep: Sweep, member: Member, cfg: DictConfig, space: dict[str, Any]) -> float | None:
    """Run a member, or where the config asks for a search all that it tries.

    Args:
        space: what Hydra sweeps over. Raises UserError for that and a search at once.
    """
    plan: Any = OmegaConf.to_container(cfg.sweep or OmegaConf.structured(SweepConfig))
    sweep.metric = plan["metric"]
    folder, words = Path(member.folder), member.overrides
    if not sweep.members:
        _check_stages(plan, words, folder, seed=cfg.seed)
        sweep.prepare(folder.parent, stages.before(plan, words))

    def one(number: int, words: list[str], *, seed: int, again: bool = True) -> float | None:
        place = folder.parent / str(number)
        following = stages.after(plan, words, place, seed=seed)
        return sweep.run(place, number, words, following, again=again)

    if plan["search"] is None:
        return one(member.number, words, seed=cfg.seed)
    if space or member.number > 0 or _sweeps(words):
        raise UserError("a search tries one member after the other: give no values with commas")
    keys = plan["search"]["space"]
    nowhere = object()  # null is a value
    for key in keys:
        if OmegaConf.select(cfg, key, default=nowhere) is nowhere:
            raise UserError(_no_such_key(key, cfg))
    return search.run(
        plan["search"],
        folder.parent,
        lambda number, chosen, again: one(number, [*words, *chosen], seed=cfg.seed, again=again),
        stopped=lambda: sweep.stopped,
    )


def gathered(sweep: Sweep) -> None:
    """Write the sweep's table, if there is anything to put into it, and say where."""
    folder = Path(sweep.members[0].folder).parent
    if any(member.metrics for member in sweep.members):
        table = gathering.gather(folder)
        log.info("gathered: %s", ", ".join(map(str, table.written)))


def _check_stages(plan: dict[str, Any], words: list[str], folder: Path, *, seed: int) -> None:
    """Raises UserError for a stage that there is not, which its turn would tell hours later."""
    from beit import config
    from beit.explain import explained

    for stage in (*stages.before(plan, words), *stages.after(plan, words, folder, seed=seed)):
        of_verb = ("checkpoint", "output", "overwrite") if stage.verb == "evaluate" else ()
        own = [word for word in stage.words if word.partition("=")[0] not in of_verb]
        try:
            with explained(own, config_name=stage.verb):  # the configs are named as the verbs are
                config.compose_within(own, config_name=stage.verb)
        except UserError as error:
            raise UserError(f"sweep, {stage.name}: {error}") from error


def _sweeps(words: list[str]) -> bool:
    parsed = OverridesParser.create().parse_overrides(words)
    return any(word.is_sweep_override() for word in parsed)


def _no_such_key(key: str, cfg: DictConfig) -> str:
    from beit.config import dotted_keys
    from beit.nearest import did_you_mean

    known = [name for name, _ in dotted_keys(cfg)]
    hint = did_you_mean(key, known, otherwise="see beit train ... --cfg job")
    return f"sweep.search.space: {key} is not a key of this config: {hint}"
