"""Weight matching: the order of a model's units in which its weights lie closest to another model's.

A unit is a set of things that can change places without changing the function: a layer's neurons, the heads of an
attention, the channels of the residual stream. The sum of squares between two models θ_A and P(θ_B) falls as the inner
product ⟨θ_A, P(θ_B)⟩ rises, and in that each unit's order, with all others as they are, is a linear assignment that is
solved exactly (Ainsworth et al. 2023, algorithm 1).

An order is an index: order[i] is the number that B's thing has now which takes place i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..statistics import Progress

LEAST = 1e-12  # by how much the inner product must rise, relative to its size, for an order to count as better


class Unit(Protocol):
    """Things of B that can change places.

    place: what else its order depends on: units of the same place, and all of the place "" (the residual stream), whose
    order depends on every unit's.
    """

    place: str

    @property
    def count(self) -> int:
        """How many things there are."""
        ...

    def best(self) -> tuple[list[int], float]:
        """The best order with everything else as it is, and by how much the inner product rises with it."""
        ...

    def put(self, order: Sequence[int]) -> None:
        """Let B have this order."""
        ...


@dataclass(frozen=True)
class Matched:
    """What a matching did: sweeps over the units, orders that were changed, and by how much ⟨θ_A, P(θ_B)⟩ rose."""

    sweeps: int
    changed: int
    gain: float


def assign(products: Tensor) -> tuple[list[int], float]:
    """The order with the largest sum of products[i, order[i]] (n x n), and by how much it exceeds the trace."""
    table = products.double().cpu()
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    chosen = table[rows, columns]
    gain = float(chosen.sum() - table.trace())
    if gain <= LEAST * float(chosen.abs().sum()):  # the same, but for rounding: nothing changes places
        return list(range(len(table))), 0.0
    return columns.tolist(), gain


def products_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ A Bᵀ over pairs of tensors whose first dimensions are the things of A and of B, in float64 (n x n)."""
    total: Any = 0
    for a, b in pairs:
        total = total + a.double().flatten(1) @ b.double().flatten(1).T
    return total


class RowUnit:
    """A unit whose things are, in every tensor that they touch, an index of one axis.

    A subclass says `rows()`: pairs of tensors of A and of B, with that axis first.
    """

    place = ""

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """See the class."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """How many things there are."""
        return len(self.rows()[0][0])

    def best(self) -> tuple[list[int], float]:
        """See `Unit`."""
        return assign(products_of(self.rows()))


@torch.no_grad()
def match(
    units: Sequence[Unit], generator: torch.Generator, sweeps: int = 100, progress: Progress | None = None
) -> Matched:
    """Coordinate ascent: the units in random order, each at its best, until a whole sweep changes nothing.

    A unit is looked at again only if something that its order depends on has changed since.
    """
    stamp, changed, total, done = 0, 0, 0.0, 0
    last = {"": 0}  # place -> when something of it changed last; "*": when anything did
    seen = [-1] * len(units)
    for sweep in range(sweeps):
        moved = False
        turns = torch.randperm(len(units), generator=generator).tolist()
        for number in progress(turns, f"matching, sweep {sweep + 1}") if progress else turns:
            unit = units[number]
            newest = last.get("*", 0) if unit.place == "" else max(last[""], last.get(unit.place, 0))
            if seen[number] >= newest:
                continue
            seen[number] = stamp
            order, gain = unit.best()
            if gain > 0:
                unit.put(order)
                stamp += 1
                last[unit.place] = last["*"] = stamp
                seen[number] = stamp  # at its best, with all others as they are
                changed, total, moved = changed + 1, total + gain, True
        done = sweep + 1
        if not moved:
            break
    return Matched(done, changed, total)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The length of the difference over all tensors."""
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in a)) ** 0.5


def spectral_alignment(pairs: Iterable[tuple[Tensor, Tensor]], least: float = 0.0) -> float:
    """How far two models' singular vectors point the same way: 1 where they are the same, about 0 for random ones.

    Σ_l Σ_ij (u_i·u'_j)(v_i·v'_j) over pairs of matrices, divided by the number of vectors; only those count whose
    singular value is at least the share `least` of the matrix's largest (Ito et al. 2025; our normalisation: the
    smaller number of the two). ⟨A, B⟩ is the same sum with the products of singular values, which no permutation
    changes.
    """
    total, vectors = 0.0, 0
    for one, other in pairs:
        (u, s, v), (w, t, z) = (torch.linalg.svd(matrix.double(), full_matrices=False) for matrix in (one, other))
        first, second = int((s >= least * s[0]).sum()), int((t >= least * t[0]).sum())
        total += float(((u[:, :first].T @ w[:, :second]) * (v[:first] @ z[:second].T)).sum())
        vectors += min(first, second)
    return total / vectors
