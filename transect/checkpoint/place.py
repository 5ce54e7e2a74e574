"""Put a checkpoint in its place whole: the old one or the new one, never a mixture of both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import TransectError
from ..store import alone, finish_exchange, place_folder, remove, sweep, temporary
from .modeling_file import MODULE

# Files of an earlier model in the same folder that must not outlive it. Everything else in the folder is kept.
_MODEL_FILES = re.compile(
    rf"(config|generation_config)\.json|(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?|{MODULE}\.py"
    r"|transect-edits|edit\.(json|md)|undo\.safetensors"  # edits of that model, see `transect.editing`
    r"|adapter_(config\.json|model\.(safetensors|bin))|adaptation\.json"  # of an adapter, see `transect.adaptation`
    r"|reward_model\.json|category-\d+|router"  # of a reward model, see `transect.preference`
)
LAST = "config.json"  # without it nobody takes a folder for a model's


@contextmanager
def placed(target: Path, last: str = LAST) -> Iterator[Path]:
    """An empty folder to write a checkpoint into; at the end of the `with` it becomes `target`, or its files join it.

    A checkpoint that is there is exchanged for the new one, in one step where the system can (see `store.exchange`);
    what is not of an earlier model stays. The current directory, or a mount, stays the folder that it is.
    On any exception, Ctrl-C included, `target` is left as it was and nothing else remains. What a run that was killed
    has left there is finished, or removed, first. last: the file without which it is no checkpoint.

    Raises TransectError if the disk is full, the place cannot be written, or another run is writing there.
    """
    with alone(target):
        there, partial = target.is_dir(), None
        try:
            if there:
                finish_exchange(target, last)
            sweep(target)
            partial = _beside(target)
            yield partial
            is_ours = there and ((target / LAST).exists() or (target / last).exists())
            place_folder(partial, target, lambda name: is_ours and _MODEL_FILES.fullmatch(name) is not None, last)
        except (OSError, SafetensorError) as error:
            was = "; what was there before is untouched" if there else ""
            raise TransectError(f"the checkpoint could not be written to {target}: {error}{was}") from error
        finally:
            if partial is not None:
                remove(partial)


def _beside(target: Path) -> Path:
    """An empty folder on the same file system: beside the target, or in it where only that can be written, or is it."""
    try:
        if not target.is_mount():
            target.parent.mkdir(parents=True, exist_ok=True)
            return _made(temporary(target))
    except PermissionError:
        if not target.is_dir():
            raise
    return _made(target / temporary(target).name)


def _made(folder: Path) -> Path:
    remove(folder)
    folder.mkdir()
    return folder
