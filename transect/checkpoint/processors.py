"""The tokenizer or image processor that belongs to a model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils.hub import cached_file

from ..errors import BadCheckpoint, TransectError
from ..pretrained import pretrained
from ..store import in_short

# Without one of its files, AutoTokenizer makes up an empty tokenizer from config.json alone.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PROCESSOR = ("preprocessor_config.json",)
# What else a model with images, sound or a chat template comes with.
_BESIDE = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip


def load_processors(where: str, **kwargs: Any) -> tuple[Any, Any]:
    """Tokenizer and image processor of a folder or hub name; None for one that is not there.

    kwargs: for `from_pretrained`. Raises BadCheckpoint for one that is damaged.
    """
    return _load(AutoTokenizer, where, _TOKENIZER, **kwargs), _load(AutoImageProcessor, where, _PROCESSOR, **kwargs)


def copy_processor_files(where: str, folder: Path) -> None:
    """Copy what describes a model's processors from its folder or (cached) hub name, but for what is there already.

    As files, since loading a processor may take packages (pillow, torchvision) that the model itself does not.
    """
    for name in _BESIDE:
        file = _found(where, name, local_files_only=True)
        if file is not None and not (folder / name).exists():
            shutil.copyfile(file, folder / name)


def _load(auto: Any, where: str, files: tuple[str, ...], **kwargs: Any) -> Any:
    if not any(_found(where, file, **kwargs) for file in files):
        return None
    try:
        return pretrained(auto, where, **kwargs)
    except TransectError:
        raise
    except ImportError:  # image processors need pillow; the model itself does not
        return None
    except Exception as error:  # tokenizers raises bare Exceptions
        kind = "tokenizer" if auto is AutoTokenizer else "image processor"
        raise BadCheckpoint(f"the {kind} of {where} cannot be loaded: {in_short(error)}") from error


def _found(where: str, file: str, **kwargs: Any) -> str | None:
    try:
        return cached_file(where, file, _raise_exceptions_for_missing_entries=False, **kwargs)
    except (OSError, ValueError):  # not cached, and no network; or no hub name at all
        return None
