"""A short name for exactly these weights, for caches."""

from __future__ import annotations

import hashlib
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
