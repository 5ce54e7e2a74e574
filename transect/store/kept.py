"""Files that are read back later: each carries what it belongs to, and a checksum.

One that belongs to something else, or is damaged, is never used: who asks for it gets None, and a note says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import BadCheckpoint
from .text import in_short, read_json
from .write import replacing, write_text

logger = logging.getLogger(__name__)
_OF, _NOTE, _SUM = "transect.of", "transect.note", "transect.checksum"


class Kept(Mapping[str, Tensor]):
    """Tensors of a file that was checked; each is read when it is asked for. note: what was kept with them."""

    def __init__(self, path: Path, note: Any) -> None:
        self.note = note
        self._file = safe_open(path, "pt")
        self._names = sorted(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def keep(path: Path, tensors: Mapping[str, Tensor], of: str, note: Any = None) -> None:
    """Write tensors as safetensors. of: names all that decides the numbers; note: JSON that goes with them."""
    stored, places = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if place in places else tensor  # safetensors refuses what shares memory
        places.add(place)
    written = json.dumps(note)
    marks = {"format": "pt", _OF: of, _NOTE: written, _SUM: _checksum(of, written, sorted(stored.items()))}
    with replacing(path) as partial:
        save_file(stored, partial, metadata=marks)
        _put_in_order(partial)


def _put_in_order(path: Path) -> None:
    """safetensors writes the marks in an order of chance; here what is the same is the same file."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= length:
            file.seek(8)
            file.write(ordered.ljust(length))


def kept(path: Path, of: str) -> Kept | None:
    """What `keep` wrote of the same thing; None if there is nothing, or it is of something else, or damaged."""
    if not os.path.lexists(path):
        return None
    try:
        return verified(path, of)
    except BadCheckpoint as error:
        return _unused(path, str(error))


def verified(path: Path, of: str) -> Kept:
    """As `kept`, for what cannot be computed anew: BadCheckpoint says why it is not used."""
    try:
        if not path.is_file():  # a named pipe would be waited for
            raise BadCheckpoint("it is not a file")
        with safe_open(path, "pt") as file:
            marks = dict(file.metadata() or {})
            if marks.get(_OF) != of:
                raise BadCheckpoint("it is of something else")
            tensors = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
            if marks.get(_SUM) != _checksum(of, marks[_NOTE], tensors):
                raise BadCheckpoint("its checksum is wrong")
        return Kept(path, json.loads(marks[_NOTE]))
    except BadCheckpoint:
        raise
    except Exception as error:  # safetensors, JSON and the file system have an exception each
        raise BadCheckpoint(f"it is damaged ({in_short(error)})") from error


def carries_mark(path: Path, kind: str) -> bool:
    """Whether `keep` wrote the file, with an `of` and a note that name this kind, however damaged it is by now.

    An empty file counts, since nothing is lost with it.
    """
    if not path.is_file():  # a named pipe would be waited for
        return False
    with path.open("rb") as file:
        head = file.read(2**16)
    return not head or (b"\0" in head[:8] and b'"transect.' in head and kind.encode() in head)  # no text begins with 0


def keep_json(path: Path, value: Mapping[str, Any], of: str) -> None:
    """Write a JSON object, with what it belongs to and a checksum under two keys of our own."""
    text = json.dumps(value, sort_keys=True)
    write_text(path, json.dumps({**value, _OF: of, _SUM: _checksum(of, text, ())}, indent=2) + "\n")


def kept_json(path: Path, of: str) -> dict[str, Any] | None:
    """What `keep_json` wrote of the same thing; None as for `kept`."""
    if not os.path.lexists(path):
        return None
    try:
        return verified_json(path, of)
    except BadCheckpoint as error:
        return _unused(path, str(error))


def verified_json(path: Path, of: str) -> dict[str, Any]:
    """As `kept_json`, for what cannot be computed anew: BadCheckpoint says why it is not used."""
    try:
        marked = read_json(path)
        value = without_marks(marked)
        if marked.get(_OF) != of:
            raise BadCheckpoint("it is of something else")
        if marked.get(_SUM) != _checksum(of, json.dumps(value, sort_keys=True), ()):
            raise BadCheckpoint("its checksum is wrong")
        return value
    except BadCheckpoint:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"it is damaged ({in_short(error)})") from error


def without_marks(value: Mapping[str, Any]) -> dict[str, Any]:
    """What was given to `keep_json`, of what its file holds; neither mark is looked at."""
    return {key: entry for key, entry in value.items() if key not in (_OF, _SUM)}


def _unused(path: Path, why: str) -> None:
    logger.info("%s is not used, since %s: it is computed anew", path, why)


def _checksum(of: str, note: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in (of, note):
        digest.update(f"{len(text)};{text}".encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The numbers of a tensor as they are stored, for a hash; not copied where they lie in order on the CPU."""
    data = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))  # one number may have any stride
    return data.view(torch.uint8).numpy().data if data.numel() else b""
