"""GGUF files: transformers reads them and unpacks their weights; what comes out is an ordinary model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..anatomy import refuse_encoder_decoder
from ..errors import BadCheckpoint, TransectError


def load_gguf(file: Path, dtype: Any, device: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file. dtype: of the unpacked weights; None: the file's own, or float32.

    Raises TransectError where the package gguf is missing, and BadCheckpoint for a file that cannot be read.
    """
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # Newer versions of transformers could also keep the weights packed.
    packing = getattr(transformers, "GgufConfig", None)
    unpack = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    try:
        refuse_encoder_decoder(AutoConfig.from_pretrained(**where), str(file))
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, device_map=device, **unpack)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except TransectError:
        raise
    except ImportError as error:
        raise TransectError(
            f"reading {file} needs the package gguf, which is not installed: pip install 'transect[gguf]' ({error})"
        ) from error
    except Exception as error:  # a damaged file fails anywhere, and tokenizers raises bare Exceptions
        raise BadCheckpoint(f"{file} cannot be read as a GGUF file: {error!r}") from error
    _forget_quantization(model)
    return model.eval(), tokenizer


def _forget_quantization(model: Any) -> None:
    """From here on it is an ordinary model: these marks would forbid saving it, training it and more."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
                module.__dict__.pop(mark, None)
            for mark in ("quantization_config", "_is_quantized"):
                module.config.__dict__.pop(mark, None)
