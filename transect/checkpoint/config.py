"""config.json, judged before transformers makes lists and modules of what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..anatomy.record import checked_history
from ..errors import BadCheckpoint, TransectError
from ..pretrained import pretrained
from ..store import in_short
from .header import Stored
from .quantizer import STOP

HISTORY = "transect"  # the key of config.json under which a plain checkpoint keeps what was done to it
# With these, transformers would read other weights than those that were looked at, or compute with other modules.
_REFUSED = ("transformers_weights", "fusion_config", "distributed_config")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_DTYPES = ("float64", "float32", "float16", "bfloat16", "auto")
# What names how many there are of something; GPT-Neo's attention_types say how often each pattern comes.
_COUNT = re.compile(r"(n|num)_.*|.*_(layers?|blocks|indices)|depths?|attention_types")
_USUAL = 2**17  # as many of anything are no cause for suspicion
_LARGEST = 2**63


def check_config(config: dict[str, Any], file: Path, stored: Mapping[str, Stored]) -> None:
    """Raise BadCheckpoint for a config.json that no checkpoint with these tensors can have.

    stored: the folder's tensors. They bound how many layers, labels or experts there can be: transformers makes lists
    of these lengths while it reads the file.
    """
    sizes = (min(size, tensor.numbers) for tensor in stored.values() for size in tensor.shape)  # 0 where it is empty
    most = max([_USUAL, len(stored), *sizes])
    for key in _REFUSED:
        if config.get(key) is not None:
            raise BadCheckpoint(f"{file} sets {key!r}, with which the model would be another than its files show")
    for key, value in _entries(config):
        if key.startswith("__"):
            raise BadCheckpoint(f"{file} sets {key!r}, which is no entry of a config")
        for number in _flat(value):
            if type(number) is int and not -_LARGEST <= number < _LARGEST:
                raise BadCheckpoint(f"{file} gives {key!r} a number of more than 64 bits")
            if type(number) is int and number > most and _COUNT.fullmatch(key):
                raise BadCheckpoint(f"{file} says {key} = {number}, but the folder holds {len(stored)} tensors")
        if key in _KERNELS and any(_is_kernel(one) for one in (value.values() if isinstance(value, dict) else [value])):
            raise BadCheckpoint(f"{file} says {key} = {in_short(value)}, which is code that would be fetched")
        if key in ("dtype", "torch_dtype") and not isinstance(value, dict) and not _is_dtype(value):
            raise BadCheckpoint(f"{file} says {key} = {in_short(value)}; known are {', '.join(_DTYPES)}")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise BadCheckpoint(f"{file} should have a list of names under `architectures`, not {in_short(names)}")
    if not isinstance(config.get("model_type", ""), str):
        raise BadCheckpoint(f"{file} should have a name under `model_type`, not {in_short(config['model_type'])}")
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise BadCheckpoint(f"{file} should have an object under `quantization_config`")
    history_of(config, file)


def history_of(config: Mapping[str, Any], file: Any) -> list[dict[str, Any]]:
    """What was done to a plain checkpoint, by its config; BadCheckpoint if that is no list of objects."""
    noted = config.get(HISTORY) or {}
    if not isinstance(noted, dict):
        raise BadCheckpoint(f"{file} should have an object under {HISTORY!r}, not {in_short(noted)}")
    return checked_history(noted.get("history", []), f"{HISTORY!r} in {file}")


def read_config(where: str | Path, **kwargs: Any) -> Any:
    """The transformers config of a folder or hub name, of whatever class its type is.

    kwargs: for `from_pretrained`. Raises BadCheckpoint for one that transformers cannot read, or whose entries stand
    in the place of the config's own methods.
    """
    try:
        config = pretrained(AutoConfig, where, **kwargs)
    except (TransectError, OSError, ImportError):
        raise
    except Exception as error:  # each architecture's config has its own way to refuse
        raise BadCheckpoint(f"config.json of {where} cannot be used: {in_short(error)}") from error
    for part in _configs(config):
        for key in vars(part):
            if callable(getattr(type(part), key, None)):
                raise BadCheckpoint(f"config.json of {where} sets {key!r}, which is no entry of a config")
    return config


def _configs(config: Any) -> Iterator[Any]:
    """The config and those in it."""
    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from _configs(part)


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep; of what is Transect's own nothing."""
    waiting: list[Any] = [{k: v for k, v in config.items() if k not in (HISTORY, "quantization_config")}]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from found.items()
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(one for one in found if isinstance(one, (dict, list)))


def _flat(value: Any) -> Iterator[Any]:
    """A value, or what is in a list and the lists in it."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, list):
            waiting.extend(found)
        else:
            yield found


def _is_kernel(value: Any) -> bool:
    return isinstance(value, str) and value != STOP and any(mark in value for mark in "/:@")


def _is_dtype(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.removeprefix("torch.") in _DTYPES)
