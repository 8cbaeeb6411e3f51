"""A tree of plain data and tensors as JSON text with the tensors beside it, and back, exactly.

Plain: None, bool, int, float, str, bytes, and dicts, lists and tuples of them. Anything else is
refused with its place in the tree; nothing is turned into something similar.
"""

import base64
import binascii
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from beit.errors import UserError

DEEPEST = 64
_TAG = "$"  # {"$tuple": [...]}: what JSON has no word for
_PLAIN_KEYS = (str, bool, int, float, type(None))
_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def split(tree: Any) -> tuple[str, dict[str, Tensor]]:
    """(JSON text, the tensors by name). The names are the keys that lead to them, with dots.

    Raises UserError for what is neither a tensor nor plain data.
    """
    tensors: dict[str, Tensor] = {}
    encoded = _encode(tree, (), tensors)
    try:
        return json.dumps(encoded, allow_nan=False, separators=(",", ":")), tensors
    except ValueError as error:  # a whole number of thousands of digits
        raise UserError(f"a checkpoint cannot hold this: {error}") from error


def join(text: str, tensor: Callable[[str], Any]) -> Any:
    """The tree again; `tensor` gives what stands for a tensor of that name.

    Raises ValueError for text that `split` did not write.
    """
    try:
        return _decode(json.loads(text), tensor)
    except (RecursionError, TypeError, KeyError, binascii.Error) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _encode(value: Any, place: tuple[Any, ...], tensors: dict[str, Tensor]) -> Any:
    if len(place) > DEEPEST:
        _refuse(place[:4], f"more than {DEEPEST} levels deep, or it holds itself")
    kind = type(value)
    if kind in (str, bool, int, type(None)):
        return value
    if kind is float:
        return value if math.isfinite(value) else {f"{_TAG}float": str(value)}
    if kind is bytes:
        return {f"{_TAG}bytes": base64.b64encode(value).decode()}
    if kind is list:
        return [_encode(item, (*place, i), tensors) for i, item in enumerate(value)]
    if kind is tuple:
        items = [_encode(item, (*place, i), tensors) for i, item in enumerate(value)]
        return {f"{_TAG}tuple": items}
    if kind in (dict, OrderedDict):  # a state_dict is an OrderedDict; its order is kept by both
        return _encode_dict(value, place, tensors)
    if kind in (Tensor, nn.Parameter):
        name, order = _add(value, place, tensors), _memory_order(value)
        return {f"{_TAG}tensor": [name, order] if order else name}
    _refuse(place, f"{kind.__module__}.{kind.__qualname__}")


def _encode_dict(value: dict[Any, Any], place: tuple[Any, ...], tensors: dict[str, Tensor]) -> Any:
    for key in value:
        if type(key) not in _PLAIN_KEYS:
            _refuse(place, f"a key of type {type(key).__qualname__}")
    items = {key: _encode(item, (*place, key), tensors) for key, item in value.items()}
    if all(type(key) is str and not key.startswith(_TAG) for key in items):
        return items
    return {f"{_TAG}dict": [[_encode(key, place, {}), item] for key, item in items.items()]}


def _add(tensor: Tensor, place: tuple[Any, ...], tensors: dict[str, Tensor]) -> str:
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        _refuse(place, f"a tensor of layout {tensor.layout} on {tensor.device}")
    name = plain_name = ".".join(str(key) for key in place) or "tensor"
    number = 1
    while name in tensors or name == "__metadata__":  # {"a.b": ...} beside {"a": {"b": ...}}
        number += 1
        name = f"{plain_name}~{number}"
    tensors[name] = tensor
    return name


def _memory_order(tensor: Tensor) -> list[int]:
    """The dimensions as they lie in memory, outermost first; empty for the usual order.

    Fused optimizers walk through a weight and its moments in the order of memory: moments that come
    back in another order than they had are those of other elements.
    """
    if tensor.is_contiguous():
        return []
    order = sorted(range(tensor.ndim), key=lambda dimension: -tensor.stride()[dimension])
    return order if tensor.permute(order).is_contiguous() else []


def _laid_out(tensor: Any, order: Any) -> Any:
    """A tensor in the order of memory that it had; anything else as it is."""
    if not order or not isinstance(tensor, Tensor):
        return tensor
    if sorted(order) != list(range(tensor.ndim)):
        raise ValueError(f"{order} is no order of {tensor.ndim} dimensions")
    back = sorted(range(tensor.ndim), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


def _decode(value: Any, tensor: Callable[[str], Any]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    key = next(iter(value), "")
    if not key.startswith(_TAG):
        return {key: _decode(item, tensor) for key, item in value.items()}
    if len(value) > 1:
        raise ValueError(f"{key} beside other keys")
    content = value[key]
    match key[len(_TAG) :]:
        case "float":
            return _NUMBERS[content]
        case "bytes":
            return base64.b64decode(content, validate=True)
        case "tuple":
            return tuple(_decode(item, tensor) for item in content)
        case "dict":
            return {_decode(k, tensor): _decode(item, tensor) for k, item in content}
        case "tensor":
            name, order = content if isinstance(content, list) else (content, [])
            return _laid_out(tensor(name), order)
    raise ValueError(f"{key} is not known")


def _refuse(place: tuple[Any, ...], what: str) -> NoReturn:
    where = ".".join(str(key) for key in place) or "the checkpoint itself"
    raise UserError(
        f"a checkpoint holds tensors and plain data only, and {where} is {what}: keep it out of "
        "the state, or turn it into numbers, strings, lists and dicts"
    )
