"""Ways to store a block's matrices, each with its bytes and the loss increase that K-FAC predicts for it.

The price of putting Ŵ in the place of W is tr(Γ (W - Ŵ) A (W - Ŵ)ᵀ), A = E[x xᵀ] and Γ = E[g gᵀ]: the second-order
increase of the loss under Kronecker-factored curvature, in one unit for every matrix and every structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from ....anatomy import MLP, Attention, Block, Experts, Matrix
from ....errors import OutOfReach
from ....operators import LowRank
from ....operators.dictionary import SparseDictionary
from ...cholesky import raised_cholesky
from ...dictionary_learning import dictionary_size, learn
from ...frame import put
from ...head_width import narrower_values, strongest_channels
from ...narrow_heads import (
    are_normalised,
    has_regular_heads,
    keep_channels,
    put_values,
    queries_are_keys,
    query_key_bytes,
    value_bytes,
)
from ...nystrom import leverage_scores, nystrom_update
from ...sizes import dense_bytes, neuron_bytes
from ...weighted_svd import Factorization, weighted_svd

MLP_ROLES = ("gate", "up", "down")
RATIO = 2.0  # atoms over non-zeros, CoSpaDi's default


@dataclass(frozen=True)
class Option:
    """One way to store the matrices that it covers.

    structure: `dense`, `low-rank`, `dictionary`, `narrow`, `integer`, `corrected` or `integer low-rank`.
    covers: the names of its matrices.
    loss: its price, above. put: changes a block, of the model itself or of a copy, accordingly.
    share: of the dense bytes that it was made for; `bytes` may be a little less.
    """

    structure: str
    covers: tuple[str, ...]
    bytes: int
    loss: float
    put: Callable[[Block], None]
    share: float = 1.0


@dataclass(frozen=True)
class Metric:
    """One matrix with its A (d_in x d_in) and Γ (d_out x d_out), positive definite, and E[x] (d_in); all float64."""

    matrix: Matrix
    inputs: Tensor
    gradients: Tensor
    mean: Tensor

    @property
    def dense_bytes(self) -> int:
        return dense_bytes(self.matrix)

    @property
    def itemsize(self) -> int:
        return self.matrix.module.weight.element_size()

    def price(self, change: Tensor) -> float:
        """tr(Γ Δ A Δᵀ) of Δ = W - Ŵ (d_out x d_in)."""
        return float(((self.gradients @ change) @ self.inputs * change).sum().clamp_min(0))


MetricOf = Callable[[Matrix], Metric]


def named(block: Block, name: str) -> Matrix:
    """The block's matrix of that name."""
    return next(matrix for matrix in block.matrices() if matrix.name == name)


def dense(metric: Metric) -> Option:
    return Option("dense", (metric.matrix.name,), metric.dense_bytes, 0.0, lambda block: None)


def factorized(metric: Metric) -> Factorization:
    """The KFAC-SVD of a matrix."""
    return weighted_svd(metric.matrix.weight.double(), metric.gradients, metric.inputs)


def low_rank_options(matrix: Matrix, losses: Tensor, metric_of: MetricOf, shares: Sequence[float]) -> Iterator[Option]:
    """KFAC-SVD at ranks that cost these shares of the dense bytes.

    losses: of the matrix's factorization, by rank. metric_of: gives its metric again when the option is taken.
    """
    (m, n), itemsize = matrix.shape, matrix.module.weight.element_size()
    for rank in sorted({int(share * m * n / (m + n)) for share in shares} - {0}):

        def put_low_rank(block: Block, rank: int = rank) -> None:
            left, right = factorized(metric_of(matrix)).truncate(rank)
            put(named(block, matrix.name), LowRank.from_factors(left.float(), right.float()))

        yield Option("low-rank", (matrix.name,), rank * (m + n) * itemsize, float(losses[rank]), put_low_rank)


def dictionary_options(metric: Metric, shares: Sequence[float], iterations: int, seed: int) -> Iterator[Option]:
    """Sparse dictionaries (CoSpaDi) of at most these shares of the dense bytes; none where they pay for no atom.

    They are learned under A for the rows of W times (Γ_ii)^½, so that outputs count as much as they matter. The rest of
    Γ would mix the rows, whose coefficients would then not be sparse; the price has all of it.
    """
    matrix = metric.matrix
    weight = matrix.weight.double()
    strengths = metric.gradients.diagonal()  # Γ_ii; an output that no gradient reaches counts next to nothing
    scale = strengths.clamp_min(1e-12 * strengths.mean()).sqrt()[:, None] if strengths.any() else 1.0
    for share in shares:
        try:
            size = dictionary_size(matrix.shape, metric.itemsize, share, RATIO)
        except OutOfReach:
            continue
        learned = learn(weight * scale, metric.inputs, **size.chosen, iterations=iterations, shrinkage=0.0, seed=seed)
        learned = learned._replace(values=learned.values / scale)
        operator = SparseDictionary.from_factors(learned.dictionary.float(), learned.values.float(), learned.indices)

        def put_dictionary(block: Block, operator: SparseDictionary = operator) -> None:
            put(named(block, matrix.name), operator.select(None, None))  # a copy: it may be put in several models

        price = metric.price(weight - learned.to_dense())
        yield Option("dictionary", (matrix.name,), size.bytes, price, put_dictionary, share)


