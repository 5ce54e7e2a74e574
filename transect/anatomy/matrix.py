"""One weight matrix of a transformer, wherever and however it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import TransectError
from .architecture import FusedMatrix
from .banks import hand_over_banks
from .body import submodule
from .record import record_of
from .storage import Stacked, dense, describe, is_dense, laid_out, read_weight, shape_of
from .ties import refuse_shared

# Which point of a block feeds each role: matrices with one source see the same input.
SOURCE = {
    "q": "attention.input", "k": "attention.input", "v": "attention.input", "o": "attention.heads",
    "gate": "mlp.input", "up": "mlp.input", "down": "mlp.neurons",
}  # fmt: skip


class Home(Protocol):
    """What matrices and sublayers know of the block that they stand in: see `view.Block`, which is the one there is."""

    index: int
    anatomy: Any
    model: Any
    path: str

    @property
    def module(self) -> nn.Module: ...

    @property
    def head_size(self) -> int: ...

    @property
    def rotary_width(self) -> int: ...

    @property
    def rotates_neighbours(self) -> bool: ...

    @property
    def attention(self) -> Any: ...

    @property
    def attention_adds(self) -> tuple[str, int] | None: ...

    @property
    def mlp(self) -> Any: ...

    def find(self, role: str) -> Matrix: ...

    def matrix(self, role: str) -> Matrix: ...

    def refuse_dropping_sublayers(self) -> None: ...


@dataclass(frozen=True)
class Matrix:
    """W (d_out x d_in) of y = Wx + b, with its role and place. A handle: it holds no weights itself.

    role: q, k, v, o, gate, up or down.
    path: path of the module that stores it, from the model's root.
    fused: set where that module stores several matrices; this one is the part `role`.
    """

    block: Home
    role: str
    path: str
    fused: FusedMatrix | None = None

    @property
    def name(self) -> str:
        """E.g. `blocks.3.attention.q` or `blocks.3.mlp.down`: the same for every architecture."""
        return f"blocks.{self.block.index}.{self.unit}.{self.role}"

    @property
    def unit(self) -> str:
        """Where in its block it is: `attention`, `mlp`, or an expert."""
        return SOURCE[self.role].partition(".")[0]

    @property
    def source(self) -> str:
        """Name of the activation that is this matrix's input; q, k and v share one, gate and up share one."""
        return f"blocks.{self.block.index}.{self.unit}.{SOURCE[self.role].partition('.')[2]}"

    @property
    def host(self) -> Any:
        """The module at `path`: what the block calls."""
        return submodule(self.block.model, self.path)

    @property
    def module(self) -> Any:
        """The module that holds this matrix alone, or the fused one if the matrix is still stored in it."""
        host = self.host
        return host.parts[self.role] if isinstance(host, Stacked) else host

    def rows(self) -> Tensor | slice | None:
        """Where this matrix's rows are in `module`'s output; None means all of it."""
        if self.fused is None or isinstance(self.host, Stacked):
            return None
        total, parts = shape_of(self.host)[0], self.fused.parts
        index = parts.index(self.role)
        if "q" in parts:
            queries = self.block.find("o").shape[1]
            sizes = [queries if part == "q" else (total - queries) // 2 for part in parts]
        else:
            sizes = [total // len(parts)] * len(parts)
        groups = min(sizes) // self.block.head_size if self.fused.interleaved else 1
        start, stop = sum(sizes[:index]) // groups, sum(sizes[: index + 1]) // groups
        if groups == 1:
            return slice(start, stop)
        return torch.arange(total).view(groups, -1)[:, start:stop].flatten()

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = shape_of(self.module)
        rows = self.rows()
        if isinstance(rows, slice):
            d_out = rows.stop - rows.start
        elif rows is not None:
            d_out = len(rows)
        return d_out, d_in

    @property
    def weight(self) -> Tensor:
        """W (d_out x d_in), detached. A view of the storage where that is possible; write with `write`."""
        weight, rows = read_weight(self.module), self.rows()
        return weight if rows is None else weight[rows]

    @property
    def bias(self) -> Tensor | None:
        """b (d_out), detached, or None."""
        bias, rows = self.module.bias, self.rows()
        return None if bias is None else bias.detach() if rows is None else bias.detach()[rows]

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Overwrite W, and b if given, in place; the shapes must be the present ones, and no other place share them."""
        if not is_dense(self.module):
            raise TransectError(f"{self.name} is stored as {type(self.module).__name__}: replace it instead of writing")
        if tuple(weight.shape) != self.shape:
            raise TransectError(f"{self.name} has shape {self.shape}, but the new weight has {tuple(weight.shape)}")
        refuse_shared(self.block.model, [self])
        rows = self.rows()
        target = slice(None) if rows is None else rows
        read_weight(self.module)[target] = weight.to(self.module.weight)
        if bias is not None:
            self.module.bias[target] = bias.to(self.module.bias)

    def replace(self, operator: nn.Module) -> None:
        """Let a map of the same shape stand for this matrix (and its bias); the structure record notes it."""
        if shape_of(operator) != self.shape:
            raise TransectError(f"{self.name} has shape {self.shape}, but the replacement has {shape_of(operator)}")
        operator = laid_out(operator).train(self.module.training)
        hand_over_banks(self.block.model, self.module)
        self.place(operator)
        record_of(self.block.model).set_module(self.path, describe(self.host))

    def place(self, operator: nn.Module) -> None:
        """Let a map stand for this matrix for a while: nothing is noted. What is to stay, `replace` puts there."""
        if self.fused is None:
            self.block.model.set_submodule(self.path, operator)
            return
        if not isinstance(self.host, Stacked):
            self._unfuse()
        self.host.parts[self.role] = operator

    def _unfuse(self) -> None:
        assert self.fused is not None
        siblings = {role: self.block.find(role) for role in self.fused.parts}
        parts = {role: dense(part.weight, part.bias) for role, part in siblings.items()}
        head_size = self.block.head_size if self.fused.interleaved else 0
        stacked = Stacked(parts, head_size).to(self.host.weight).train(self.host.training)
        self.block.model.set_submodule(self.path, stacked)
