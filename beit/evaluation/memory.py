"""Whether a forward pass can fit into memory, told in a line before it is tried."""

import contextlib
from collections.abc import Iterator

import torch

from beit.errors import UserError
from beit.memory import free_memory
from beit.models.vit import VisionTransformer
from beit.sizes import patch_grid

_MEND = (
    "choose fewer inference.windows_per_pass, a smaller window (model.image_size), or sliding "
    "windows for the whole image"
)


def check_forward(
    backbone: VisionTransformer, size: tuple[int, int], batch: int, device: torch.device
) -> None:
    """Raises UserError where a batch of images of `size` cannot fit into what memory is free.

    By the attention of a single block alone, so what is refused would not have fitted; what passes
    may still not.
    """
    height, width = patch_grid(size, backbone.patch_size)
    needed = attention_bytes(height * width + 1, backbone.num_heads, batch, device)
    free = free_bytes(device) if needed > 2**28 else None
    if free is not None and needed > free:
        raise UserError(
            f"{_named(size, batch)}: attention alone needs {needed / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} GiB are free ({device}); {_MEND}"
        )


def attention_bytes(tokens: int, heads: int, batch: int, device: torch.device) -> int:
    """The least that the attention of a block takes."""
    bias = 4 * heads * tokens**2
    # the scores exist only where attention is not fused (see `beit.models.layers`); in bf16 twice,
    # as they are and as probabilities
    scores = 4 * batch * heads * tokens**2 if device.type == "cpu" else 0
    return bias + scores


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return free_memory() if device.type == "cpu" else None


@contextlib.contextmanager
def told_if_memory_ends(size: tuple[int, int], batch: int) -> Iterator[None]:
    """Within it, an allocation that fails becomes a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(f"{_named(size, batch)}: memory is exhausted; {_MEND}") from error


def _named(size: tuple[int, int], batch: int) -> str:
    return f"{batch} window{'s' if batch > 1 else ''} of {size[0]}x{size[1]} px in one pass"


def _is_out_of_memory(error: Exception) -> bool:
    # the CPU's allocator raises a plain RuntimeError
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate" in text
