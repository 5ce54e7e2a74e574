"""Another operator whose factors are stored as integers of a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .base import Operator
from .build import build
from .grouped_integer import GroupedInteger


class Quantized(Operator):
    """y = f(x), f an operator (low rank, dictionary ...) of which some factors are `GroupedInteger`s.

    inner: f; the factors that are integers are empty in it. factors: of f's parameters, by name. One of more than two
    dimensions is a matrix of its last one; one with more rows than columns is stored transposed (`wide_side_last`), so
    that groups lie along the longer side. The factors are made anew in every call.
    """

    kind = "quantized"

    def __init__(self, inner: Operator, factors: Mapping[str, GroupedInteger]) -> None:
        super().__init__(inner.in_features, inner.out_features)
        self._described, self._flops = inner.describe(), inner.flops
        self._shapes = {name: inner.get_parameter(name).shape for name in factors}
        for name, stored in factors.items():
            like = wide_side_last(inner.get_parameter(name))
            if like.shape != (stored.out_features, stored.in_features):
                raise ValueError(f"the factor {name} is {tuple(like.shape)}, not what {stored.describe()} stores")
            module, _, last = name.rpartition(".")
            holder = inner.get_submodule(module)
            if isinstance(holder, nn.Linear):
                holder = _Emptied(holder)
                inner.set_submodule(module, holder)
            setattr(holder, last, nn.Parameter(torch.empty(0)))
        self.inner = inner
        self.factors = nn.ModuleDict({_key(name): stored for name, stored in factors.items()})

    @property
    def bias(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.bias

    def set_bias(self, bias: Tensor | None) -> None:
        self.inner.set_bias(bias)

    def numbers(self) -> dict[str, Tensor]:
        """The factors in floating point, by name."""
        found = {}
        for name, shape in self._shapes.items():
            matrix = self._stored(name).to_dense()
            turned = shape[:-1].numel() > shape[-1]
            found[name] = (matrix.T if turned else matrix).reshape(shape)
        return found

    def _stored(self, name: str) -> GroupedInteger:
        return self.factors[_key(name)]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.inner, self.numbers(), (x,))

    def to_dense(self) -> Tensor:
        return self.opened().to_dense()

    def opened(self) -> Operator:
        """f with all its factors in floating point."""
        with torch.device("meta"):
            made: Any = build(self.describe()["inner"], inside=True)
        made.load_state_dict({**self.inner.state_dict(), **self.numbers()}, assign=True)
        return made

    @property
    def flops(self) -> int:
        """Those of f; making the factors costs 2 for each of their numbers besides, once a call."""
        return self._flops

    def describe(self) -> dict[str, Any]:
        factors = [[name, self._stored(name).describe()] for name in self._shapes]
        inner = {**self._described, "bias": self.bias is not None}
        return {"kind": self.kind, "in": self.in_features, "out": self.out_features, "inner": inner, "factors": factors}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Quantized:
        inner = build(description["inner"], inside=True)
        factors = {name: build(described, inside=True) for name, described in description["factors"]}
        if not isinstance(inner, Operator) or isinstance(inner, Quantized):
            raise ValueError("what is stored in a few bits should be an operator")
        if not all(isinstance(stored, GroupedInteger) for stored in factors.values()):
            raise ValueError("factors in a few bits should be integers in groups")
        return cls(inner, factors)  # type: ignore[arg-type]


class _Emptied(nn.Module):
    """What is left of an `nn.Linear` whose weight is stored elsewhere and comes with each call."""

    bias: Any

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.empty(0))
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def _key(name: str) -> str:
    return name.replace(".", "/")  # the name of a module has no dot


def wide_side_last(factor: Tensor) -> Tensor:
    """A factor as the matrix that is stored of it: its groups lie along the longer side."""
    matrix = factor.reshape(-1, factor.shape[-1])
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
