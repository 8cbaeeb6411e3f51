"""The `beit` command: one verb, one function. Imports nothing heavy until a verb needs it."""

import os
import sys
from collections.abc import Callable
from typing import Any

from beit import __version__
from beit.errors import UserError

_HELP = f"""beit {__version__}: BERT pre-training of image Transformers

usage: beit VERB [KEY=VALUE ...]

  train      train a tokenizer, pretrain or fine-tune
               beit train experiment=demo/pretrain
               beit train task=classification model=base data=folder paths.data_dir=photos
               beit train experiment=demo/finetune seed=0,1,2 -m          (a sweep)
  evaluate   validate the weights of a checkpoint
               beit evaluate checkpoint=runs/x/checkpoints/last.ckpt [KEY=VALUE of its config]
  predict    classify image files or a folder, as JSON lines
               beit predict checkpoint=runs/x/checkpoints/last.ckpt images=photos top_k=5

  beit VERB --help    what a verb takes; beit train --help lists the groups and recipes
  beit --version

resume=auto or a path goes on with the same run; init_from=path starts a new run from its weights.
exit codes: 0 done, 1 a fault of the program, 2 a mistake in the input (one line says which)
"""


def main() -> int:
    """Entry point. Returns the exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP)
        return 0
    if arguments[0] == "--version":
        print(f"beit {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in _VERBS:
        return _refuse(UserError(f"unknown verb {verb!r}: expected one of {', '.join(_VERBS)}"))
    try:
        return _VERBS[verb](rest)
    except UserError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("beit: interrupted", file=sys.stderr)
        return 130


def _refuse(error: Exception) -> int:
    print(f"beit: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def train(arguments: list[str]) -> int:
    """Compose a config with Hydra and run it; -m runs a sweep, one member after the other."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from beit import config
    from beit.console import log_to_console
    from beit.explain import explain, train_help

    if any(word in ("-h", "--help") for word in arguments):
        print(train_help())
        return 0

    config.register()
    log_to_console()
    codes: list[int] = []
    typed = sys.argv

    def run(cfg: DictConfig) -> float | None:
        sys.argv = typed  # Lightning starts the other ranks with these words
        code, metrics = _run_member(cfg)
        codes.append(code)
        return metrics.get("val/loss")

    # let Hydra raise what it would otherwise print and turn into exit code 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *arguments]
    command = hydra.main(
        version_base="1.3", config_path=str(config.config_dir()), config_name="train"
    )(run)
    try:
        command()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, arguments)) from error
    return max(codes, default=0)


def _run_member(cfg: Any) -> tuple[int, dict[str, float]]:
    """One run, or one member of a sweep: a mistake in it is reported and the others go on."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from beit import runner
    from beit.explain import explain

    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        cfg.paths.output_dir = hydra.runtime.output_dir
        folder = f"paths.output_dir={cfg.paths.output_dir}"
        sys.argv = [sys.argv[0], "train", *hydra.overrides.task, folder]
    try:
        return 0, runner.fit(cfg)
    except UserError as error:
        return _refuse(error), {}
    except OmegaConfBaseException as error:
        return _refuse(UserError(explain(error, []))), {}


def evaluate(arguments: list[str]) -> int:
    """Print the validation metrics of a checkpoint as one JSON line."""
    import json

    from beit.console import log_to_console

    if _wants_help(arguments, "checkpoint=PATH [KEY=VALUE of the run's config ...]"):
        return 0
    own, overrides = _split(arguments, ("checkpoint",))
    log_to_console()
    from beit import face

    print(json.dumps(face.evaluate(_required(own, "checkpoint"), *overrides)))
    return 0


def predict(arguments: list[str]) -> int:
    """Print, or write to output=FILE, one JSON line per image."""
    import json

    from beit.console import log_to_console

    usage = "checkpoint=PATH images=FILE_OR_FOLDER [top_k=5] [batch_size=32] [output=FILE]"
    if _wants_help(arguments, usage):
        return 0
    own, rest = _split(arguments, ("checkpoint", "images", "top_k", "batch_size", "output"))
    if rest:
        raise UserError(f"{rest[0]!r} is not a setting of predict: expected {usage}")
    log_to_console()
    checkpoint, images = _required(own, "checkpoint"), _required(own, "images")
    top_k = _whole_number(own, "top_k", 5)
    batch_size = _whole_number(own, "batch_size", 32)
    output = own.get("output")
    if output and os.path.exists(output):
        raise UserError(f"output={output} exists already: give another name or remove it")
    from beit import face

    lines = face.iterate_predictions(checkpoint, images, top_k=top_k, batch_size=batch_size)
    with open(output, "x", encoding="utf-8") if output else os.fdopen(os.dup(1), "w") as sink:
        for line in lines:
            print(json.dumps(line), file=sink)
    return 0


def _wants_help(arguments: list[str], usage: str) -> bool:
    if any(word in ("-h", "--help") for word in arguments):
        print(f"usage: beit VERB {usage}")
        return True
    return False


def _split(arguments: list[str], own: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The verb's own KEY=VALUE settings, and the rest."""
    settings, rest = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not of the form KEY=VALUE")
        if key in own:
            settings[key] = value
        else:
            rest.append(argument)
    return settings, rest


def _required(settings: dict[str, str], key: str) -> str:
    if not settings.get(key):
        raise UserError(f"{key} has no value: give it, as in {key}=PATH")
    return settings[key]


def _whole_number(settings: dict[str, str], key: str, default: int) -> int:
    value = settings.get(key, str(default))
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"{key}={value}: expected a whole number of at least 1")
    return int(value)


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
}

if __name__ == "__main__":
    sys.exit(main())
