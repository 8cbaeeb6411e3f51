"""All hyper-parameters of all recipes, from the configs themselves, into docs/recipes.md.

python -m scripts.recipes
"""

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from beit import config
from scripts.sections import write_section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
SECTION, COMMAND = "recipes", "make recipes"

# name in the table: keys of the config, of which the first that there is counts
NUMBERS = {
    "blocks": ("model.depth",),
    "width": ("model.width",),
    "heads": ("model.num_heads",),
    "px": ("model.image_size", "views.image_size"),
    "patch": ("model.patch_size",),
    "absolute positions": ("model.absolute_position",),
    "relative positions": ("model.relative_position",),
    "LayerScale": ("model.layer_scale",),
    "drop path": ("model.drop_path_rate",),
    "pooling": ("task.head.pooling",),
    "vocabulary": ("tokenizer.vocab_size",),
    "mask ratio": ("masking.mask_ratio",),
    "least block": ("masking.min_block_patches",),
    "targets": ("task.target._target_",),
    "predicted": ("task.predict",),
    "masked input": ("task.mask_input",),
    "labels a class": ("labels_per_class",),
    "epochs": ("trainer.max_epochs",),
    "steps": ("trainer.max_steps",),
    "batch": ("batch.global_size",),
    "draws": ("loader.repeats",),
    "lr": ("optim.lr",),
    "min lr": ("optim.min_lr",),
    "warm-up epochs": ("optim.warmup_epochs",),
    "warm-up steps": ("optim.warmup_steps",),
    "schedule": ("optim.schedule",),
    "layer decay": ("optim.layer_decay",),
    "weight decay": ("optim.weight_decay",),
    "betas": ("optim.betas",),
    "eps": ("optim.eps",),
    "clip": ("trainer.gradient_clip_val",),
    "smoothing": ("task.label_smoothing",),
    "mixup": ("mixing.mixup_alpha",),
    "cutmix": ("mixing.cutmix_alpha",),
    "RandAugment": ("views.train.auto_augment",),
    "jitter": ("views.color_jitter",),
    "erasing": ("views.train.random_erasing",),
    "least crop": ("views.train.min_scale", "views.min_scale"),
    "flip": ("views.train.flip", "views.flip"),
    "mean": ("normalize.mean",),
    "std": ("normalize.std",),
    "precision": ("trainer.precision",),
    "starts from": ("init_from",),
}
_NOTHING = "-"


def recipes() -> dict[str, list[str]]:
    """Names of the recipes by their folder."""
    folder = config.config_dir() / "experiment"
    names = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.rpartition("/")[0], []).append(name)
    return families


def numbers(recipe: str) -> dict[str, str]:
    """What stands in the table for a recipe, and what it is expected to reach."""
    cfg = config.compose([f"experiment={recipe}"])
    found = {name: _first(cfg, keys) for name, keys in NUMBERS.items()}
    return {name: value for name, value in found.items() if value} | {"expect": _expected(recipe)}


def _first(cfg: Any, keys: tuple[str, ...]) -> str:
    for key in keys:
        above, _, leaf = key.rpartition(".")
        try:
            node = OmegaConf.select(cfg, above) if above else cfg
            if node is None or leaf not in node.keys():  # noqa: SIM118  `in node` passes over ???
                continue
            return "given by its user" if OmegaConf.is_missing(node, leaf) else _shown(node[leaf])
        except OmegaConfBaseException:  # read from a file that an earlier recipe makes
            return "of the tokenizer"
    return ""


def _shown(value: Any) -> str:
    if value is None or value == -1:
        return _NOTHING
    if value == config.REQUIRED:
        return "given by its user"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if OmegaConf.is_list(value):
        return " ".join(map(_shown, value))
    if isinstance(value, str) and value.startswith("beit."):  # a class
        return value.rpartition(".")[2]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _expected(recipe: str) -> str:
    text = (config.config_dir() / "experiment" / f"{recipe}.yaml").read_text(encoding="utf-8")
    found = re.search(r"^# expect +(.*(?:\n#  +.*)*)", text, re.MULTILINE)
    assert found, recipe
    return re.sub(r"\n# +", " ", found[1]).replace("|", "\\|")


def table(names: list[str]) -> str:
    """What all of a family share, in a line, and the rest in a table."""
    rows = {name: numbers(name) for name in names}
    columns = [c for c in [*NUMBERS, "expect"] if any(c in row for row in rows.values())]
    values = {c: {row.get(c, _NOTHING) for row in rows.values()} for c in columns}
    shared = [c for c in columns if len(values[c]) == 1 and c != "expect" and len(names) > 1]
    told = "; ".join(f"{c} {values[c].copy().pop()}" for c in shared if values[c] != {_NOTHING})
    shown = [c for c in columns if c not in shared]
    lines = [f"| recipe | {' | '.join(shown)} |", f"| --- |{' --- |' * len(shown)}"]
    for name, row in rows.items():
        cells = " | ".join(row.get(c, _NOTHING) for c in shown)
        lines.append(f"| `{name.rpartition('/')[2]}` | {cells} |")
    return (f"The same in all of them: {told}.\n\n" if told else "") + "\n".join(lines)


def text() -> str:
    """The generated part of the page."""
    return "\n\n".join(f"## {family}\n\n{table(names)}" for family, names in recipes().items())


def main() -> None:
    write_section(PAGE, SECTION, COMMAND, text())


if __name__ == "__main__":
    main()