def narrow_mlp_options(
    metrics: Sequence[Metric], metric_of: MetricOf, shares: Sequence[float], ridge: float
) -> Iterator[Option]:
    """The neurons that the others predict worst, the down matrix making up for the rest (MoDeGPT's type I).

    metrics: of one block's matrices; nothing is offered where it has no MLP. The price is that of the down matrix's
    error: on its inputs the kept neurons are exact. metric_of: gives its metric again when the option is taken.
    """
    by_role = {metric.matrix.role: metric for metric in metrics if metric.matrix.role in MLP_ROLES}
    mlp = metrics[0].matrix.block.mlp  # None where a part has a matrix of that name
    if not by_role or not isinstance(mlp, MLP) or not mlp.can_narrow:
        return
    metrics, down = list(by_role.values()), by_role["down"]
    weight = down.matrix.weight.double()  # d x d_ff
    order = leverage_scores(down.inputs, ridge).argsort(descending=True)
    per_neuron = neuron_bytes(down.matrix.block)  # type: ignore[arg-type]
    for share in shares:
        count = int(share * len(order))
        if count < 1:
            continue
        kept = order[:count].sort().values
        replaced = torch.zeros_like(weight)
        replaced[:, kept] = nystrom_update(weight, down.inputs, kept)

        def put_narrow(block: Block, kept: Tensor = kept, matrix: Matrix = down.matrix) -> None:
            mlp = block.mlp
            assert mlp is not None
            update = nystrom_update(matrix.weight.double(), metric_of(matrix).inputs, kept)
            mlp.keep(kept.tolist())
            block.matrix("down").write(update)

        names = tuple(metric.matrix.name for metric in metrics)
        yield Option("narrow", names, count * per_neuron, down.price(weight - replaced), put_narrow)


def can_narrow_queries(attention: Attention | None) -> bool:
    """Whether channels of queries and keys can be left out."""
    return (
        attention is not None
        and has_regular_heads(attention)
        and not (queries_are_keys(attention) or are_normalised(attention))
    )


