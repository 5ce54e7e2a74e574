"""GGUF files: transformers reads them and unpacks their weights; what comes out is an ordinary model."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import initialization as init

from ..anatomy import refuse_encoder_decoder
from ..errors import BadCheckpoint, TransectError
from ..pretrained import pretrained
from ..store import in_short
from .fit import bounded

_FORMATS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip


def load_gguf(file: Path, dtype: Any, device: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file. dtype: of the unpacked weights; None: the file's own, or float32.

    Raises TransectError where the package gguf is missing, and BadCheckpoint for a file that cannot be read.
    """
    if os.path.lexists(file.parent / "adapter_config.json"):
        raise BadCheckpoint(f"{file} lies beside an adapter (adapter_config.json), which would be put into the model")
    # Newer versions of transformers could also keep the weights packed.
    packing = getattr(transformers, "GgufConfig", None)
    unpack = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    try:
        _check_counts(file)
        config = pretrained(AutoConfig, file.parent, gguf_file=file.name)
        refuse_encoder_decoder(config, str(file))
        _check_size(config, file)
        with bounded(file.stat().st_size):
            model = pretrained(
                AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype=dtype, device_map=device, **unpack
            )
        tokenizer = pretrained(AutoTokenizer, file.parent, gguf_file=file.name)
    except TransectError:
        raise
    except ImportError as error:
        raise TransectError(
            f"reading {file} needs the package gguf, which is not installed: pip install 'transect[gguf]' ({error})"
        ) from error
    except Exception as error:  # a damaged file fails anywhere, and tokenizers raises bare Exceptions
        raise BadCheckpoint(f"{file} cannot be read as a GGUF file: {in_short(error)}") from error
    _forget_quantization(model)
    return model.eval(), tokenizer


def _check_counts(file: Path) -> None:
    """Refuse counts of layers and the like that no file of this size holds; transformers makes lists of that length."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, tensors, entries = struct.unpack_from("<4sIQQ", data)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}")
        place = 24
        for _ in range(entries):
            name, place = _string(data, place)
            value, place = _value(data, place + 4, *struct.unpack_from("<I", data, place))
            most = tensors if name.endswith(b".block_count") else max(2**17, len(data))
            if name.endswith(b"_count") and isinstance(value, int) and value > most:
                raise ValueError(f"{name.decode(errors='replace')} is {value}, in a file of {tensors} tensors")


def _value(data: mmap.mmap, place: int, kind: int) -> tuple[Any, int]:
    """The value at a place, None for texts and lists, and the place behind it. kind: GGUF's number of its type."""
    if kind == 8:
        return None, _string(data, place)[1]
    if kind == 9:
        kind, length = struct.unpack_from("<IQ", data, place)
        place += 12
        if kind in _FORMATS:
            return None, place + length * struct.calcsize(_FORMATS[kind])
        for _ in range(length):
            place = _value(data, place, kind)[1]
        return None, place
    return struct.unpack_from(_FORMATS[kind], data, place)[0], place + struct.calcsize(_FORMATS[kind])


def _string(data: mmap.mmap, place: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", data, place)
    return data[place + 8 : place + 8 + length], place + 8 + length


def _check_size(config: Any, file: Path) -> None:
    """Refuse a model of more numbers than the file has bits, before any is allocated."""
    size = file.stat().st_size
    with bounded(size // 32), init.no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    numbers = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    if numbers > 8 * size:
        raise BadCheckpoint(f"{file} describes a model of {numbers} numbers, and has {size} bytes")


def _forget_quantization(model: Any) -> None:
    """From here on it is an ordinary model: these marks would forbid saving it, training it and more."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
                module.__dict__.pop(mark, None)
            for mark in ("quantization_config", "_is_quantized"):
                module.config.__dict__.pop(mark, None)
