"""A small dense matrix inside a larger map: outputs put among zeros, or inputs of which only some are read.

With them the width inside a head shrinks while the model's own attention code still sees the full head: what is
stored and multiplied is the small matrix alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..anatomy.storage import parameter_of
from ..errors import TransectError
from .base import Operator


def position_dtype(size: int) -> torch.dtype:
    """The smallest integer type in which positions below `size` are stored."""
    return torch.int16 if size <= 2**15 else torch.int32


class ScatteredRows(Operator):
    """y = S A x + b: A (n x d_in) is stored, S puts its outputs at n listed positions of y (d_out), zeros elsewhere.

    d_in, d_out, stored: sizes, 1 <= n = stored <= d_out. bias: whether y has a bias (d_out).
    """

    kind = "scattered_rows"
    positions: Tensor

    def __init__(self, d_in: int, d_out: int, stored: int, bias: bool) -> None:
        super().__init__(d_in, d_out)
        self.inner = nn.Linear(d_in, stored, bias=False)  # A
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.register_buffer("positions", torch.empty(stored, dtype=position_dtype(d_out)))

    @classmethod
    def from_rows(cls, rows: Tensor, positions: Tensor, d_out: int, bias: Tensor | None = None) -> ScatteredRows:
        """From A (n x d_in), the places of its outputs (n distinct numbers below d_out), and b (d_out)."""
        with torch.device("meta"):
            operator = cls(rows.shape[1], d_out, len(rows), bias is not None)
        operator.weight = rows.new_empty(0)
        operator.inner.weight = parameter_of(rows)
        operator.positions = positions.to(device=rows.device, dtype=position_dtype(d_out))
        operator.set_bias(bias)
        return operator

    def forward(self, x: Tensor) -> Tensor:
        small = self.inner(x)  # (..., n)
        y = small.new_zeros(*small.shape[:-1], self.out_features)
        y = y.scatter(-1, self.positions.long().expand_as(small), small)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def refit(self, weight: Tensor, covariance: Tensor, cross: Tensor | None = None) -> None:
        """A = argmin_A E||(W x)_J - A x'||² at the outputs J that are stored."""
        covariance = covariance.double()
        wanted = weight.double()[self.positions.long()] @ (covariance if cross is None else cross.double())
        self.inner.weight.copy_(_least_squares(self.inner.weight.double(), wanted, covariance))

    def to_dense(self) -> Tensor:
        rows = self.inner.weight
        return rows.new_zeros(self.out_features, self.in_features).index_copy(0, self.positions.long(), rows)

    @property
    def flops(self) -> int:
        return 2 * self.inner.weight.numel()

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "stored": self.inner.out_features,
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> ScatteredRows:
        return cls(description["in"], description["out"], description["stored"], description["bias"])


class Leading(Operator):
    """What the two operators below share: positions in `groups` groups of equal size, and a small matrix A in `inner`.

    d_in, d_out, stored: sizes, n = stored, of the `positions` that are grouped. groups: how many; it divides both.
    """

    inner: nn.Linear

    def __init__(self, d_in: int, d_out: int, stored: int, groups: int, positions: int) -> None:
        super().__init__(d_in, d_out)
        if positions % groups or stored % groups or not groups <= stored <= positions:
            raise TransectError(f"{groups} groups must divide both {positions} positions and {stored} stored ones")
        self.stored, self.groups = stored, groups

    @property
    def flops(self) -> int:
        return 2 * self.inner.weight.numel()

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "stored": self.stored,
            "groups": self.groups, "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Leading:
        d_in, d_out, stored, groups, bias = (description[name] for name in ("in", "out", "stored", "groups", "bias"))
        return cls(d_in, d_out, stored, groups, bias)


