"""GGUF files: transformers reads them and unpacks their weights; what comes out is an ordinary model."""

from __future__ import annotations

import os
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
