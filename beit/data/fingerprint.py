"""Which data a run was trained on, in a few numbers: told apart cheaply, and wherever they lie.

No image is read and no file is looked at again: hashed are the names below the root, as the source
has them in memory (one block of bytes, also of 14 million files), the labels and the class names;
of parquet files their names, sizes and columns. The folder itself is left out, so data may move. A
photograph that was replaced under its own name is not noticed.
"""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import nn

from beit.data.sources import ImageSource


def of_source(source: ImageSource) -> dict[str, Any]:
    """Number of images, what the source says of itself, and a SHA-256 in hex."""
    return {"images": len(source), "source": repr(source), "sha256": _hash(source).hexdigest()}


def of_module(module: nn.Module) -> str:
    """SHA-256 of a network's weights, in hex: a frozen tokenizer makes the targets."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(memoryview(values.view(torch.uint8).numpy()))
    return found.hexdigest()


def _hash(source: ImageSource) -> Any:
    found = hashlib.sha256(f"{len(source)} {source.classes}\n".encode())
    if source.labels is not None:
        found.update(np.ascontiguousarray(source.labels, dtype=np.int64).tobytes())
    # optional in a source: what tells its images apart
    for block in getattr(source, "identity", list)():
        found.update(hashlib.sha256(block).digest())
    return found
