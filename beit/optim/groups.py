"""Parameter groups: which tensors decay, and how far layer-wise decay lowers the rate of each."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from beit.errors import UserError

NO_DECAY_NAMES = ("pos_embed", "cls_token")  # not mask_token, not the bias tables


def layer_id(name: str, depth: int) -> int:
    """Layer of a backbone's parameter: 0 the embeddings, i+1 block i, depth+1 everything else.

    "Everything else" holds the shared relative bias and the final norm; heads belong there too.
    """
    first, _, rest = name.partition(".")
    if first in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    if first == "blocks":
        return int(rest.partition(".")[0]) + 1
    return depth + 1


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """False for vectors, biases, `pos_embed`, `cls_token`; True for matrices and tables."""
    is_vector = parameter.ndim <= 1 or name.endswith(".bias")
    return not is_vector and name.rpartition(".")[2] not in NO_DECAY_NAMES


def parameter_groups(
    modules: Mapping[str, nn.Module],
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    depth: int = 0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, each with `name`, `param_names`, `weight_decay`, `lr_scale`.

    The parameters of `modules["backbone"]` belong to layers 0 ... depth+1, those of all other
    modules to depth+1; the rate of layer l is scaled by layer_decay ** (depth+1-l). Frozen
    parameters are left out; a parameter shared by two modules is taken once.

    Args:
        modules: a task's parts by name, for instance `{"backbone": ..., "head": ...}`.
        layer_decay: 1.0 is off; 0.65 to 0.9 in the paper's fine-tuning.
        depth: blocks of the backbone; only read when `layer_decay` isn't 1.

    Raises:
        UserError: layer decay without a backbone or depth, nothing to train.
    """
    if layer_decay != 1.0 and ("backbone" not in modules or depth < 1):
        raise UserError(
            f"layer_decay {layer_decay} needs a backbone and its depth, not modules"
            f" {list(modules)} and depth {depth}; set layer_decay to 1.0"
        )
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    seen: set[int] = set()
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            layer = depth + 1
            if layer_decay != 1.0 and module_name == "backbone":
                layer = layer_id(name, depth)
            decays = has_weight_decay(name, parameter)
            group = groups.setdefault(
                (layer, decays),
                {
                    "name": _group_name(layer, decays, layer_decay),
                    "params": [],
                    "param_names": [],
                    "weight_decay": weight_decay if decays else 0.0,
                    "lr_scale": layer_decay ** (depth + 1 - layer),
                },
            )
            group["params"].append(parameter)
            group["param_names"].append(f"{module_name}.{name}")
    if not groups:
        raise UserError(f"nothing to train: no parameter of {list(modules)} requires a gradient")
    _check_complete(modules, groups)
    return [groups[key] for key in sorted(groups)]


def _group_name(layer: int, decays: bool, layer_decay: float) -> str:
    kind = "decay" if decays else "no_decay"
    return kind if layer_decay == 1.0 else f"layer_{layer:02d}/{kind}"


def _check_complete(
    modules: Mapping[str, nn.Module], groups: Mapping[tuple[int, bool], dict[str, Any]]
) -> None:
    wanted = {id(p) for m in modules.values() for p in m.parameters() if p.requires_grad}
    taken = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(taken) == sorted(wanted), "a parameter lost or doubled"
