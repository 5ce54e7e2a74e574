"""Short names for exactly these weights, and for exactly this model, for caches."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch


def model_fingerprint(model: Any) -> str:
    """Hash (32 hexadecimal digits) over every parameter's name, type, shape and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        data = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))  # one number may have any stride
        digest.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()


# What a configuration says about the checkpoint's files and origin, not about what the model computes.
_ORIGIN = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


def computation_fingerprint(model: Any) -> str:
    """Hash (32 hexadecimal digits) over the weights and the configuration, on which activations depend as much.

    The same weights with another base of rotations, softcap or window put out something else.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _ORIGIN and not k.startswith("_")}
    described = json.dumps(config, sort_keys=True, default=str)
    return hashlib.blake2b(f"{model_fingerprint(model)} {described}".encode(), digest_size=16).hexdigest()
