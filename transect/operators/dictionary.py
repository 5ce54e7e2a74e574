"""Ŵ = S D with a dense dictionary D (k x d_in) and sparse coefficients S (d_out x k), s non-zeros a row (CoSpaDi).

The rows of D are atoms, directions of the input space; every output unit combines s of them. Several layers may share
one dictionary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy.storage import parameter_of
from .base import Operator
from .remade import Remade
from .shared import Bank, Shared

_SUPPORT_CHUNK = 1 << 24  # numbers that the small Gram matrices of a fit may hold at a time


class SparseRows(Remade):
    """z -> S z + b with S (d_out x k) of exactly s non-zeros a row.

    values: the non-zeros (d_out x s), each row in the order of its columns. support: uint8 (d_out x ceil(k / 8)), where
    they are, 8 columns a byte, the lowest bit first. bias: b (d_out) or None.

    It computes with a dense S: with half of its entries present that is faster than a gather. S is made when it is
    first needed and kept (`Remade`), d_out k numbers of memory that no checkpoint holds. Where gradients of the values
    are wanted it is made anew each time.
    """

    support: Tensor

    def __init__(self, atoms: int, d_out: int, nonzeros: int, bias: bool) -> None:
        super().__init__()
        self.atoms = atoms
        self.values = nn.Parameter(torch.empty(d_out, nonzeros))
        self.register_buffer("support", torch.zeros(d_out, -(-atoms // 8), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    @classmethod
    def from_entries(cls, values: Tensor, indices: Tensor, atoms: int) -> SparseRows:
        """From the non-zeros (d_out x s) and their columns (d_out x s), different ones in any order; no bias."""
        d_out, nonzeros = values.shape
        indices, order = indices.sort(1)
        with torch.device("meta"):
            rows = cls(atoms, d_out, nonzeros, False)
        rows.values = parameter_of(values.gather(1, order))
        rows.support = pack_support(indices, atoms)
        return rows

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.linear(z, self.dense(), self.bias)

    def dense(self) -> Tensor:
        """S (d_out x k). Not to be written to."""
        if torch.is_grad_enabled() and self.values.requires_grad:
            return self._made()
        return self.remade((self.values, self.support), self._made)

    def _made(self) -> Tensor:
        empty = torch.zeros(len(self.values), self.atoms, dtype=self.values.dtype, device=self.values.device)
        return empty.masked_scatter(unpack_support(self.support, self.atoms), self.values)

    def indices(self) -> Tensor:
        """The columns of the non-zeros (d_out x s), ascending."""
        return unpack_support(self.support, self.atoms).nonzero()[:, 1].view(self.values.shape)

    def select(self, rows: Tensor) -> SparseRows:
        """The same map restricted to some outputs."""
        bias = None if self.bias is None else parameter_of(self.bias[rows])
        chosen = SparseRows.from_entries(self.values[rows], self.indices()[rows], self.atoms)
        chosen.bias = bias
        return chosen

    @torch.no_grad()
    def refit(self, dictionary: Tensor, weight: Tensor, covariance: Tensor, cross: Tensor | None = None) -> None:
        """Fit the values, in place, to W (d_out x d_in) under C (d_in x d_in); D (k x d_in) and the support stay.

        cross: see `Operator.refit`.

        A row that the rounding to the stored precision would make worse keeps its values.
        """
        dictionary, covariance = dictionary.double(), covariance.double()
        seen = dictionary @ covariance  # D C
        wanted = seen.T if cross is None else cross.double() @ dictionary.T
        gram, target = seen @ dictionary.T, weight.double() @ wanted  # D C Dᵀ (k x k), W E[x x'ᵀ] Dᵀ (d_out x k)
        indices, old = self.indices(), self.values
        new = fit_on_support(gram, target, indices, old.double()).to(old.dtype)
        errors = []
        for values in (old, new):
            rows = torch.zeros_like(target).scatter_(1, indices, values.double())
            errors.append(((rows @ gram - 2 * target) * rows).sum(1))  # E((w - s D) x)² but for E(w x)²
        self.values.copy_(torch.where((errors[1] < errors[0])[:, None], new, old))


class Combining(Operator):
    """What the two operators below share: outputs that combine atoms by sparse `coefficients`."""

    coefficients: SparseRows

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.coefficients.bias

    def set_bias(self, bias: Tensor | None) -> None:
        self.coefficients.bias = None if bias is None else parameter_of(bias)

    @property
    def flops(self) -> int:
        """Of the dense product that is computed; only a sparse kernel would save the zeros of S."""
        return 2 * self.coefficients.atoms * (self.in_features + self.out_features)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "atoms": self.coefficients.atoms,
            "nonzeros": self.coefficients.values.shape[1], "bias": self.bias is not None,
        }  # fmt: skip


class SparseDictionary(Combining):
    """y = S(Dx) + b.

    Stored: D, k d_in numbers; the non-zeros, d_out s numbers; and where they are, d_out ceil(k / 8) bytes. The CoSpaDi
    paper counts neither the padding of a row to whole bytes nor, with 14-bit coefficients at k = 2s, the support at
    all; here all bytes count, and the values have the model's own dtype.

    d_in, d_out: sizes. atoms: k. nonzeros: s, from 1 to k. bias: whether y has a bias (d_out).
    """

    kind = "sparse_dictionary"

    def __init__(self, d_in: int, d_out: int, atoms: int, nonzeros: int, bias: bool) -> None:
        super().__init__(d_in, d_out)
        self.dictionary = nn.Linear(d_in, atoms, bias=False)
        self.coefficients = SparseRows(atoms, d_out, nonzeros, bias)

    @classmethod
    def from_factors(cls, dictionary: Tensor, values: Tensor, indices: Tensor) -> SparseDictionary:
        """From D (k x d_in) and the non-zeros of S (d_out x s) with their columns (d_out x s); no bias."""
        (atoms, d_in), (d_out, nonzeros) = dictionary.shape, values.shape
        with torch.device("meta"):
            operator = cls(d_in, d_out, atoms, nonzeros, False)
        operator.weight = torch.empty(0, dtype=values.dtype, device=values.device)
        operator.dictionary.weight = parameter_of(dictionary)
        operator.coefficients = SparseRows.from_entries(values, indices, atoms)
        return operator

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficients(self.dictionary(x))

    def to_dense(self) -> Tensor:
        return self.coefficients.dense() @ self.dictionary.weight

    def select(self, rows: Tensor | None, columns: Tensor | None) -> SparseDictionary:
        dictionary = self.dictionary.weight if columns is None else self.dictionary.weight[:, columns]
        chosen = SparseDictionary.from_factors(dictionary, self.coefficients.values, self.coefficients.indices())
        chosen.set_bias(self.bias)
        if rows is not None:
            chosen.coefficients = chosen.coefficients.select(rows)
            chosen.out_features = len(rows)
        return chosen.train(self.training)

    def refit(self, weight: Tensor, covariance: Tensor, cross: Tensor | None = None) -> None:
        """The coefficients that are best on their support: least squares, row by row. D and the bias stay."""
        self.coefficients.refit(self.dictionary.weight, weight, covariance, cross)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> SparseDictionary:
        d_in, d_out, atoms, nonzeros = (description[key] for key in ("in", "out", "atoms", "nonzeros"))
        return cls(d_in, d_out, atoms, nonzeros, description["bias"])


class SharedSparseDictionary(Combining, Shared):
    """y = S(Dx) + b with a dictionary D (k x d_in), the bank's weight, that several layers share.

    group, bank, owns_bank: see `Shared`. The rest as in `SparseDictionary`.
    """

    kind = "shared_sparse_dictionary"
    bank: Any

    def __init__(
        self,
        d_in: int,
        d_out: int,
        atoms: int,
        nonzeros: int,
        bias: bool,
        group: str,
        bank: Bank | None,
        owns_bank: bool,
    ) -> None:
        super().__init__(d_in, d_out, group, bank, owns_bank)
        self.coefficients = SparseRows(atoms, d_out, nonzeros, bias)

    @classmethod
    def from_factors(
        cls, bank: Bank, values: Tensor, indices: Tensor, group: str, owns_bank: bool
    ) -> SharedSparseDictionary:
        """From a bank of D (k x d_in) and the non-zeros of S (d_out x s) with their columns (d_out x s); no bias."""
        (atoms, d_in), (d_out, nonzeros) = bank.weight.shape, values.shape
        with torch.device("meta"):
            operator = cls(d_in, d_out, atoms, nonzeros, False, group, bank, owns_bank)
        operator.weight = torch.empty(0, dtype=values.dtype, device=values.device)
        operator.coefficients = SparseRows.from_entries(values, indices, atoms)
        return operator

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficients(nn.functional.linear(x, self.bank.weight))

    def to_dense(self) -> Tensor:
        return self.coefficients.dense() @ self.bank.weight

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"group": self.bank_group, "owns_bank": self.owns_bank}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> SharedSparseDictionary:
        d_in, d_out, atoms, nonzeros = (description[key] for key in ("in", "out", "atoms", "nonzeros"))
        owns_bank = description["owns_bank"]
        bank = Bank(torch.empty(atoms, d_in)) if owns_bank else None
        return cls(d_in, d_out, atoms, nonzeros, description["bias"], description["group"], bank, owns_bank)


def sparse_dictionary_bytes(d_out: int, d_in: int, atoms: int, nonzeros: int, itemsize: int) -> int:
    """Bytes that a sparse dictionary stores: atoms, non-zeros and the bits of their support."""
    return (atoms * d_in + d_out * nonzeros) * itemsize + d_out * -(-atoms // 8)


def pack_support(indices: Tensor, atoms: int) -> Tensor:
    """Columns of the non-zeros (d_out x s) as bits: uint8 (d_out x ceil(k / 8)), the lowest bit first."""
    marked = torch.zeros(len(indices), -(-atoms // 8) * 8, dtype=torch.uint8, device=indices.device)
    marked.scatter_(1, indices, 1)
    return (marked.view(len(indices), -1, 8) << _bit_positions(indices.device)).sum(-1, dtype=torch.uint8)


def unpack_support(support: Tensor, atoms: int) -> Tensor:
    """The bits as booleans (d_out x k)."""
    return ((support[..., None] >> _bit_positions(support.device)) & 1).bool().flatten(1)[:, :atoms]


def _bit_positions(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def fit_on_support(gram: Tensor, target: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Least-squares coefficients on a fixed support: for each row c, min cᵀ G c - 2 cᵀ t over c that is 0 elsewhere.

    gram: G (k x k), positive semidefinite. target: t (n x k). indices, values: the support and the present
    coefficients (n x s). Returns the new ones (n x s), float64.

    What is left, t - G c, is solved for and added, with a ridge of 1e-9 of G's mean diagonal: so the objective falls
    whatever the ridge, and directions that G does not weigh keep their coefficients.
    """
    gram, target, values = gram.double(), target.double(), values.double()
    size = indices.shape[1]
    ridge = 1e-9 * gram.diagonal().mean().clamp_min(1e-300) * torch.eye(size, dtype=torch.float64, device=gram.device)
    fitted = []
    for columns, wanted, old in zip(
        *(tensor.split(max(1, _SUPPORT_CHUNK // size**2)) for tensor in (indices, target, values)), strict=True
    ):
        small = gram[columns[:, :, None], columns[:, None, :]]  # c x s x s
        left = wanted.gather(1, columns) - torch.einsum("nij,nj->ni", small, old)
        factor, failed = torch.linalg.cholesky_ex(small + ridge)
        step = torch.cholesky_solve(left[..., None], factor)[..., 0]
        fitted.append(torch.where((failed == 0)[:, None], old + step, old))
    return torch.cat(fitted)
