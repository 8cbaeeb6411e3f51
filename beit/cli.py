"""The `beit` command: one verb, one function. Imports nothing heavy until a verb needs it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from beit import __version__
from beit.errors import UserError
from beit.job import exits

_HELP = f"""beit {__version__}: BERT pre-training of image Transformers

usage: beit VERB [KEY=VALUE ...]

  train      train a tokenizer, pretrain or fine-tune
               beit train experiment=demo/pretrain
               beit train task=classification model=base data=folder paths.data_dir=photos \\
                 batch.global_size=1024 batch.per_device=64 trainer.max_epochs=100
               beit train experiment=demo/finetune seed=0,1,2 -m          (a sweep)
  evaluate   validate the weights of a checkpoint
               beit evaluate checkpoint=runs/x/checkpoints/last.safetensors [KEY=VALUE ...]
  predict    classify image files or a folder, as JSON lines
               beit predict checkpoint=runs/x/checkpoints/last.safetensors images=photos top_k=5
  convert    weights from and to the official release (unilm), timm and Hugging Face
               beit convert source=beit_base_patch16_224_pt22k.pth to=huggingface output=beit-base

  beit VERB --help    what a verb takes; beit train --help lists the groups and recipes
  beit --version

resume=auto or a path goes on with the same run; init_from=path starts a new run from its weights.
exit codes:
{exits.table()}
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
    from beit.security import secrets, targets, telemetry

    telemetry.switch_off()
    secrets.redact_tracebacks()
    try:
        with targets.trusting(rest) as words:
            return _VERBS[verb](words)
    except UserError as error:
        return _refuse(error)
    except exits.RunEnd as end:
        return _ended(end)
    except KeyboardInterrupt:
        print("beit: interrupted", file=sys.stderr)
        return int(exits.Exit.SIGINT)


def _ended(end: exits.RunEnd) -> int:
    """A run that ended before its end: one line, unless the run's log has it, and its code."""
    from beit.security.secrets import redacted

    if not end.told:
        print(f"beit: {redacted(' '.join(str(end).split()))}", file=sys.stderr)
    return int(end.code)


def _refuse(error: Exception) -> int:
    from beit.printable import printable
    from beit.security.secrets import redacted

    text = redacted(" ".join(str(error).split()))
    print(f"beit: error: {printable(text, limit=len(text))}", file=sys.stderr)
    return int(exits.Exit.MISTAKE)


def train(arguments: list[str]) -> int:
    """Compose a config with Hydra and run it; -m runs a sweep, one member after the other."""
    from beit.job import processes, signals

    processes.end_with_parent_if_told()
    if {"-m", "--multirun"} & set(arguments):  # a sweep asks its members to stop
        return _train(arguments)
    with signals.handled(ends_process=True):
        return _train(arguments)


def _train(arguments: list[str]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from beit import config, sweep
    from beit.console import log_to_console
    from beit.explain import explained, train_help

    if any(word in ("-h", "--help") for word in arguments):
        print(train_help())
        return 0

    words, flags = _split_flags(arguments)
    members = sweep.Sweep(flags) if {"-m", "--multirun"} & set(flags) else None
    if members is None and not sweep.is_member():
        config.refuse_sweep(words)
    config.register()
    log_to_console()
    codes: list[int] = []
    typed = sys.argv

    def run(cfg: DictConfig) -> float | None:
        if members is not None:
            member = HydraConfig.get()
            folder = Path(member.runtime.output_dir)
            return members.run(folder, member.job.num, list(member.overrides.task))
        sys.argv = typed  # Lightning starts the other ranks with these words
        codes.append(_run(cfg))
        return None

    # let Hydra raise what it would otherwise print and turn into exit code 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *words, *flags]
    command = hydra.main(
        version_base="1.3", config_path=str(config.config_dir()), config_name="train"
    )(run)
    with explained(words), config.vetted():
        if members is None:
            command()
            return exits.of_all(codes)
        with members.stoppable():
            command()
    if members.members:
        print(members.table(), file=sys.stderr)
    return members.code()


def _run(cfg: Any) -> int:
    """One run, which may be the member of a sweep. Returns the exit code."""
    from beit import run_folder, runner, sweep
    from beit.explain import explained

    try:
        with explained([]):
            metrics = runner.fit(cfg)
    except UserError as error:
        return _refuse(error)
    except exits.RunEnd as end:
        return _ended(end)
    if run_folder.is_first_process():
        sweep.write_result(metrics)
    return int(exits.Exit.DONE)


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
            if (
                not value
                or value.startswith("-")
                or (name in ("--cfg", "-c") and value not in ("job", "hydra", "all"))
            ):
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


def convert(arguments: list[str]) -> int:
    """Write weights in another layout, and print the table of what became of them."""
    usage = (
        "source=FILE_OR_FOLDER to=ours|timm|huggingface|unilm output=PATH [allow=NAME,NAME] "
        "[num_heads=N] [image_size=224 or 24x40] [normalize=half|imagenet] [norm_eps=1e-6] "
        "[classes=FILE]"
    )
    if _wants_help(arguments, "convert", usage):
        return 0
    keys = ("source", "to", "output", "allow", "num_heads", "image_size", "normalize", "norm_eps")
    own, rest = _split(arguments, (*keys, "classes"))
    if rest:
        raise UserError(f"{rest[0]!r} is not a setting of convert: expected {usage}")
    source, to, output = (_required(own, key) for key in keys[:3])
    given: dict[str, Any] = {"allow": [name for name in own.get("allow", "").split(",") if name]}
    if "num_heads" in own:
        given["num_heads"] = _whole_number(own, "num_heads", 0)
    if "image_size" in own:
        sides = own["image_size"].split("x")
        key = "image_size"
        given[key] = [_whole_number({key: side}, key, 0) for side in sides]
        given["image_size"] *= 2 if len(sides) == 1 else 1
    if "norm_eps" in own:
        given["norm_eps"] = _small_number(own, "norm_eps")
    if "classes" in own:
        given["classes"] = _lines(own["classes"])
    from rich.console import Console

    from beit import face

    report = face.convert(source, to, output, normalize=own.get("normalize"), **given)
    Console(stderr=True).print(report)
    print(output)
    return 0


def _small_number(settings: dict[str, str], key: str) -> float:
    try:
        value = float(settings[key])
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UserError(f"{key}={settings[key]}: expected a number between 0 and 1")
    return value


def _lines(path: str) -> list[str]:
    """The lines of a text file, one class name each."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"classes={path} cannot be read as text: {error}") from error


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
    "convert": convert,
}

if __name__ == "__main__":
    sys.exit(main())
