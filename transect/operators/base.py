"""The contract of a structured stand-in for a dense linear map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy.storage import parameter_of
from ..errors import TransectError


class Described(nn.Module):
    """A module that a structure record can describe and a checkpoint builds again.

    A subclass that stands for itself sets `kind`, and defines `describe` and `from_description`.
    """

    kind: str

    def describe(self) -> dict[str, Any]:
        """JSON from which `operators.build` makes the same module, without its numbers."""
        raise NotImplementedError

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Described:
        """The module that `describe` described, with uninitialised numbers."""
        raise NotImplementedError


class Operator(Described):
    """y = Ŵx + b with Ŵ (d_out x d_in) stored in some structure.

    A subclass sets `kind`, calls `super().__init__(d_in, d_out)`, holds its numbers in parameters or in submodules and
    its indices in buffers, has an attribute `bias` (a parameter or None), and defines `forward`, `to_dense`, `flops`,
    `describe`, `from_description`, and `select` where that makes sense. Numbers that are given to it become
    parameters by `parameter_of`.

    The buffer `weight` is empty on purpose. In a checkpoint it stands under the name of the dense matrix that is
    gone, so that transformers without Transect stops at a shape mismatch; with the name missing it would only warn,
    and run on random numbers.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features = d_in
        self.out_features = d_out
        self.register_buffer("weight", torch.empty(0))

    bias: Any

    @property
    def coded(self) -> int:
        """How many numbers it stores as codes of a few bits, in no parameter; an operator inside counts its own."""
        return 0

    def set_bias(self, bias: Tensor | None) -> None:
        """Give the map the bias b (d_out), or none."""
        self.bias = None if bias is None else parameter_of(bias)

    def to_dense(self) -> Tensor:
        """Ŵ (d_out x d_in)."""
        raise NotImplementedError

    def select(self, rows: Tensor | None, columns: Tensor | None) -> Operator:
        """The same map restricted to some outputs (rows) and inputs (columns)."""
        raise TransectError(f"a matrix stored as {self.kind!r} cannot lose rows or columns; cut it while dense")

    def refit(self, weight: Tensor, covariance: Tensor, cross: Tensor | None = None) -> None:
        """Change the last factor, in place, so that E||W x - Ŵ x'||² is least, the others as they are.

        weight: W (d_out x d_in). covariance: E[x' x'ᵀ] (d_in x d_in) of the inputs that the operator sees.
        cross: E[x x'ᵀ] (d_in x d_in) with the inputs x of the target; None where they are the same.
        For the operators of methods that have a refit.
        """
        raise NotImplementedError

    @property
    def flops(self) -> int:
        """Floating point operations (a multiply-add counts 2) to apply Ŵ to one vector."""
        raise NotImplementedError


def stored_bytes(module: nn.Module) -> int:
    """Bytes of every number that the module stores, bias included."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def flops_of(module: Any) -> int:
    """FLOPs (a multiply-add counts 2) to apply a dense or structured map to one vector, without its bias."""
    flops = getattr(module, "flops", None)
    return flops if flops is not None else 2 * module.weight.numel()
