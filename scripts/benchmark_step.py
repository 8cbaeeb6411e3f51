"""Time a masked-image-modelling training step: ours, transformers and timm, in alternation.

    python scripts/benchmark_step.py                       # base, 224 px, batch 16, bf16, eager
    python scripts/benchmark_step.py --model tiny --batch-size 8 --rounds 3

One process, same images, masks, token ids, AdamW (fused) and drop path for all; a round times one
forward, backward and optimizer step of each contender, in an order that rotates, so that a busy
machine slows all alike. Contenders, each BEiT+ (shared relative bias, LayerScale, mask token):

    ours          beit.models: head on the masked patches only
    transformers  BeitForMaskedImageModeling as it ships: SDPA attention, head on all patches, its
                  own loss, labels given at the masked positions
    timm          timm.models.beit.Beit has no mask token and no MIM head: its patch embedding,
                  blocks and norm, a mask token put in between, a Linear on all patches whose
                  masked rows are then selected, cross-entropy. Attention is timm's default (SDPA)

Prints the median and the quartiles of the step, images/s, the ratio of the medians and of the
fastest steps, and the matrix-product ceiling of the machine measured in the same run. Where others
use the machine, the fastest steps say more than the medians.
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.models.beit import Beit
from torch import Tensor, nn

from beit.models.heads import MIMHead
from beit.models.vit import VisionTransformer

SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
IMAGE_SIZE, PATCH_SIZE, VOCAB_SIZE, DROP_PATH, LAYER_SCALE = 224, 16, 8192, 0.1, 0.1
GRID = IMAGE_SIZE // PATCH_SIZE
NUM_MASKED = 75


class Ours(nn.Module):
    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.backbone = VisionTransformer(
            IMAGE_SIZE,
            PATCH_SIZE,
            width=width,
            depth=depth,
            num_heads=num_heads,
            absolute_position=False,
            relative_position="shared",
            layer_scale=LAYER_SCALE,
            drop_path_rate=DROP_PATH,
            mask_token=True,
            final_norm=True,
            init_cut=0.02,
        )
        self.head = MIMHead(width, VOCAB_SIZE)

    def forward(self, images: Tensor, mask: Tensor, token_ids: Tensor) -> Tensor:
        logits = self.head(self.backbone(images, mask), mask)
        return F.cross_entropy(logits, token_ids[mask])


class Transformers(nn.Module):
    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        config = transformers.BeitConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            intermediate_size=4 * width,
            layer_norm_eps=1e-6,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            use_mask_token=True,
            use_shared_relative_position_bias=True,
            use_mean_pooling=True,  # False would normalise twice before the head
            layer_scale_init_value=LAYER_SCALE,
            drop_path_rate=DROP_PATH,
        )
        self.model = transformers.BeitForMaskedImageModeling(config)

    def forward(self, images: Tensor, mask: Tensor, token_ids: Tensor) -> Tensor:
        return self.model(images, bool_masked_pos=mask.flatten(1), labels=token_ids[mask]).loss


class Timm(nn.Module):
    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.backbone = Beit(
            img_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            num_classes=0,
            global_pool="",
            embed_dim=width,
            depth=depth,
            num_heads=num_heads,
            use_abs_pos_emb=False,
            use_shared_rel_pos_bias=True,
            init_values=LAYER_SCALE,
            drop_path_rate=DROP_PATH,
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.lm_head = nn.Linear(width, VOCAB_SIZE)

    def forward(self, images: Tensor, mask: Tensor, token_ids: Tensor) -> Tensor:
        backbone, hidden = self.backbone, mask.flatten(1)
        x = backbone.patch_embed(images)
        weight = hidden.unsqueeze(-1).type_as(x)
        x = x * (1 - weight) + self.mask_token * weight
        x = torch.cat([backbone.cls_token.expand(len(x), -1, -1), x], dim=1)
        bias = backbone.rel_pos_bias()
        for block in backbone.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        logits = self.lm_head(backbone.norm(x)[:, 1:])[hidden]
        return F.cross_entropy(logits, token_ids[mask])


CONTENDERS: dict[str, type[nn.Module]] = {"ours": Ours, "transformers": Transformers, "timm": Timm}


def draw_masks(batch_size: int, rng: np.random.Generator) -> Tensor:
    """Masks (B,14,14) with exactly 75 patches: random rectangles, the surplus uncovered again."""
    masks = np.zeros((batch_size, GRID, GRID), dtype=bool)
    for mask in masks:
        while mask.sum() < NUM_MASKED:
            height, width = rng.integers(3, 9, size=2)
            top, left = rng.integers(0, GRID - height), rng.integers(0, GRID - width)
            mask[top : top + height, left : left + width] = True
        surplus = rng.permutation(np.flatnonzero(mask))[NUM_MASKED:]
        mask.flat[surplus] = False
    return torch.from_numpy(masks)


def make_step(model: nn.Module, device: str, dtype: torch.dtype) -> Callable[..., float]:
    """A function that runs one step on a batch and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.05, fused=True)

    def step(images: Tensor, mask: Tensor, token_ids: Tensor) -> float:
        synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(images, mask, token_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        assert torch.isfinite(loss)
        return time.perf_counter() - start

    return step


def matmul_ceiling(device: str, dtype: torch.dtype, tokens: int, width: int) -> float:
    """Best TFLOP/s of the MLP's own product: (tokens, D) by (D, 4D)."""
    left = torch.randn(tokens, width, device=device, dtype=dtype)
    right = torch.randn(4 * width, width, device=device, dtype=dtype)
    seconds = []
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            F.linear(left, right)
        synchronize(device)
        seconds.append((time.perf_counter() - start) / 5)
    return 2 * tokens * 4 * width * width / min(seconds) / 1e12


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def report(seconds: dict[str, list[float]], batch_size: int) -> None:
    reference = seconds.get("ours", next(iter(seconds.values())))
    ours, fastest = statistics.median(reference), min(reference)
    print(
        f"{'':14}{'median s':>10}{'quartiles s':>18}{'images/s':>10}{'ratio':>9}"
        f"{'fastest s':>11}{'ratio':>9}"
    )
    for name, values in seconds.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        quartiles = f"{low:.3f} ... {high:.3f}"
        print(
            f"{name:14}{median:10.3f}{quartiles:>18}{batch_size / median:10.2f}"
            f"{median / ours:8.2f}x{min(values):11.3f}{min(values) / fastest:8.2f}x"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each contender")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of each before them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    device, batch_size = arguments.device, arguments.batch_size
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    width, depth, num_heads = SIZES[arguments.model]
    print(
        f"{arguments.model}, {IMAGE_SIZE} px, batch {batch_size}, {arguments.precision}, eager,"
        f" {arguments.threads} threads, {device}; torch {torch.__version__}, transformers"
        f" {transformers.__version__}, timm {timm.__version__}, {platform.machine()}"
    )
    tokens = batch_size * (GRID * GRID + 1)
    ceiling = matmul_ceiling(device, dtype, tokens, width)

    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    token_ids = torch.randint(VOCAB_SIZE, (batch_size, GRID, GRID), device=device)
    rng = np.random.default_rng(arguments.seed)
    steps = {
        name: make_step(CONTENDERS[name](width, depth, num_heads).to(device).train(), device, dtype)
        for name in arguments.only
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.warmup + arguments.rounds):
        mask = draw_masks(batch_size, rng).to(device)
        first = turn % len(steps)
        for name in [*steps][first:] + [*steps][:first]:
            gc.collect()
            elapsed = steps[name](images, mask, token_ids)
            if turn >= arguments.warmup:
                seconds[name].append(elapsed)
    report(seconds, batch_size)
    ceiling = max(ceiling, matmul_ceiling(device, dtype, tokens, width))
    print(f"matrix-product ceiling {ceiling:.2f} TFLOP/s ({arguments.precision}, {tokens} tokens)")


if __name__ == "__main__":
    main()
