"""Matrices of several layers as mixtures of shared atoms (MASA: Zhussip et al., AAAI 2026, arXiv:2508.04581)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..anatomy.storage import parameter_of
from .remade import Remade
from .shared import Bank, Shared


class Atoms(Remade, Shared):
    """y = Ŵx + b with Ŵ = Σ_s c_s D_s, and + L R where there is a correction of rank r.

    The atoms D (S x d_out x d_in) are the bank's weight, which the layers of a group share; the coefficients c (S), L
    (d_out x r), R (r x d_in) and b are the layer's own. Ŵ is built for every call, S multiply-adds an entry, and then
    applied like a dense matrix. Without gradients it is built once and kept until a number changes, see `Remade`.

    d_in, d_out: sizes. atoms: S. rank: r, 0 for no correction. bias: whether y has a bias (d_out). group, bank,
    owns_bank: see `Shared`; an owner without a bank makes an uninitialised one.
    """

    kind = "atoms"
    bank: Any

    def __init__(
        self, d_in: int, d_out: int, atoms: int, rank: int, bias: bool, group: str, bank: Bank | None, owns_bank: bool
    ) -> None:
        if owns_bank and bank is None:
            bank = Bank(torch.empty(atoms, d_out, d_in))
        super().__init__(d_in, d_out, group, bank, owns_bank)
        self.coefficients = nn.Parameter(torch.empty(atoms))
        self.left = nn.Parameter(torch.empty(d_out, rank)) if rank else None
        self.right = nn.Parameter(torch.empty(rank, d_in)) if rank else None
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    @classmethod
    def from_numbers(
        cls,
        group: str,
        bank: Bank,
        owns_bank: bool,
        coefficients: Tensor,
        correction: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> Atoms:
        """From a bank of S atoms, c (S), (L, R) or None, and b (d_out)."""
        atoms, d_out, d_in = bank.weight.shape
        with torch.device("meta"):
            operator = cls(d_in, d_out, atoms, 0, False, group, bank, owns_bank)
        operator.weight = coefficients.new_empty(0)
        operator.coefficients = parameter_of(coefficients)
        if correction is not None:
            operator.left, operator.right = map(parameter_of, correction)
        operator.set_bias(bias)
        return operator

    def to_dense(self) -> Tensor:
        atoms = self.bank.weight
        mixed = (self.coefficients @ atoms.flatten(1)).view(atoms.shape[1:])
        return mixed if self.left is None or self.right is None else torch.addmm(mixed, self.left, self.right)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._matrix(x.device.type), self.bias)

    def _matrix(self, device: str) -> Tensor:
        """Ŵ; the one that was built before if nothing has changed and nobody asks for gradients."""
        sources = [one for one in (self.bank.weight, self.coefficients, self.left, self.right) if one is not None]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
            return self.to_dense()
        return self.remade(sources, self.to_dense)

    @property
    def flops(self) -> int:
        return 2 * self.in_features * self.out_features

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "atoms": len(self.coefficients),
            "rank": 0 if self.right is None else len(self.right), "bias": self.bias is not None,
            "group": self.bank_group, "owns_bank": self.owns_bank,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Atoms:
        sizes = [description[key] for key in ("in", "out", "atoms", "rank", "bias", "group")]
        return cls(*sizes, bank=None, owns_bank=description["owns_bank"])


class CoefficientBank(Bank):
    """Atoms, and the network that gives each layer its coefficients while they are trained: three linear layers.

    weight: D (S x d_out x d_in). embedding, hidden: widths of the network's input and of its two hidden layers.
    """

    def __init__(self, weight: Any, embedding: int, hidden: int) -> None:
        super().__init__(weight)
        self.network = nn.Sequential(
            nn.Linear(embedding, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, len(self.weight)),
        )  # fmt: skip


class EmbeddedAtoms(Shared):
    """The form of `Atoms` that is trained: c = f(e), an embedding e of the layer through a network that layers share.

    bank: a `CoefficientBank`, with the atoms and f. The rest as for `Atoms`. See `transect.layers.masa`.
    """

    kind = "embedded_atoms"
    bank: Any

    def __init__(
        self, d_in: int, d_out: int, atoms: int, embedding: int, hidden: int, bias: bool, group: str,
        bank: CoefficientBank | None, owns_bank: bool,
    ) -> None:  # fmt: skip
        if owns_bank and bank is None:
            bank = CoefficientBank(torch.empty(atoms, d_out, d_in), embedding, hidden)
        super().__init__(d_in, d_out, group, bank, owns_bank)
        self.sizes = {"atoms": atoms, "embedding": embedding, "hidden": hidden}
        self.embedding = nn.Parameter(torch.empty(embedding))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    @property
    def coefficients(self) -> Tensor:
        """c (S)."""
        return self.bank.network(self.embedding)

    def to_dense(self) -> Tensor:
        atoms = self.bank.weight
        return (self.coefficients @ atoms.flatten(1)).view(atoms.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.to_dense(), self.bias)

    @property
    def flops(self) -> int:
        return 2 * self.in_features * self.out_features

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, **self.sizes,
            "bias": self.bias is not None, "group": self.bank_group, "owns_bank": self.owns_bank,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> EmbeddedAtoms:
        sizes = [description[key] for key in ("in", "out", "atoms", "embedding", "hidden", "bias", "group")]
        return cls(*sizes, bank=None, owns_bank=description["owns_bank"])
