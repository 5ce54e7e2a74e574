"""Put a checkpoint in its place whole: the old one or the new one, never a mixture of both."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import TransectError
from .modeling_file import MODULE

# Files of an earlier model in the same folder that must not outlive it. Everything else in the folder is kept.
_MODEL_FILES = re.compile(
    rf"(config|generation_config)\.json|(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?|{MODULE}\.py"
    r"|edit\.(json|md)|undo\.safetensors"  # of an edit of that model, see `transect.editing`
)


@contextmanager
def placed(target: Path) -> Iterator[Path]:
    """An empty folder to write a checkpoint into; at the end of the `with` it becomes `target`, or its files join it.

    A folder that is there stays the folder that it is, with everything in it that is not of an earlier model: it may
    be the current directory, or a mount. A checkpoint in it is exchanged by renaming, file by file: config.json is the
    first to go and the last to come, so that at no moment a mixture of two models can be loaded.
    On any exception, Ctrl-C included, `target` is left as it was and nothing else remains.

    Raises TransectError if the disk is full or the place cannot be written.
    """
    there = target.is_dir()
    partial = (target if there else target.parent) / f".{target.name}.partial-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if there:
            _exchange(partial, target)
        else:
            os.rename(partial, target)
    except (OSError, SafetensorError) as error:
        was = "; what was there before is untouched" if there else ""
        raise TransectError(f"the checkpoint could not be written to {target}: {error}{was}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(new: Path, target: Path) -> None:
    """Move every entry of `new` into `target`, in place of an earlier model's files; all, or nothing."""
    names = sorted((entry.name for entry in new.iterdir()), key=lambda name: name == "config.json")
    replacing = (target / "config.json").exists()
    gone = {entry.name for entry in target.iterdir() if replacing and _MODEL_FILES.fullmatch(entry.name)}
    gone |= {name for name in names if (target / name).exists()}
    previous = target / f".{target.name}.previous-{os.getpid()}"
    try:
        previous.mkdir()
        for name in sorted(gone, key=lambda name: name != "config.json"):
            os.rename(target / name, previous / name)
        for name in names:
            os.rename(new / name, target / name)
    except BaseException:
        for name in reversed(names):
            if not (new / name).exists():  # it has arrived
                os.rename(target / name, new / name)
        for name in sorted(gone, key=lambda name: name == "config.json"):
            if (previous / name).exists():
                os.rename(previous / name, target / name)
        raise
    finally:
        shutil.rmtree(previous, ignore_errors=True)
