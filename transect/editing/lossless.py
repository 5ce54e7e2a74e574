"""What a tensor is beyond what another predicts, bit for bit and small: for ways back that lose nothing.

Both are seen as whole numbers in the order of their values, so that what lies near lies near in bits too; their
difference is written byte by byte and packed. Where the prediction is right it takes next to no room.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from ..errors import BadCheckpoint

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed(tensor: Tensor, predicted: Tensor) -> Tensor:
    """`tensor` as a code (1-D, uint8), on the CPU. predicted: of the same shape and dtype."""
    size = tensor.element_size()
    apart = _ordered(tensor) - _ordered(predicted)  # wraps around, and so does the way back
    apart = (apart << 1) ^ (apart >> (8 * size - 1))  # small ones of either sign have few bits
    planes = np.ascontiguousarray(apart.numpy().view(np.uint8).reshape(-1, size).T)
    return torch.from_numpy(np.frombuffer(zlib.compress(planes.tobytes(), 6), dtype=np.uint8).copy())


def unpacked(code: Tensor, predicted: Tensor) -> Tensor:
    """What `packed` was given, with the same prediction; BadCheckpoint for a code of something else."""
    size, count = predicted.element_size(), predicted.numel()
    reader = zlib.decompressobj()
    try:
        content = reader.decompress(code.numpy().tobytes(), size * count + 1)
    except zlib.error as error:
        raise BadCheckpoint(f"what was kept of a weight is damaged: {error}") from None
    if len(content) != size * count or not reader.eof or reader.unused_data:
        raise BadCheckpoint("what was kept of a weight is of another size")
    planes = np.frombuffer(content, dtype=np.uint8).reshape(size, count)
    apart = torch.empty(count, dtype=_WHOLE[size])
    apart.numpy().view(np.uint8).reshape(count, size)[:] = planes.T
    apart = ((apart >> 1) & ~(-1 << (8 * size - 1))) ^ -(apart & 1)
    whole = apart + _ordered(predicted)
    return _flipped(whole).view(predicted.dtype).view(predicted.shape)


def _ordered(tensor: Tensor) -> Tensor:
    """Its bits as whole numbers (1-D) that grow with the values; -0 comes just before 0."""
    return _flipped(tensor.detach().cpu().contiguous().flatten().view(_WHOLE[tensor.element_size()]))


def _flipped(whole: Tensor) -> Tensor:
    """Negative numbers the other way round; its own inverse."""
    return whole ^ ((whole >> (8 * whole.element_size() - 1)) & ~(-1 << (8 * whole.element_size() - 1)))
