"""Floating-point operations of the matrix products that a step needs, whoever does it.

A product of (m, k) by (k, n) has 2·m·k·n. Training counts three times the forward pass. What could
be left out is not counted: the branches that stochastic depth drops, the head where nothing is
masked. A contender that does them all the same reaches a smaller share of the ceiling.
"""

from scripts.bench.settings import DROP_PATH, PATCH_SIZE, VOCAB_SIZE, Shape


def mim_step(shape: Shape, masked: int) -> float:
    """Of a training step with `masked` patches an image."""
    head = masked * shape.width * VOCAB_SIZE
    return 3 * _forward(shape, head, kept=1 - DROP_PATH / 2)


def classification_step(shape: Shape, num_classes: int) -> float:
    return 3 * _forward(shape, shape.width * num_classes, kept=1 - DROP_PATH / 2)


def inference(shape: Shape, num_classes: int) -> float:
    return _forward(shape, shape.width * num_classes, kept=1.0)


def _forward(shape: Shape, head: int, *, kept: float) -> float:
    patches = shape.grid[0] * shape.grid[1]
    tokens, width = 1 + patches, shape.width
    embedding = patches * 3 * PATCH_SIZE**2 * width
    linear, attention = 12 * tokens * width**2, 2 * tokens**2 * width
    blocks = kept * shape.depth * (linear + attention)
    return 2 * shape.batch_size * (embedding + blocks + head)
