"""The header of a checkpoint file: the plain data, the checksums, and where each tensor lies.

What an older version must be able to tell of a newer file stays as it is: the four entries of the
metadata, and the checksum over them.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from beit.checkpoints.errors import DamagedCheckpoint, NewerSchema

SCHEMA = 1  # raised by whatever an older version could not read
SUFFIX = ".safetensors"
HEADER_LIMIT = 32 * 2**20  # bytes; a base-size run's header is about 0.2 MB
KEYS = ("beit.schema", "beit.tree", "beit.digests", "beit.digest")
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies in the file, and what it must be."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    end: int
    digest: str


def written_header(text: str, tensors: dict[str, Tensor], digests: dict[str, str]) -> bytes:
    table = json.dumps(digests, separators=(",", ":"))
    content: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",  # what other readers look for
            "beit.schema": str(SCHEMA),
            "beit.tree": text,
            "beit.digests": table,
            "beit.digest": _digest_of_rest(str(SCHEMA), text, table),
        }
    }
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        content[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    encoded = json.dumps(content, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % 8)


def read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """(the header as JSON, where the tensors begin); nothing large is read or parsed unchecked."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    fits = len(first) == 8 and 2 <= length <= size - 8
    # the length of a header may begin with the same bytes: one in 32 does
    if not fits and first.startswith((b"PK", b"\x80")):
        raise DamagedCheckpoint(
            f"{path} is a file of torch.save or pickle, which may hold code, and was not opened: "
            f"checkpoints are {SUFFIX} files"
        )
    if not fits:
        raise damaged(path, "it is cut short, or no checkpoint at all")
    if length > HEADER_LIMIT:
        raise damaged(path, f"its header claims {length} bytes; {HEADER_LIMIT} are allowed")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise damaged(path, "its header cannot be read") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header cannot be read")
    return header, 8 + length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def checked_metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not all(
        isinstance(metadata.get(key), str) for key in KEYS
    ):
        raise DamagedCheckpoint(
            f"{path} is not a checkpoint of beit, or a damaged one: its header has no "
            f"{' or '.join(KEYS)}"
        )
    schema, text, digests, digest = (metadata[key] for key in KEYS)
    if digest != _digest_of_rest(schema, text, digests):
        raise damaged(path, "the data beside the tensors are not those that were written")
    if not schema.isdecimal() or len(schema) > 9 or int(schema) > SCHEMA:
        raise NewerSchema(
            f"{path} was written by a newer version of beit (schema {schema[:9]}; this one reads "
            f"up to {SCHEMA}): update beit"
        )
    return metadata


def read_entries(header: dict[str, Any], digests: Any, start: int) -> dict[str, Entry]:
    """What the header says of each tensor. Raises ValueError, TypeError or KeyError."""
    names = [name for name in header if name != "__metadata__"]
    if not isinstance(digests, dict) or sorted(digests) != sorted(names):
        raise ValueError("the tensors are not those with a checksum")
    entries = {}
    for name in names:
        dtype, shape, (begin, end) = (header[name][k] for k in ("dtype", "shape", "data_offsets"))
        numbers = [*shape, begin, end]
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            raise ValueError(f"impossible numbers for {name}")
        if math.prod(max(side, 1) for side in shape) >= 2**62 or len(shape) > 64:
            raise ValueError(f"an impossible shape for {name}")
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{name} has another size than its shape says")
        entries[name] = Entry(dtype, tuple(shape), start + begin, start + end, digests[name])
    return entries


def check_places(entries: dict[str, Entry], start: int, size: int) -> None:
    """Each byte of the file belongs to one tensor."""
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != start:
            raise ValueError("tensors overlap or leave gaps")
        start = entry.end
    if start != size:
        raise ValueError(f"the file has {size} bytes and should have {start}")


def digest_of(name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[memoryview]) -> str:
    found = hashlib.sha256(json.dumps([name, dtype, list(shape)]).encode() + b"\n")
    for chunk in chunks:
        found.update(chunk)
    return found.hexdigest()


def _digest_of_rest(schema: str, text: str, digests: str) -> str:
    return hashlib.sha256(json.dumps([schema, text, digests]).encode()).hexdigest()


def damaged(path: Path, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"{path} is damaged: {what}; use another checkpoint (resume=auto looks for one) or copy "
        "this one again"
    )
