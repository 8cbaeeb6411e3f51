"""The networks: ours, transformers', timm's and the original, each as its library ships it.

All are BEiT+: relative position bias, LayerScale, stochastic depth.
- transformers: SDPA attention, the head on all patches, its own loss.
- timm: `timm.models.beit.Beit` has no mask token and no MIM head: its patch embedding, blocks and
  norm, a mask token put in between, a Linear on all patches whose masked rows are then selected.
  Attention is timm's default (SDPA).
- the original: from a checkout of microsoft/unilm; without one, timm's blocks with the attention
  written out and the head on the masked patches alone, as the released code has it.

Peers are imported where they are built: a process of one of them holds nothing of the others.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.models.heads import ClassificationHead, MIMHead
from beit.models.pyramid import FeaturePyramid
from beit.models.segmentation import FCNHead, UPerNetHead, resize
from beit.models.vit import VisionTransformer
from scripts.bench.settings import DROP_PATH, LAYER_SCALE, PATCH_SIZE, VOCAB_SIZE, Settings, Shape

CLASSES = 1000
SEGMENTATION_CLASSES, AUXILIARY_WEIGHT = 150, 0.4  # as in the released segmentation
CHECKPOINTED = "ours, activation checkpointing"


class OursMIM(nn.Module):
    def __init__(self, shape: Shape, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.backbone = _backbone(shape, pretraining=True)
        self.backbone.activation_checkpointing = checkpointing
        self.head = MIMHead(shape.width, VOCAB_SIZE)

    def forward(self, images: Tensor, mask: Tensor, token_ids: Tensor) -> Tensor:
        logits = self.head(self.backbone(images, mask), mask)
        return F.cross_entropy(logits.float(), token_ids[mask])


class TransformersMIM(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        import transformers

        config = _config(shape, use_mask_token=True, use_shared_relative_position_bias=True)
        self.model = transformers.BeitForMaskedImageModeling(config)

    def forward(self, images: Tensor, mask: Tensor, token_ids: Tensor) -> Tensor:
        return self.model(images, bool_masked_pos=mask.flatten(1), labels=token_ids[mask]).loss


class TimmMIM(nn.Module):
    def __init__(self, shape: Shape, *, as_the_original: bool = False) -> None:
        super().__init__()
        self.backbone = _timm(shape, num_classes=0, global_pool="", use_shared_rel_pos_bias=True)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.lm_head = nn.Linear(shape.width, VOCAB_SIZE)
        self.only_masked = as_the_original
        if as_the_original:
            for block in self.backbone.blocks:
                block.attn.fused_attn = False

    def forward(self, images: Tensor, mask: Tensor, token_ids: Tensor) -> Tensor:
        backbone, hidden = self.backbone, mask.flatten(1)
        x = backbone.patch_embed(images)
        weight = hidden.unsqueeze(-1).type_as(x)
        x = x * (1 - weight) + self.mask_token * weight
        x = torch.cat([backbone.cls_token.expand(len(x), -1, -1), x], dim=1)
        bias = backbone.rel_pos_bias()
        for block in backbone.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        x = backbone.norm(x)[:, 1:]
        logits = self.lm_head(x[hidden]) if self.only_masked else self.lm_head(x)[hidden]
        return F.cross_entropy(logits, token_ids[mask])


class UnilmMIM(nn.Module):
    """The released model itself."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        super().__init__()
        self.model = _unilm(folder)(
            img_size=shape.image_size,
            patch_size=PATCH_SIZE,
            vocab_size=VOCAB_SIZE,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.num_heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            init_values=LAYER_SCALE,
            drop_path_rate=DROP_PATH,
            use_abs_pos_emb=False,
            use_shared_rel_pos_bias=True,
        )

    def forward(self, images: Tensor, mask: Tensor, token_ids: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images, mask.flatten(1)), token_ids[mask])


