"""The modules that hold a weight matrix: `nn.Linear`, GPT-2's `Conv1D`, structured operators, and several stacked.

Everything else in Transect sees W (d_out x d_in) with y = Wx + b; that Conv1D stores Wᵀ is known here only.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Stacked(nn.Module):
    """Several maps of one input whose outputs lie behind one another: what a fused matrix becomes once a part changes.

    parts: role -> map from d_in to that part's rows.
    head_size: 0 where the parts' outputs are concatenated; otherwise each key/value head's queries, key and value lie
        together, as GPT-NeoX and Falcon store them: see `FusedMatrix`.
    """

    def __init__(self, parts: dict[str, nn.Module], head_size: int = 0) -> None:
        super().__init__()
        # An empty stand-in under the fused matrix's own name: transformers then refuses to load the folder as if it
        # were dense, where it would otherwise fill the missing matrix with random numbers (see operators/base.py).
        self.register_buffer("weight", torch.empty(0))
        self.parts = nn.ModuleDict(parts)
        self.head_size = head_size

    @property
    def in_features(self) -> int:
        """d_in, the same for all parts."""
        return shape_of(next(iter(self.parts.values())))[1]

    @property
    def out_features(self) -> int:
        """d_out of all parts together."""
        return sum(shape_of(part)[0] for part in self.parts.values())

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x) for part in self.parts.values()]
        if not self.head_size:
            return torch.cat(outputs, dim=-1)
        groups = min(y.shape[-1] for y in outputs) // self.head_size
        return torch.cat([y.unflatten(-1, (groups, -1)) for y in outputs], dim=-1).flatten(-2)

    def describe(self) -> dict[str, Any]:
        # A list, since the order of a JSON object's keys does not survive: transformers sorts them.
        parts = [[role, describe(part)] for role, part in self.parts.items()]
        return {"kind": "stacked", "parts": parts, "head_size": self.head_size}


def shape_of(module: Any) -> tuple[int, int]:
    """(d_out, d_in) of a module that holds a matrix."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features


def describe(module: Any) -> dict[str, Any]:
    """The JSON description from which `operators.build` makes the module again, without its weights."""
    if hasattr(module, "describe"):
        return module.describe()
    d_out, d_in = shape_of(module)
    kind = "conv1d" if isinstance(module, Conv1D) else "linear"
    return {"kind": kind, "in": d_in, "out": d_out, "bias": module.bias is not None}


def is_dense(module: Any) -> bool:
    """Whether the module stores its matrix entry by entry."""
    return isinstance(module, (nn.Linear, Conv1D))


def read_weight(module: Any) -> Tensor:
    """W (d_out x d_in), detached: a view of a dense module's storage, or a structured operator's dense form."""
    if isinstance(module, Conv1D):
        return module.weight.detach().T
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    return module.to_dense().detach()


class _Bare(nn.Linear):
    def reset_parameters(self) -> None:
        pass


def bare_linear(d_in: int, d_out: int, bias: bool, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """An `nn.Linear` with uninitialised numbers: drawing some, to be replaced at once, would take most of the time."""
    layer: Any = _Bare(d_in, d_out, bias=bias)
    layer.__class__ = kind
    return layer


def parameter_of(tensor: Tensor) -> nn.Parameter:
    """A parameter that holds a copy of the tensor, row after row in memory: as it would come out of a checkpoint."""
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))


def laid_out(module: nn.Module) -> nn.Module:
    """The module, every parameter and buffer of it laid out in memory as loading would: row after row. In place.

    Products round differently for different layouts of the same numbers. So whatever is put into a model goes through
    here, and the model in memory is the same program as the one that will be loaded.
    """
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.stride() != torch.empty(tensor.shape, device="meta").stride():  # also where a size is 1
                tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
    return module


def dense(weight: Tensor, bias: Tensor | None, conv1d: bool = False) -> nn.Module:
    """A dense module that holds copies of W (d_out x d_in) and b (d_out): `nn.Linear`, or GPT-2's `Conv1D`."""
    d_out, d_in = weight.shape
    conv1d = conv1d and weight.numel() > 0  # Conv1D cannot compute with an empty matrix
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        module: Any = Conv1D(d_out, d_in) if conv1d else nn.Linear(d_in, d_out)
    if bias is None and conv1d:  # it always adds a bias
        bias = torch.zeros(d_out, dtype=weight.dtype, device=weight.device)
    module.weight = parameter_of(weight.T if conv1d else weight)
    module.bias = None if bias is None else parameter_of(bias)
    return module


def select(module: Any, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Module:
    """The same map restricted to some outputs (rows) and inputs (columns), in the order given."""
    if not is_dense(module):
        return laid_out(module.select(rows, columns))
    weight, bias = read_weight(module), module.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    return dense(weight, bias, isinstance(module, Conv1D)).train(module.training)


def weight_tensors(module: Any) -> list[Tensor]:
    """Everything that a module stores for its matrix: every factor, index and scale, but not the bias."""
    return [tensor for tensor in [*module.parameters(), *module.buffers()] if tensor is not module.bias]
