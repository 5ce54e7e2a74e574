"""Narrow weights, wide arithmetic: what measures or calibrates on a CPU computes in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_NARROW = (torch.bfloat16, torch.float16)


@contextmanager
def computing_wide(*modules: Any) -> Iterator[None]:
    """Inside the `with`, numbers of 16 bits that lie on a CPU are held as float32; afterwards they are what they were.

    Every number of bfloat16 or float16 is one of float32, so that nothing changes but the rounding of activations,
    which depends on the processor's kernels and would be measured with the weights'. Most CPUs have no arithmetic of
    16 bits, and are several times as fast this way. It takes the memory of the wide copy meanwhile. May be nested; what
    is written to the weights inside is lost.
    """
    narrow = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dtype in _NARROW and tensor.device.type == "cpu":
                narrow[id(tensor)] = (tensor, tensor.data)
    try:
        for tensor, data in narrow.values():
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in narrow.values():
            tensor.data = data