class Classifier(nn.Module):
    """A network that yields logits (B, K), and the loss on them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(images), targets, label_smoothing=0.1)

    def logits(self, images: Tensor) -> Tensor:
        output = self.network(images)
        return getattr(output, "logits", output)  # transformers wraps them


class OursSegmentation(nn.Module):
    """The task's own loss, but for the mean over pixels in place of their sum."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.backbone = _backbone(shape, pretraining=False)
        self.pyramid = FeaturePyramid(width, taps=_taps(shape), patch_size=PATCH_SIZE)
        self.head = UPerNetHead(width, SEGMENTATION_CLASSES, channels=width)
        self.auxiliary = FCNHead(width, SEGMENTATION_CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        from beit.tasks.segmentation import pixel_loss

        tokens = self.backbone.forward_blocks(images, taps=self.pyramid.taps)
        maps = self.pyramid(tokens, self.backbone.grid)
        main, beside = (
            pixel_loss(resize(head(maps).float(), labels.shape[1:]), labels)
            for head in (self.head, self.auxiliary)
        )
        return (main + AUXILIARY_WEIGHT * beside) / labels.numel()


class TransformersSegmentation(nn.Module):
    """Reads the blocks that the released model does, which takes other indices than documented.

    Those of the documents leave the last two blocks without a gradient.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        import transformers

        config = _config(
            shape,
            use_relative_position_bias=True,
            num_labels=SEGMENTATION_CLASSES,
            auxiliary_loss_weight=AUXILIARY_WEIGHT,
        )
        # past its check, which knows no index of the last block
        config._out_indices = [tap + 2 for tap in _taps(shape)]
        self.model = transformers.BeitForSemanticSegmentation(config)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.model(images, labels=labels).loss


def mim(settings: Settings, shape: Shape) -> dict[str, Callable[[], nn.Module]]:
    """What builds each contender of the MIM step: (images, mask, token ids) -> loss."""
    folder = settings.unilm_folder
    if folder is not None and not why_not(folder):
        original = {"the original": partial(UnilmMIM, shape, folder)}
    else:
        written = partial(TimmMIM, shape, as_the_original=True)
        original = {"the original, written with timm's blocks": written}
    return {
        "ours": partial(OursMIM, shape),
        "transformers": partial(TransformersMIM, shape),
        "timm": partial(TimmMIM, shape),
        **original,
    }


def classification(shape: Shape) -> dict[str, Callable[[], Classifier]]:
    """What builds each classifier of 1,000 classes, with a bias table in each block."""
    return {
        "ours": lambda: Classifier(_ours_classifier(shape)),
        "transformers": lambda: Classifier(_transformers_classifier(shape)),
        "timm": lambda: Classifier(_timm(shape, num_classes=CLASSES, use_rel_pos_bias=True)),
    }


def segmentation(shape: Shape) -> dict[str, Callable[[], nn.Module]]:
    """What builds each contender of segmentation: (images, labels) -> loss."""
    return {
        "ours": partial(OursSegmentation, shape),
        "transformers": partial(TransformersSegmentation, shape),
    }


def original_note(settings: Settings) -> list[str]:
    """A line where the checkout that was named cannot be used."""
    folder = settings.unilm_folder
    reason = why_not(folder) if folder is not None else ""
    return [f"the checkout's model does not import with what is installed: {reason}"] * bool(reason)


def why_not(folder: Path) -> str:
    """Why the released model does not import; "" if it does."""
    try:
        _unilm(folder)
    except (ImportError, AttributeError, TypeError, SyntaxError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _unilm(folder: Path) -> Callable[..., nn.Module]:
    """The class of the released pretraining model; its modules import each other by plain names."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module("modeling_pretrain").VisionTransformerForMaskedImageModeling


def _backbone(shape: Shape, *, pretraining: bool) -> VisionTransformer:
    return VisionTransformer(
        shape.image_size,
        PATCH_SIZE,
        width=shape.width,
        depth=shape.depth,
        num_heads=shape.num_heads,
        absolute_position=False,
        relative_position="shared" if pretraining else "per_block",
        layer_scale=LAYER_SCALE,
        drop_path_rate=DROP_PATH,
        mask_token=pretraining,
        final_norm=pretraining,
        init_cut=0.02 if pretraining else 2.0,
    )


def _taps(shape: Shape) -> list[int]:
    """Blocks 4, 6, 8, 12 of 12, counted from 0, and as far into other depths."""
    parts = (shape.depth // 3, shape.depth // 2, 2 * shape.depth // 3, shape.depth)
    return [max(part, 1) - 1 for part in parts]


def _ours_classifier(shape: Shape) -> nn.Module:
    head = ClassificationHead(shape.width, CLASSES)
    return nn.Sequential(_backbone(shape, pretraining=False), head)


def _transformers_classifier(shape: Shape) -> nn.Module:
    import transformers

    config = _config(shape, use_relative_position_bias=True, num_labels=CLASSES)
    return transformers.BeitForImageClassification(config)


def _config(shape: Shape, **more: bool | int | float | list[int]):
    from transformers import BeitConfig

    return BeitConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.num_heads,
        intermediate_size=4 * shape.width,
        layer_norm_eps=1e-6,
        image_size=shape.image_size,
        patch_size=PATCH_SIZE,
        use_mean_pooling=True,  # False would normalise twice before the MIM head
        layer_scale_init_value=LAYER_SCALE,
        drop_path_rate=DROP_PATH,
        **more,
    )


def _timm(shape: Shape, **more: bool | int | str) -> nn.Module:
    from timm.models.beit import Beit

    return Beit(
        img_size=shape.image_size,
        patch_size=PATCH_SIZE,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.num_heads,
        use_abs_pos_emb=False,
        init_values=LAYER_SCALE,
        drop_path_rate=DROP_PATH,
        **more,
    )
