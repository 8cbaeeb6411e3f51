"""The whole chain on scikit-learn's handwritten digits: minutes on two cores, no download.

Trains a tokenizer, pretrains a small ViT by masked image modelling, fine-tunes it on a few
labelled digits, trains the same network from scratch on the same few, and compares the two.

    python scripts/demo.py [--runs-dir runs] [--seed 0]
"""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import beit
from beit.errors import UserError

STAGES = {
    "tokenizer": "a discrete VAE learns 8x8 visual tokens",
    "pretrain": "the ViT predicts the tokens of hidden patches, no labels",
    "finetune": "the pretrained ViT learns the classes from 10 scans of each digit",
    "scratch": "the same ViT, the same 100 scans, no pretraining",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs-dir", default="runs", help="where demo/STAGE is written")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console()
    results = {}
    for number, (stage, purpose) in enumerate(STAGES.items(), start=1):
        console.rule(f"{number} of {len(STAGES)}: {stage}, {purpose}")
        start = time.perf_counter()
        try:
            metrics = beit.train(
                f"experiment=demo/{stage}",
                f"paths.runs_dir={options.runs_dir}",
                f"seed={options.seed}",
            )
        except UserError as error:
            console.print(f"demo: error: {error}", style="red", highlight=False)
            return 2
        results[stage] = metrics, time.perf_counter() - start
    console.print(_table(results))
    pictures = sorted(Path(options.runs_dir, "demo").rglob("figures/*.png"))
    console.print("pictures:", *[f"  {path}" for path in pictures], sep="\n")
    console.print(f"curves: tensorboard --logdir {Path(options.runs_dir, 'demo')}")
    return 0


def _table(results: dict[str, tuple[dict[str, float], float]]) -> Table:
    table = Table(title="100 labelled digits, 360 to recognise")
    for column in ("stage", "measure", "value", "seconds"):
        table.add_column(column, justify="left" if column in ("stage", "measure") else "right")
    rows = [
        ("tokenizer", "codes used", "val/used_share", "{:.0%}"),
        ("pretrain", "hidden tokens predicted", "val/mim_acc", "{:.1%}"),
        ("pretrain", "  always the commonest", "val/commonest_token_acc", "{:.1%}"),
        ("finetune", "accuracy, pretrained", "val/acc1", "{:.1%}"),
        ("scratch", "accuracy, from scratch", "val/acc1", "{:.1%}"),
    ]
    for stage, measure, key, form in rows:
        metrics, seconds = results[stage]
        table.add_row(stage, measure, form.format(metrics[key]), f"{seconds:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
