"""Running a model with the first neurons of its MLPs alone: the slices are multiplied, nothing is masked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ....anatomy import Anatomy, Matrix
from ....anatomy.storage import is_dense
from ....errors import TransectError
from .widths import mlps_of


def check_nested(anatomy: Anatomy) -> None:
    """TransectError unless every block has an MLP of plain matrices whose neurons can be counted off."""
    for mlp in mlps_of(anatomy):
        mlp.refuse_narrowing()
        for matrix in (mlp.up, mlp.gate, mlp.down):
            if matrix is not None and not is_dense(matrix.module):
                raise TransectError(
                    f"{matrix.name} is stored as {type(matrix.module).__name__}, of which no first neurons can be "
                    "taken: nest the dense model, without low-rank updates, and compress what is cut out"
                )


@contextmanager
def narrowed(anatomy: Anatomy, widths: Sequence[int]) -> Iterator[None]:
    """Inside the `with` the MLP of each block has its first so many neurons, and runs as if there were no others.

    widths: of each block, from 1 to the neurons that it has; with all of them its own code runs untouched. Parameters
    stay where they are, whole: gradients of what was left out are zero. It is a state of this model, so that others
    are not touched; may be nested (the inner one counts), and ends also after an error. Gradients are those of the
    forward pass that was made inside, if it is not computed again behind the `with` (checkpointing).
    TransectError for a width that a block does not have.
    """
    check_nested(anatomy)
    mlps = mlps_of(anatomy)
    if len(widths) != len(mlps) or not all(1 <= m <= mlp.neurons for m, mlp in zip(widths, mlps, strict=True)):
        raise TransectError(f"widths should be {len(mlps)}, each from 1 to the block's neurons, not {list(widths)}")
    forwards: list[tuple[Any, Any]] = []
    try:
        for mlp, width in zip(mlps, widths, strict=True):
            into: dict[int, tuple[Any, list[Tensor]]] = {}  # fused gate and up are one module
            for matrix in (mlp.gate, mlp.up):
                if matrix is not None:
                    into.setdefault(id(matrix.module), (matrix.module, []))[1].append(_first(matrix, width))
            for module, rows in into.values():
                forwards.append((module, module.__dict__.get("forward")))
                if width < mlp.neurons:
                    module.forward = partial(_rows, module, _span(torch.cat(rows)))
                else:
                    module.__dict__.pop("forward", None)
            down = mlp.down.module
            forwards.append((down, down.__dict__.get("forward")))
            if width < mlp.neurons:
                down.forward = partial(_columns, down, width)
            else:
                down.__dict__.pop("forward", None)
        yield
    finally:
        for module, before in forwards:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = before


def _first(matrix: Matrix, width: int) -> Tensor:
    """Where the first rows of a matrix are among those of its module."""
    rows = matrix.rows()
    total = torch.arange(matrix.module.weight.shape[-1 if isinstance(matrix.module, Conv1D) else 0])
    return (total if rows is None else total[rows])[:width]


def _span(rows: Tensor) -> Any:
    """A slice, which copies nothing, where rows follow one another."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    return slice(first, last) if last - first == len(rows) else rows


def _rows(module: Any, rows: Any, x: Tensor) -> Tensor:
    weight = module.weight[:, rows].T if isinstance(module, Conv1D) else module.weight[rows]
    return functional.linear(x, weight, None if module.bias is None else module.bias[rows])


def _columns(module: Any, width: int, x: Tensor) -> Tensor:
    weight = module.weight[:width].T if isinstance(module, Conv1D) else module.weight[:, :width]
    return functional.linear(x, weight, module.bias)
