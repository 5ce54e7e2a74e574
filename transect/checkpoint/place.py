"""Put a folder in its place whole: at every moment there is the old one or the new one, never a half of either."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import TransectError
from ..files import link
from .modeling_file import MODULE

# Files of an earlier model in the same folder that must not outlive it. Everything else in the folder is kept.
_MODEL_FILES = re.compile(
    rf"(config|generation_config)\.json|(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?|{MODULE}\.py"
    r"|edit\.(json|md)|undo\.safetensors"  # of an edit of that model, see `transect.editing`
)


@contextmanager
def placed(target: Path) -> Iterator[Path]:
    """An empty folder to write a checkpoint into; at the end of the `with` it becomes, or joins, `target`.

    Where `target` holds a checkpoint already, the new one takes its place by renaming, and takes along whatever else
    lay there. A folder without a checkpoint (a tokenizer, a trainer's files) is joined, config.json last.
    On any exception, Ctrl-C included, `target` is left as it was and nothing else remains.

    Raises TransectError if the disk is full or the place cannot be written.
    """
    replacing = (target / "config.json").exists()
    joining = target.is_dir() and not replacing
    partial = (target if joining else target.parent) / f".{target.name}.partial-{os.getpid()}"
    previous = target.parent / f".{target.name}.previous-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if joining:
            _join(partial, target)
        elif replacing:
            _take_along(target, partial)
            os.rename(target, previous)
            os.rename(partial, target)
        else:
            os.rename(partial, target)
    except (OSError, SafetensorError) as error:
        was = "; what was there before is untouched" if replacing else ""
        raise TransectError(f"the checkpoint could not be written to {target}: {error}{was}") from error
    finally:
        if previous.exists() and not target.exists():
            os.rename(previous, target)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def _take_along(old: Path, new: Path) -> None:
    """Link, or copy where links are not possible, what `old` holds beside its model."""
    for entry in old.iterdir():
        if _MODEL_FILES.fullmatch(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=link)
        else:
            link(entry, new / entry.name)


def _join(new: Path, target: Path) -> None:
    """Move every entry of `new` into `target`, config.json last: without it the folder is no model to anybody."""
    moved: list[Path] = []
    try:
        for entry in sorted(new.iterdir(), key=lambda entry: entry.name == "config.json"):
            destination = target / entry.name
            if not destination.exists():
                moved.append(destination)
            os.replace(entry, destination)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
