"""beit: BERT pre-training of image Transformers, and what comes after it.

The Python face is one line per verb, and each line takes the words of the command line::

    beit.train("experiment=demo/pretrain", "seed=1")
    beit.tokenize("experiment=demo/pretrain", "views_per_image=4", "token_cache=runs/tokens")
    beit.evaluate("runs/demo/finetune/checkpoints/last.safetensors")
    beit.predict("runs/demo/finetune/checkpoints/last.safetensors", "photos/", top_k=3)
    model = beit.load_model("runs/demo/finetune/checkpoints/last.safetensors")
    model = beit.create_model("base", image_size=384)
    beit.convert("beit_base_patch16_224_pt22k.pth", "huggingface", "beit-base")

Importing the package loads nothing heavy: torch and lightning come with the first call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beit.face import convert, create_model, evaluate, load_model, predict, tokenize, train

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "convert",
    "create_model",
    "evaluate",
    "load_model",
    "predict",
    "tokenize",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import_module("beit.security.telemetry").switch_off()  # the libraries read it as they start
        return getattr(import_module("beit.face"), name)
    raise AttributeError(f"module 'beit' has no attribute {name!r}")
