"""Ways to store a block's matrices, each with its bytes and the loss increase that K-FAC predicts for it.

The price of putting Ŵ in the place of W is tr(Γ (W - Ŵ) A (W - Ŵ)ᵀ), A = E[x xᵀ] and Γ = E[g gᵀ]: the second-order
increase of the loss under Kronecker-factored curvature, in one unit for every matrix and every structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from ..anatomy import Block, Matrix
from ..errors import OutOfReach
from ..operators import LowRank
from ..operators.dictionary import SparseDictionary
from .dictionary_learning import dictionary_size, learn
from .frame import put
from .nystrom import leverage_scores, nystrom_update
from .weighted_svd import weighted_svd

_RATIO = 2.0  # atoms over non-zeros, CoSpaDi's default


@dataclass(frozen=True)
class Option:
    """One way to store the matrices that it covers.

    structure: `dense`, `low-rank`, `dictionary` or `narrow`. covers: the matrices' names. loss: its price, above.
    put: changes a block, of the model itself or of a copy, accordingly.
    """

    structure: str
    covers: tuple[str, ...]
    bytes: int
    loss: float
    put: Callable[[Block], None]


@dataclass(frozen=True)
class Metric:
    """One matrix with its A (d_in x d_in) and Γ (d_out x d_out), positive definite, float64."""

    matrix: Matrix
    inputs: Tensor
    gradients: Tensor

    @property
    def dense_bytes(self) -> int:
        m, n = self.matrix.shape
        return m * n * self.itemsize

    @property
    def itemsize(self) -> int:
        return self.matrix.module.weight.element_size()

    def price(self, change: Tensor) -> float:
        """tr(Γ Δ A Δᵀ) of Δ = W - Ŵ (d_out x d_in)."""
        return float(((self.gradients @ change) @ self.inputs * change).sum().clamp_min(0))


def dense(metric: Metric) -> Option:
    return Option("dense", (metric.matrix.name,), metric.dense_bytes, 0.0, lambda block: None)


def low_rank_options(metric: Metric, shares: Sequence[float]) -> Iterator[Option]:
    """KFAC-SVD at ranks that cost these shares of the dense bytes."""
    matrix, (m, n) = metric.matrix, metric.matrix.shape
    made = weighted_svd(matrix.weight.double(), metric.gradients, metric.inputs)
    losses, role = made.losses(), matrix.role
    left, right = (factor.float() for factor in made.truncate(max(1, int(max(shares) * m * n / (m + n)))))
    for rank in sorted({int(share * m * n / (m + n)) for share in shares} - {0}):

        def put_low_rank(block: Block, rank: int = rank) -> None:
            put(block.matrix(role), LowRank.from_factors(left[:, :rank], right[:rank]))

        size = rank * (m + n) * metric.itemsize
        yield Option("low-rank", (matrix.name,), size, float(losses[rank]), put_low_rank)


def dictionary_options(metric: Metric, shares: Sequence[float], iterations: int, seed: int) -> Iterator[Option]:
    """Sparse dictionaries (CoSpaDi) of at most these shares of the dense bytes, learned under A; where one fits."""
    matrix, role = metric.matrix, metric.matrix.role
    weight = matrix.weight.double()
    for share in shares:
        try:
            size = dictionary_size(matrix.shape, metric.itemsize, share, _RATIO)
        except OutOfReach:
            continue
        learned = learn(weight, metric.inputs, **size.chosen, iterations=iterations, shrinkage=0.0, seed=seed)
        operator = SparseDictionary.from_factors(learned.dictionary.float(), learned.values.float(), learned.indices)

        def put_dictionary(block: Block, operator: SparseDictionary = operator) -> None:
            put(block.matrix(role), operator.select(None, None))  # a copy: it may be put in several models

        price = metric.price(weight - learned.to_dense())
        yield Option("dictionary", (matrix.name,), size.bytes, price, put_dictionary)


def narrow_mlp_options(metrics: Sequence[Metric], shares: Sequence[float], ridge: float) -> Iterator[Option]:
    """The neurons that the others predict worst, the down matrix making up for the rest (MoDeGPT's type I).

    metrics: of one block's up, down and, where there is one, gate. The price is that of the down matrix's error: on its
    inputs the kept neurons are exact.
    """
    by_role = {metric.matrix.role: metric for metric in metrics}
    down = by_role["down"]
    weight = down.matrix.weight.double()  # d x d_ff
    order = leverage_scores(down.inputs, ridge).argsort(descending=True)
    per_neuron = sum(metric.dense_bytes for metric in metrics) // len(order)
    for share in shares:
        count = int(share * len(order))
        if count < 1:
            continue
        kept = order[:count].sort().values
        update = nystrom_update(weight, down.inputs, kept)
        replaced = torch.zeros_like(weight)
        replaced[:, kept] = update

        def put_narrow(block: Block, kept: Tensor = kept, update: Tensor = update) -> None:
            mlp = block.mlp
            assert mlp is not None
            mlp.keep(kept.tolist())
            block.matrix("down").write(update)

        names = tuple(metric.matrix.name for metric in metrics)
        yield Option("narrow", names, count * per_neuron, down.price(weight - replaced), put_narrow)


def choose(options: Sequence[Option], budget: float) -> list[Option]:
    """The options of least total price that cover every matrix once, in at most `budget` bytes: an integer program.

    Raises OutOfReach where no choice is that small.
    """
    names = sorted({name for option in options for name in option.covers})
    row = {name: index for index, name in enumerate(names)}
    entries = [(row[name], column) for column, option in enumerate(options) for name in option.covers]
    rows, columns = np.array(entries).T
    covering = csr_array((np.ones(len(entries)), (rows, columns)), shape=(len(names), len(options)))
    sizes = np.array([option.bytes for option in options], dtype=float)
    prices = np.array([option.loss for option in options])
    result = milp(
        prices / max(prices.max(), 1e-300),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(covering, np.ones(len(names)), np.ones(len(names))),  # type: ignore[arg-type]
            LinearConstraint(sizes[None] / budget, 0, 1),
        ],
        options={"time_limit": 60, "mip_rel_gap": 1e-4},
    )
    if result.x is None:
        smallest = sum(min(o.bytes for o in options if o.covers == (name,)) for name in names)
        raise OutOfReach(f"no choice of structures fits {budget:.0f} bytes; the smallest takes about {smallest}")
    return [option for option, taken in zip(options, result.x, strict=True) if taken > 0.5]
