"""How large a model is: parameters, and bytes of the folder, of the whole model, and of what a budget counts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..anatomy.view import Anatomy
from ..errors import BadCheckpoint
from ..operators import Operator


def checkpoint_bytes(folder: str | Path) -> int:
    """Bytes of the .safetensors files in a model folder. Raises BadCheckpoint where there is none."""
    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        raise BadCheckpoint(f"{folder} holds no .safetensors file")
    return sum(file.stat().st_size for file in files)


def parameters(model: Any) -> int:
    """Number of parameters, those that are stored as codes of a few bits among them; tied ones count once."""
    coded = sum(module.coded for module in model.modules() if isinstance(module, Operator))
    return coded + sum(parameter.numel() for parameter in model.parameters())


def model_bytes(model: Any) -> int:
    """Bytes of every parameter and of every buffer that a checkpoint stores; tied ones count once."""
    stored = model.state_dict().keys()
    buffers = (buffer for name, buffer in model.named_buffers() if name in stored)
    return _bytes([*model.parameters(), *buffers])


def matrix_bytes(anatomy: Anatomy) -> int:
    """Bytes of the blocks' matrices as they are stored now, with every factor, index and scale: what a budget counts.

    Biases are not counted. A tensor that serves several matrices (fused ones, shared factors) counts once.
    """
    return anatomy.matrix_bytes()


def _bytes(tensors: Iterable[Tensor]) -> int:
    unique = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())
