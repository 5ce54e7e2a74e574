"""Short names for exactly these weights, and for exactly this model, for caches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..anatomy.record import gathered_record
from ..store import tensor_bytes


def model_fingerprint(model: Any) -> str:
    """Hash (32 hexadecimal digits) over every parameter's name, type, shape and bytes."""
    return _fingerprint(model.named_parameters())


def _fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


# What a configuration says about the checkpoint's files and origin, not about what the model computes.
_ORIGIN = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


def computation_fingerprint(model: Any) -> str:
    """Hash (32 hexadecimal digits) over the weights and all else that activations depend on as much.

    The same weights with another base of rotations, softcap or window (in the configuration), with other places of a
    sparse matrix's numbers (in a buffer) or with other operators around them (in the structure record) put out
    something else.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _ORIGIN and not k.startswith("_")}
    stored = model.state_dict()  # a buffer that is not stored follows from the configuration
    buffers = _fingerprint((name, buffer) for name, buffer in model.named_buffers() if name in stored)
    record = {name: table for name, table in gathered_record(model).to_dict().items() if name != "history"}
    described = json.dumps([config, record], sort_keys=True, default=str)
    return hashlib.blake2b(f"{model_fingerprint(model)} {buffers} {described}".encode(), digest_size=16).hexdigest()
