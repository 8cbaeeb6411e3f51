"""The released layout of segmentation models, written out: keys, shapes, and what it computes.

There is no package of theirs to install. Everything here is by hand and without beit.
"""

import torch
import torch.nn.functional as F

SCALES = (1, 2, 3, 6)


def segmentation_shapes(width, depth, heads, grid, classes, *, patch=16, auxiliary=256):
    """Key -> shape of a file with UPerNet and its auxiliary FCN; a bias table in each block."""
    tokens, rows = 1 + grid * grid, (2 * grid - 1) ** 2 + 3
    shapes = {
        "backbone.cls_token": (1, 1, width),
        "backbone.patch_embed.proj.weight": (width, 3, patch, patch),
        "backbone.patch_embed.proj.bias": (width,),
    }
    block = {
        "gamma_1": (width,),
        "gamma_2": (width,),
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.q_bias": (width,),
        "attn.v_bias": (width,),
        "attn.relative_position_bias_table": (rows, heads),
        "attn.relative_position_index": (tokens, tokens),
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
    }
    for i in range(depth):
        shapes |= {f"backbone.blocks.{i}.{key}": shape for key, shape in block.items()}
    for key in ("fpn1.0", "fpn1.3", "fpn2.0"):
        shapes |= {
            f"backbone.{key}.weight": (width, width, 2, 2),
            f"backbone.{key}.bias": (width,),
        }
    shapes |= _norm("backbone.fpn1.1", width)
    head = "decode_head."
    shapes |= {f"{head}conv_seg.weight": (classes, width, 1, 1), f"{head}conv_seg.bias": (classes,)}
    for i in range(len(SCALES)):
        shapes |= _convolution(f"{head}psp_modules.{i}.1", width, width, 1)
    shapes |= _convolution(f"{head}bottleneck", width, 5 * width, 3)
    for i in range(3):
        shapes |= _convolution(f"{head}lateral_convs.{i}", width, width, 1)
        shapes |= _convolution(f"{head}fpn_convs.{i}", width, width, 3)
    shapes |= _convolution(f"{head}fpn_bottleneck", width, 4 * width, 3)
    head = "auxiliary_head."
    shapes |= {
        f"{head}conv_seg.weight": (classes, auxiliary, 1, 1),
        f"{head}conv_seg.bias": (classes,),
    }
    return shapes | _convolution(f"{head}convs.0", auxiliary, width, 3)


def _convolution(name, out, inside, kernel):
    return {f"{name}.conv.weight": (out, inside, kernel, kernel)} | _norm(f"{name}.bn", out)


def _norm(name, width):
    four = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{key}": (width,) for key in four} | {f"{name}.num_batches_tracked": ()}


def segmentation_logits(t, blocks, grid, taps):
    """Logits at a quarter of the patch's stride and at the patch's, flat and one after the other.

    Args:
        t: the tensors of a file.
        blocks: tokens (B,1+N,D) after each block.
    """
    maps = [blocks[tap][:, 1:].transpose(1, 2).unflatten(2, grid) for tap in taps]
    maps[0] = F.gelu(_bn(t, "backbone.fpn1.1", _up(t, "backbone.fpn1.0", maps[0])))
    maps[0] = _up(t, "backbone.fpn1.3", maps[0])
    maps[1] = _up(t, "backbone.fpn2.0", maps[1])
    maps[3] = F.max_pool2d(maps[3], 2)

    head, pooled = "decode_head.", [maps[3]]
    for i, scale in enumerate(SCALES):
        small = _conv(t, f"{head}psp_modules.{i}.1", F.adaptive_avg_pool2d(maps[3], scale))
        pooled.append(_resized(small, maps[3]))
    levels = [_conv(t, f"{head}lateral_convs.{i}", maps[i]) for i in range(3)]
    levels.append(_conv(t, f"{head}bottleneck", torch.cat(pooled, 1)))
    for i in (2, 1, 0):
        levels[i] = levels[i] + _resized(levels[i + 1], levels[i])
    levels[:3] = [_conv(t, f"{head}fpn_convs.{i}", levels[i]) for i in range(3)]
    levels = [_resized(level, levels[0]) for level in levels]
    x = _conv(t, f"{head}fpn_bottleneck", torch.cat(levels, 1))
    main = F.conv2d(x, t[f"{head}conv_seg.weight"], t[f"{head}conv_seg.bias"])
    x = _conv(t, "auxiliary_head.convs.0", maps[2])
    beside = F.conv2d(x, t["auxiliary_head.conv_seg.weight"], t["auxiliary_head.conv_seg.bias"])
    return torch.cat([main.flatten(), beside.flatten()])


def _up(t, name, x):
    return F.conv_transpose2d(x, t[f"{name}.weight"], t[f"{name}.bias"], stride=2)


def _bn(t, name, x):
    mean, variance = t[f"{name}.running_mean"], t[f"{name}.running_var"]
    return F.batch_norm(x, mean, variance, t[f"{name}.weight"], t[f"{name}.bias"], eps=1e-5)


def _conv(t, name, x):
    weight = t[f"{name}.conv.weight"]
    return F.relu(_bn(t, f"{name}.bn", F.conv2d(x, weight, padding=weight.shape[-1] // 2)))


def _resized(x, like):
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
