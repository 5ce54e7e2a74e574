"""The header of a safetensors file, read at least as strictly as by safetensors itself, and without its numbers."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadCheckpoint

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
LARGEST = 100_000_000  # bytes of a header, safetensors' own limit
_LIMIT = 2**63  # sizes and offsets are below it


@dataclass(frozen=True)
class Stored:
    """A tensor as a header describes it. dtype: safetensors' name of it. file: where it lies."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)


def read_stored(file: Path) -> dict[str, Stored]:
    """Tensor name -> what is stored; BadCheckpoint unless the file is exactly as its header says.

    The tensors lie one behind the other from the header's end to the file's end, none is described twice, and every
    type is known.
    """
    if not file.is_file():
        raise BadCheckpoint(f"{file} is no ordinary file")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                raise BadCheckpoint(f"{file} is truncated: its {size} bytes end before its header does")
            if length > LARGEST:
                raise BadCheckpoint(f"{file} has a header of {length} bytes; safetensors allows {LARGEST}")
            header = stream.read(length)
    except OSError as error:
        raise BadCheckpoint(f"{file} cannot be read: {error}") from None
    try:
        stored, end = _parsed(header, file)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{file} has a damaged header: {str(error)[:200]}") from None
    if 8 + length + end != size:
        state = "truncated" if size < 8 + length + end else "too long"
        raise BadCheckpoint(f"{file} is {state}: it has {size} bytes, and its header describes {8 + length + end}")
    return stored


def _parsed(header: bytes, file: Path) -> tuple[dict[str, Stored], int]:
    """The tensors, and how many bytes they take together."""
    if not header.startswith(b"{"):
        raise ValueError("it is no JSON object")
    entries = json.loads(header.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ should hold texts")
    stored: dict[str, Stored] = {}
    places = []
    for name, entry in entries.items():
        name.encode("utf-8")  # half of a surrogate pair is no text
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r} should have dtype, shape and data_offsets")
        shape, offsets = _sizes(entry["shape"], name), _sizes(entry["data_offsets"], name)
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in BITS:
            raise ValueError(f"{name!r} is of the unknown type {entry['dtype']!r}")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise ValueError(f"{name!r} has the data_offsets {list(offsets)}")
        (start, stop), bits = offsets, math.prod(shape) * BITS[entry["dtype"]]
        if bits != (stop - start) * 8:
            raise ValueError(
                f"it gives {name!r} {stop - start} bytes, but {entry['dtype']} {list(shape)} takes {-(-bits // 8)}"
            )
        stored[name] = Stored(entry["dtype"], shape, file)
        places.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(places):
        if start != end:
            raise ValueError(f"{name!r} begins at byte {start}, and what lies before it ends at {end}")
        end = stop
    return stored, end


def _sizes(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 64 or not all(type(n) is int and 0 <= n < _LIMIT for n in value):
        raise ValueError(f"{name!r} has sizes or offsets that are no list of whole numbers from 0")
    return tuple(value)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")
