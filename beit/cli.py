"""The `beit` command: one verb, one function. Imports nothing heavy until a verb needs it."""

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from beit import __version__
from beit.errors import UserError

_HELP = f"""beit {__version__}: BERT pre-training of image Transformers

usage: beit VERB [KEY=VALUE ...]

  train      train a tokenizer, pretrain or fine-tune
               beit train experiment=demo/pretrain
               beit train task=classification model=base data=folder paths.data_dir=photos \\
                 batch.global_size=1024 batch.per_device=64 trainer.max_epochs=100
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


def _refuse(error: Exception, member: str = "") -> int:
    where = f"{member}: " if member else ""
    print(f"beit: error: {where}{' '.join(str(error).split())}", file=sys.stderr)
    return 2


def train(arguments: list[str]) -> int:
    """Compose a config with Hydra and run it; -m runs a sweep, one member after the other."""
    import hydra
    from omegaconf import DictConfig

    from beit import config
    from beit.console import log_to_console
    from beit.explain import explained, train_help

    if any(word in ("-h", "--help") for word in arguments):
        print(train_help())
        return 0

    words, flags = _split_flags(arguments)
    if not {"-m", "--multirun"} & set(flags):
        config.refuse_sweep(words)
    config.register()
    log_to_console()
    codes: list[int] = []
    typed = sys.argv

    def run(cfg: DictConfig) -> float | None:
        sys.argv = typed  # Lightning starts the other ranks with these words
        code, metrics = _run_member(cfg, flags)
        codes.append(code)
        return metrics.get("val/loss")

    # let Hydra raise what it would otherwise print and turn into exit code 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *words, *flags]
    command = hydra.main(
        version_base="1.3", config_path=str(config.config_dir()), config_name="train"
    )(run)
    with explained(words):
        command()
    return 1 if 1 in codes else max(codes, default=0)


def _run_member(cfg: Any, flags: list[str]) -> tuple[int, dict[str, float]]:
    """One run, or one member of a sweep: what goes wrong in it is reported, the others go on."""
    import logging

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from beit import runner
    from beit.explain import explained

    hydra = HydraConfig.get()
    member = ""
    if hydra.mode == RunMode.MULTIRUN:
        member = " ".join(hydra.overrides.task)
        cfg.paths.output_dir = hydra.runtime.output_dir
        folder = f"paths.output_dir={cfg.paths.output_dir}"
        alone = [flag for flag in flags if flag not in ("-m", "--multirun")]
        sys.argv = [sys.argv[0], "train", *hydra.overrides.task, folder, *alone]
    try:
        with explained([]):
            return 0, runner.fit(cfg)
    except UserError as error:
        return _refuse(error, member), {}
    except Exception:
        if not member:
            raise
        logging.getLogger("beit").exception("beit: failed: %s", member)
        return 1, {}


# Hydra's own that make sense here, and whether a value follows
_FLAGS = {
    "-m": False,
    "--multirun": False,
    "--resolve": False,
    "--cfg": True,
    "-c": True,
    "--package": True,
    "-p": True,
    "--config-dir": True,
    "-cd": True,
}


def _split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The words and the flags: Hydra understands words only before the flags."""
    from beit.nearest import did_you_mean

    words: list[str] = []
    flags: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            words.append(argument)
        elif name not in _FLAGS or (equals and not _FLAGS[name]):
            raise UserError(f"{argument} is not a flag of train: {did_you_mean(name, _FLAGS)}")
        elif not _FLAGS[name]:
            flags.append(name)
        else:
            value = value if equals else next(waiting, "")
            if not value or (name in ("--cfg", "-c") and value not in ("job", "hydra", "all")):
                expected = "job, hydra or all" if name in ("--cfg", "-c") else "a value after it"
                raise UserError(f"{name} {value}".rstrip() + f": expected {expected}")
            flags += [name, value]
    return words, flags


def evaluate(arguments: list[str]) -> int:
    """Print the validation metrics of a checkpoint as one JSON line."""
    import json

    from beit.console import log_to_console

    if _wants_help(arguments, "evaluate", "checkpoint=PATH [KEY=VALUE of the run's config ...]"):
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
    if _wants_help(arguments, "predict", usage):
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
    with _sink(output) as sink:
        for line in lines:
            print(json.dumps(line), file=sink)
    return 0


def _sink(output: str | None) -> TextIO:
    if not output:
        return os.fdopen(os.dup(1), "w")
    try:
        return open(output, "x", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"output={output} cannot be written ({error.strerror}): choose another file"
        ) from error


def _wants_help(arguments: list[str], verb: str, usage: str) -> bool:
    if any(word in ("-h", "--help") for word in arguments):
        print(f"usage: beit {verb} {usage}")
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
