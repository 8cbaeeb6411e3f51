"""The `beit` command: one verb, one function. Imports nothing heavy until a verb needs it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beit import __version__
from beit.errors import UserError
from beit.job import exits
from beit.words import (
    asks_help,
    flag,
    is_sweep,
    lines_of,
    new_file,
    required,
    sink,
    small_number,
    split,
    split_all,
    split_flags,
    split_known,
    whole_number,
    whole_numbers,
)

_HELP = f"""beit {__version__}: BERT pre-training of image Transformers

usage: beit VERB [KEY=VALUE ...]

  train      train a tokenizer, pretrain or fine-tune
               beit train experiment=demo/pretrain
               beit train task=classification model=base data=folder paths.data_dir=photos \\
                 batch.global_size=1024 batch.per_device=64 trainer.max_epochs=100
               beit train experiment=demo/finetune seed=0,1,2 -m          (a sweep)
  doctor     examine a run before it: batch and rate, data, memory, time, disk, precision
               beit doctor experiment=demo/pretrain [steps=10]
  tokenize   fill the token cache of a pretraining ahead of it
               beit tokenize experiment=demo/pretrain views_per_image=4 token_cache=runs/tokens
  evaluate   validate the weights of a checkpoint
               beit evaluate checkpoint=runs/x/checkpoints/last.safetensors [KEY=VALUE ...]
             or what its frozen backbone knows: linear probe, k-NN, health
               beit evaluate checkpoint=runs/x/checkpoints/last.safetensors \\
                 evaluation=linear_probe data=folder paths.data_dir=labelled output=runs/x/probe
  gather     the runs of a sweep as one table and plot
               beit gather folder=runs/sweeps/table4
  predict    classify image files or a folder, as JSON lines; or segment them, into a folder
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
    if is_sweep(arguments):  # it asks its members to stop
        return _train(arguments)
    with signals.handled(ends_process=True):
        return _train(arguments)