class LeadingRows(Leading):
    """y = P A x + b: y (d_out) comes in groups of equal size, and A (n x d_in) gives the first outputs of each group.

    The others are zero. d_in, d_out, stored: sizes, n = stored. groups: how many; it divides d_out and n.
    bias: whether y has a bias (d_out).
    """

    kind = "leading_rows"

    def __init__(self, d_in: int, d_out: int, stored: int, groups: int, bias: bool) -> None:
        super().__init__(d_in, d_out, stored, groups, d_out)
        self.inner = nn.Linear(d_in, stored, bias=False)  # A
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    @classmethod
    def from_rows(cls, rows: Tensor, groups: int, d_out: int, bias: Tensor | None = None) -> LeadingRows:
        """From A (n x d_in), group after group, and b (d_out)."""
        with torch.device("meta"):
            operator = cls(rows.shape[1], d_out, len(rows), groups, bias is not None)
        operator.weight = rows.new_empty(0)
        operator.inner.weight = parameter_of(rows)
        operator.set_bias(bias)
        return operator

    def forward(self, x: Tensor) -> Tensor:
        small = self.inner(x).unflatten(-1, (self.groups, -1))  # (..., groups, n / groups)
        y = functional.pad(small, (0, self.out_features // self.groups - small.shape[-1])).flatten(-2)
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> Tensor:
        rows = self.inner.weight.unflatten(0, (self.groups, -1))  # groups, n / groups, d_in
        return functional.pad(rows, (0, 0, 0, self.out_features // self.groups - rows.shape[1])).flatten(0, 1)


class LeadingColumns(Leading):
    """y = A x' + b: x (d_in) comes in groups of equal size, and x' (n) are the first inputs of each group.

    A (d_out x n) is stored. d_in, d_out, stored: sizes, n = stored. groups: how many; it divides d_in and n.
    bias: whether y has a bias (d_out).
    """

    kind = "leading_columns"

    def __init__(self, d_in: int, d_out: int, stored: int, groups: int, bias: bool) -> None:
        super().__init__(d_in, d_out, stored, groups, d_in)
        self.inner = nn.Linear(stored, d_out, bias=bias)  # A, b

    @classmethod
    def from_columns(cls, columns: Tensor, groups: int, d_in: int, bias: Tensor | None = None) -> LeadingColumns:
        """From A (d_out x n), its columns group after group, and b (d_out)."""
        with torch.device("meta"):
            operator = cls(d_in, columns.shape[0], columns.shape[1], groups, bias is not None)
        operator.weight = columns.new_empty(0)
        operator.inner.weight = parameter_of(columns)
        operator.set_bias(bias)
        return operator

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.bias

    def set_bias(self, bias: Tensor | None) -> None:
        self.inner.register_parameter("bias", None if bias is None else parameter_of(bias))

    def forward(self, x: Tensor) -> Tensor:
        read = self.inner.in_features // self.groups
        return self.inner(x.unflatten(-1, (self.groups, -1))[..., :read].flatten(-2))

    @torch.no_grad()
    def refit(self, weight: Tensor, covariance: Tensor, cross: Tensor | None = None) -> None:
        """A = argmin_A E||W x - A x''||² with x'' the inputs of x' that are read."""
        size, read = self.in_features // self.groups, self.inner.in_features // self.groups
        kept = torch.arange(self.in_features, device=covariance.device).view(-1, size)[:, :read].flatten()
        seen = covariance.double()[:, kept]
        wanted = weight.double() @ (seen if cross is None else cross.double()[:, kept])
        self.inner.weight.copy_(_least_squares(self.inner.weight.double(), wanted, seen[kept]))

    def to_dense(self) -> Tensor:
        columns = self.inner.weight.unflatten(1, (self.groups, -1))  # d_out, groups, n / groups
        return functional.pad(columns, (0, self.in_features // self.groups - columns.shape[2])).flatten(1)


def _least_squares(present: Tensor, wanted: Tensor, gram: Tensor) -> Tensor:
    """A with A G = B (n x k). present: A before; directions that G (k x k) does not weigh keep it. wanted: B."""
    return present + (wanted - present @ gram) @ torch.linalg.pinv(gram, hermitian=True)