def narrow_query_key_options(metrics: Sequence[Metric], shares: Sequence[float]) -> Iterator[Option]:
    """The channels of queries and keys that matter most, the same number for each head (MoDeGPT's type II).

    metrics: of one block's matrices; nothing is offered where the shapes, or norms on queries and keys, forbid it.
    A channel that is gone takes its products q_i k_i with it. Setting q_i alone to 0 does the same, and so does k_i
    alone; so K-FAC at q and K-FAC at k each predict the whole price. We take the mean of the two, for the price of an
    option and, channel by channel and summed over the query heads of a group, to rank the channels.
    """
    by_role = {metric.matrix.role: metric for metric in metrics}
    attention = metrics[0].matrix.block.attention
    if attention is None or not can_narrow_queries(attention):
        return
    size, key_heads, rotary = attention.head_size, attention.key_value_heads, attention.block.rotary_width
    query, key = by_role["q"], by_role["k"]
    prices = [metric.gradients * _output_moments(metric) for metric in (query, key)]  # of zeroing rows i and j: Σ_ij
    power = sum(price.diagonal().view(key_heads, -1, size).sum(1) for price in prices)
    names = (query.matrix.name, key.matrix.name)
    for count in channel_counts(attention, shares):
        channels = strongest_channels(
            torch.as_tensor(power).clamp_min(0), rotary, count, attention.block.rotates_neighbours
        )
        loss = 0.0
        for price in prices:
            heads = len(price) // size
            gone = torch.ones(heads, size, dtype=torch.bool, device=price.device)
            gone.scatter_(1, channels.repeat_interleave(heads // key_heads, dim=0), False)
            loss += float(price[gone.flatten()][:, gone.flatten()].sum()) / 2

        def put_channels(block: Block, channels: Tensor = channels) -> None:
            assert block.attention is not None
            keep_channels(block.attention, channels)

        yield Option("narrow", names, query_key_bytes(attention, count), max(loss, 0.0), put_channels)


def channel_counts(attention: Attention, shares: Sequence[float]) -> list[int]:
    """Channels of a query/key head at these shares of its width, even where there are only rotary pairs."""
    size = attention.head_size
    step = 2 if attention.block.rotary_width == size else 1
    return sorted({int(share * size) // step * step for share in shares} - {0})


def _output_moments(metric: Metric) -> Tensor:
    """E[y yᵀ] (d_out x d_out) of y = Wx + b."""
    weight, bias = metric.matrix.weight.double(), metric.matrix.bias
    moments = weight @ metric.inputs @ weight.T
    if bias is not None:
        cross = torch.outer(bias.double(), weight @ metric.mean)
        moments = moments + cross + cross.T + torch.outer(bias.double(), bias.double())
    return moments


def narrow_value_options(
    metrics: Sequence[Metric], metric_of: MetricOf, shares: Sequence[float]
) -> Iterator[Option]:  # fmt: skip
    """Fewer values a head, in the best basis of each, the output matrix making up for the rest (MoDeGPT's type III).

    metrics: of one block's matrices; nothing is offered where the shapes forbid it. The values z of all heads are what
    o reads, so the problem is put in o's metric: for each key/value head, the basis of the SVD of Γ^½ O A^½, of its
    query heads together, A their mean covariance; then O', over all heads, is what reproduces O z best from the values
    that stay (Nyström, as for neurons), and the price is that of the error. MoDeGPT uses the covariance of the block's
    input and neither Γ nor the correlations between heads. metric_of: gives a matrix's metric again when it is needed.
    """
    by_role = {metric.matrix.role: metric for metric in metrics}
    attention = metrics[0].matrix.block.attention
    if attention is None or not has_regular_heads(attention):
        return
    heads, key_heads, out, value = attention.heads, attention.key_value_heads, by_role["o"], by_role["v"].matrix
    weight, size = out.matrix.weight.double(), attention.head_size
    turned = _turned_values(out, heads, key_heads)
    for count in sorted({int(share * size) for share in shares} - {0}):
        kept = turned.kept(count)
        replaced = torch.zeros_like(weight)
        replaced[:, kept] = nystrom_update(turned.weight, turned.inputs, kept)
        loss = out.price(weight - replaced @ turned.all_heads)

        def put_narrow_values(block: Block, count: int = count) -> None:
            again = _turned_values(metric_of(out.matrix), heads, key_heads)
            columns = nystrom_update(again.weight, again.inputs, again.kept(count))
            rows = (again.basis[:, :count] @ value.weight.double().view(key_heads, size, -1)).flatten(0, 1)
            bias = None
            if value.bias is not None:
                bias = value.bias.new_zeros(key_heads, size)
                bias[:, :count] = (again.basis[:, :count] @ value.bias.double().view(key_heads, size, 1))[..., 0]
                bias = bias.flatten()
            assert block.attention is not None
            put_values(block.attention, rows.float(), columns.float(), bias, block.attention.o.bias)

        yield Option("narrow", (value.name, out.matrix.name), value_bytes(attention, count), loss, put_narrow_values)


class _TurnedValues(NamedTuple):
    """The values of all heads in their own bases.

    basis: T of each key/value head (key heads x size x size), the most important values first. all_heads: T of all
    query heads (d x d). weight: O T⁻¹. inputs: E[T z zᵀ Tᵀ].
    """

    basis: Tensor
    all_heads: Tensor
    weight: Tensor
    inputs: Tensor

    def kept(self, count: int) -> Tensor:
        """Where the first values of every query head are."""
        size = self.basis.shape[-1]
        starts = torch.arange(0, len(self.all_heads), size, device=self.basis.device)[:, None]
        return (starts + torch.arange(count, device=self.basis.device)).flatten()


def _turned_values(out: Metric, heads: int, key_heads: int) -> _TurnedValues:
    weight = out.matrix.weight.double()
    d, size, group = len(weight), weight.shape[1] // heads, heads // key_heads
    within = out.inputs.view(heads, size, heads, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # A of each head
    within = within.unflatten(0, (key_heads, group)).mean(1)
    weighed = raised_cholesky(out.gradients)[0].T @ weight
    weighed = weighed.view(d, key_heads, group, size).permute(1, 2, 0, 3).flatten(1, 2)  # key heads, group · d, size
    identity = torch.eye(size).to(weight).expand(key_heads, -1, -1)
    basis, _ = narrower_values(identity, weighed, within, size)
    all_heads = torch.block_diag(*basis.repeat_interleave(group, dim=0))
    turned = torch.linalg.solve(all_heads, weight, left=False)  # O T⁻¹
    return _TurnedValues(basis, all_heads, turned, all_heads @ out.inputs @ all_heads.T)


def least_narrow_bytes(block: Block, widths: Sequence[float], neurons: Sequence[float]) -> int:
    """What a block's matrices take when it is as narrow as the smallest of these shares make it, in bytes."""
    sizes = {matrix.role: dense_bytes(matrix) for matrix in block.matrices()}
    attention, mlp = block.attention, block.mlp
    total = 0
    if attention is not None:
        total = sizes["q"] + sizes["k"] + sizes["v"] + sizes["o"]
        if can_narrow_queries(attention):
            total += (
                min(query_key_bytes(attention, n) for n in channel_counts(attention, widths)) - sizes["q"] - sizes["k"]
            )
        if has_regular_heads(attention):
            count = max(1, int(min(widths) * attention.head_size))
            total += value_bytes(attention, count) - sizes["v"] - sizes["o"]
    if isinstance(mlp, Experts):
        total += sum(dense_bytes(matrix) for matrix in mlp.matrices())
    elif mlp is not None:
        total += neuron_bytes(block) * max(1, int(min(neurons) * mlp.neurons))
    return total


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
