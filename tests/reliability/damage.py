"""Good model folders, and every kind of damage that can be done to one: what the loader is tried on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from transect.checkpoint import open_model, save
from transect.errors import TransectError
from transect.parts import build_model

from ..models import VOCABULARY, tiny
from ..test_checkpoint import change, tokenizer

# What JSON may hold where something else is expected.
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 65, 2**17 + 1, 2**31, 2**40, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "__class__", "../x", "/etc/passwd", "a\0b", "\ud800", "é" * 300, [], [0], [[]], [1, 2],
    ["x"], [None], {}, {"x": 1}, {"kind": "linear"}, {"": {}},
]  # fmt: skip


def good_folders(root: Path) -> list[Path]:
    """One whose config says it all; one with a structure record, in shards; one with parts in its slots."""
    save(tiny("llama"), root / "plain", tokenizer())
    save(change(tiny("llama")), root / "recorded", tokenizer(), max_shard_size="20KB")
    parts = {"mixer": "hopfield", "mlp": "hopfield", "norm": "layer", "matrix": "memoryformer", "block": "ultramem-v2"}
    sizes = dict(hidden=16, blocks=2, heads=2, neurons=24, vocabulary=VOCABULARY, length=32)
    save(build_model("llama", parts=parts, **sizes), root / "parts", tokenizer())
    return [root / "plain", root / "recorded", root / "parts"]


def damage(folder: Path, random: Random) -> str:
    """Do something to a model folder; returns what, in a few words."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.stat().st_size < 2**24)
    kinds: list[Callable[[Path, Random], str]] = [_json, _json, _json, _header, _bytes, _file]
    return random.choice(kinds)(random.choice(files), random)


def _json(file: Path, random: Random) -> str:
    """Another value at any place of a JSON file, or of a shard's header."""
    if file.suffix == ".safetensors":
        return _header(file, random)
    try:
        value = json.loads(file.read_text())
    except ValueError:
        return _bytes(file, random)
    where = changed(value, random)
    file.write_text(json.dumps(value))
    return f"{file.name}: {where}"


def changed(value: Any, random: Random) -> str:
    """Change a JSON value in one place; returns where."""
    places = list(_places(value, ()))
    if not places:
        return "nothing to change"
    holder, key, path = random.choice(places)
    how = random.randrange(4)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[random.choice(["__class__", "forward", "num_labels", "auto_map", "x"])] = random.choice(JUNK)
    elif how == 2 and isinstance(holder[key], int):
        holder[key] = holder[key] * random.choice([2, -1, 1000, 10**9]) + random.choice([0, 1])
    else:
        holder[key] = random.choice(JUNK)
    return f"{'.'.join(map(str, path))[:80]} ({how})"


def _places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in list(inside)[:200]:
        yield value, key, (*path, key)
        yield from _places(below, (*path, key))


def _header(file: Path, random: Random) -> str:
    """A shard whose header was changed, as a whole or in one place, its length given right."""
    if file.suffix != ".safetensors":
        return _bytes(file, random)
    content = file.read_bytes()
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
    except (struct.error, ValueError):  # damaged before
        return _bytes(file, random)
    where = changed(header, random)
    write_header(file, json.dumps(header).encode(), content[8 + length :])
    return f"{file.name}: header {where}"


def write_header(file: Path, header: bytes, numbers: bytes) -> None:
    """A safetensors file of this header and these numbers."""
    file.write_bytes(struct.pack("<Q", len(header)) + header + numbers)


def _bytes(file: Path, random: Random) -> str:
    """A few bytes changed, cut away or put in."""
    content = bytearray(file.read_bytes())
    at, how = random.randrange(len(content) + 1), random.randrange(3)
    noise = bytes(random.randrange(256) for _ in range(random.randrange(1, 9)))
    content[at : at + (len(noise) if how == 0 else 0)] = noise if how < 2 else b""
    file.write_bytes(content[:at] if how == 2 else content)
    return f"{file.name}: bytes at {at} ({how})"


def _file(file: Path, random: Random) -> str:
    """No file, or something else of its name."""
    how = random.choice(["gone", "empty", "pipe", "folder", "dangling", "loop", "unreadable", "huge"])
    content = file.read_bytes()
    file.unlink()
    if how == "empty":
        file.write_bytes(b"")
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "dangling":
        file.symlink_to("nowhere")
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "unreadable":
        file.write_bytes(content)
        file.chmod(0)
    elif how == "huge":
        with file.open("wb") as stream:
            stream.truncate(2**33)  # takes no place on the disk
    return f"{file.name}: {how}"


@contextmanager
def memory(most: int) -> Iterator[None]:
    """Inside, the process cannot have so many bytes more than now."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def attempt(folder: Path, most: int = 2**30) -> str | None:
    """Open a folder: None if that gives a model, else the error, which must be one that a user can read."""
    try:
        with memory(most):
            opened = open_model(folder)
    except TransectError as error:
        message = " ".join(str(error).split())
        assert "allocate" not in message and "MemoryError" not in message, message
        assert len(message) <= 500 + len(str(folder)) * message.count(str(folder)), message
        return message
    assert all(not tensor.is_meta for tensor in opened.model.parameters())
    return None


def copied(folder: Path, into: Path) -> Path:
    """A copy to be damaged."""
    shutil.rmtree(into, ignore_errors=True)
    return Path(shutil.copytree(folder, into))