def _train(arguments: list[str]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from beit import config, planned, sweep
    from beit.console import log_to_console
    from beit.explain import explained, train_help

    if asks_help(arguments):
        print(train_help())
        return 0

    words, flags = split_flags(arguments)
    members = sweep.Sweep(flags) if is_sweep(flags) else None
    if members is None and not sweep.is_member():
        config.refuse_sweep(words)
    config.register()
    log_to_console()
    codes: list[int] = []
    mistakes: list[UserError] = []
    typed = sys.argv

    def one(member: Any, cfg: DictConfig, space: dict[str, Any]) -> float | None:
        assert members is not None
        try:
            return None if mistakes else planned.run(members, member, cfg, space)
        except UserError as error:  # Hydra would add a line of its own
            mistakes.append(error)
            return None

    def run(cfg: DictConfig) -> float | None:
        if members is not None:
            job = HydraConfig.get()
            member = sweep.Member(job.job.num, _as_typed(job), str(job.runtime.output_dir))
            return one(member, cfg, dict(job.sweeper.params or {}))
        sys.argv = typed  # Lightning starts the other ranks with these words
        codes.append(_run(cfg, _as_typed(HydraConfig.get())))
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
    if mistakes:
        raise mistakes[0]
    if members.members:
        planned.gathered(members)
        print(members.table(), file=sys.stderr)
    return members.code()


def _as_typed(job: Any) -> list[str]:
    """The words of a run; what they take from the environment, a secret perhaps, is not put in."""
    from omegaconf import OmegaConf

    words: Any = OmegaConf.to_container(job.overrides.task, resolve=False)
    return words


def _run(cfg: Any, words: list[str]) -> int:
    """One run, which may be the member of a sweep. Returns the exit code."""
    from beit import run_folder, runner, sweep
    from beit.explain import explained

    cfg.sweep = None  # of the sweep that this run belongs to
    try:
        with explained([]):
            metrics = runner.fit(cfg, words)
    except UserError as error:
        return _refuse(error)
    except exits.RunEnd as end:
        return _ended(end)
    if run_folder.is_first_process():
        sweep.write_result(metrics)
    return int(exits.Exit.DONE)


def doctor(arguments: list[str]) -> int:
    """Print what is found of the run that these words would begin; 1 where it could not be."""
    usage = "[steps=N] [KEY=VALUE of beit train ...]; steps=N times so many micro-batches"
    if _helped(arguments, "doctor", usage):
        return 0
    own, overrides = split(arguments, ("steps",))
    steps = whole_number(own, "steps") if "steps" in own else 0
    from beit import doctor
    from beit.preflight import findings

    found = doctor.examine(overrides, steps=steps)
    findings.print_findings(found)
    return int(findings.failed(found))


def tokenize(arguments: list[str]) -> int:
    """Fill a token cache, and print how many views it took as one JSON line."""
    import json

    usage = "views_per_image=K token_cache=FOLDER [KEY=VALUE of beit train ...]"
    if _helped(arguments, "tokenize", usage):
        return 0
    from beit import face, run_folder

    counts = face.tokenize(*arguments)
    if run_folder.is_first_process():
        print(json.dumps(counts))
    return 0


def evaluate(arguments: list[str]) -> int:
    """Print metrics of a checkpoint as one JSON line; classes, or layers, as a table."""
    import json

    from beit.console import log_to_console

    if asks_help(arguments):
        from beit.explain import evaluate_help

        print(evaluate_help())
        return 0
    own, overrides = split(arguments, ("checkpoint", "output", "overwrite"))
    log_to_console()
    from beit import face, sweep
    from beit.run_folder import is_first_process

    options: dict[str, Any] = {"output": own.get("output"), "overwrite": flag(own, "overwrite")}
    metrics = face.evaluate(required(own, "checkpoint"), *overrides, **options)
    if not is_first_process():  # the other ranks run the same command, and have the same metrics
        return 0
    sweep.write_result({key: x for key, x in metrics.items() if isinstance(x, int | float)})
    print(json.dumps(metrics))
    if rows := metrics.get("per_class") or metrics.get("rows"):
        from beit.console import print_table

        print_table(rows)
    return 0


def gather(arguments: list[str]) -> int:
    """Write the runs of a sweep as one table, and print the files' names."""
    usage = "folder=SWEEP [metrics=NAME,NAME]"
    if _helped(arguments, "gather", usage):
        return 0
    own = split_all(arguments, ("folder", "metrics"), "gather", usage)
    from beit import gathering

    metrics = [name for name in own.get("metrics", "").split(",") if name]
    table = gathering.gather(Path(required(own, "folder")), metrics=metrics)
    print(table.markdown(), file=sys.stderr)
    print(*table.written, sep="\n")
    return 0


def predict(arguments: list[str]) -> int:
    """Print one JSON line per image, or write them to output=FILE; pictures to output=FOLDER."""
    import json

    from beit.console import log_to_console

    usage = (
        "checkpoint=PATH images=FILE_OR_FOLDER [top_k=5] [batch_size=32] [output=FILE] "
        "[device=auto], or of a segmentation output=FOLDER [overwrite=true] "
        "[inference=whole|sliding|multiscale]"
    )
    if _helped(arguments, "predict", usage):
        return 0
    keys = ("checkpoint", "images", "top_k", "batch_size", "output", "overwrite", "device")
    groups = ("inference", "views", "model")
    own, changes = split_known(arguments, keys, groups, "predict", usage)
    log_to_console()
    checkpoint, images = required(own, "checkpoint"), required(own, "images")
    options: dict[str, Any] = {
        "top_k": whole_number(own, "top_k", 5),
        "batch_size": whole_number(own, "batch_size", 32),
        "overwrite": flag(own, "overwrite"),
    }
    from beit.predictor import open_predictor

    predictor = open_predictor(checkpoint, changes, device=own.get("device", "auto"))
    output = None if predictor.makes_files else new_file(own, "output")
    folder = own.get("output") if predictor.makes_files else None
    lines = predictor.predict(images, output=folder, **options)
    with sink(output) as stream:
        for line in lines:
            print(json.dumps(line), file=stream)
    return 0


def convert(arguments: list[str]) -> int:
    """Write weights in another layout, and print the table of what became of them."""
    usage = (
        "source=FILE_OR_FOLDER to=ours|timm|huggingface|unilm output=PATH [allow=NAME,NAME] "
        "[num_heads=N] [image_size=224 or 24x40] [normalize=half|imagenet] [norm_eps=1e-6] "
        "[classes=FILE] [taps=3,5,7,11]"
    )
    if _helped(arguments, "convert", usage):
        return 0
    paths = ("source", "to", "output")
    told = ("allow", "num_heads", "image_size", "normalize", "norm_eps", "classes", "taps")
    own = split_all(arguments, (*paths, *told), "convert", usage)
    source, to, output = (required(own, key) for key in paths)
    given: dict[str, Any] = {"allow": [name for name in own.get("allow", "").split(",") if name]}
    if "num_heads" in own:
        given["num_heads"] = whole_number(own, "num_heads")
    if "image_size" in own:
        sides = own["image_size"].split("x")
        numbers = [whole_number({"image_size": side}, "image_size") for side in sides]
        given["image_size"] = numbers * (2 if len(sides) == 1 else 1)
    if "norm_eps" in own:
        given["norm_eps"] = small_number(own, "norm_eps")
    if "classes" in own:
        given["classes"] = lines_of(own, "classes")
    if "taps" in own:
        given["taps"] = whole_numbers(own, "taps")
    from rich.console import Console

    from beit import face

    report = face.convert(source, to, output, normalize=own.get("normalize"), **given)
    Console(stderr=True).print(report)
    print(output)
    return 0


def _helped(arguments: list[str], verb: str, usage: str) -> bool:
    if asked := asks_help(arguments):
        print(f"usage: beit {verb} {usage}")
    return asked


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "doctor": doctor,
    "tokenize": tokenize,
    "evaluate": evaluate,
    "gather": gather,
    "predict": predict,
    "convert": convert,
}

if __name__ == "__main__":
    sys.exit(main())
