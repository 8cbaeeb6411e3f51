"""beit: BERT pre-training of image Transformers, and what comes after it.

The Python face is one line per verb, and each line takes the words of the command line::

    beit.train("experiment=demo/pretrain", "seed=1")
    beit.evaluate("runs/demo/finetune/checkpoints/last.ckpt")
    beit.predict("runs/demo/finetune/checkpoints/last.ckpt", "photos/", top_k=3)
    model = beit.load_model("runs/demo/finetune/checkpoints/last.ckpt")
    model = beit.create_model("base", image_size=384)

Importing the package loads nothing heavy: torch and lightning come with the first call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beit.face import create_model, evaluate, load_model, predict, train

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "evaluate", "load_model", "predict", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("beit.face"), name)
    raise AttributeError(f"module 'beit' has no attribute {name!r}")
