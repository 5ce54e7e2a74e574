"""MoDeGPT: modular decomposition of a transformer's blocks (Lin et al., ICLR 2025, arXiv:2408.09632)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from ...anatomy import MLP, Attention, Block, Matrix
from ...anatomy.storage import is_dense
from ...errors import OutOfReach, TransectError
from ...statistics import InputCovariance, InputMean, Statistics, key_of
from ..head_width import narrower_values, output_power, strongest_channels
from ..narrow_heads import (
    are_normalised,
    has_regular_heads,
    keep_channels,
    put_values,
    queries_are_keys,
    query_key_bytes,
    value_bytes,
)
from ..nystrom import leverage_scores, nystrom_update
from ..registry import Range, slicing
from ..sizes import dense_bytes, neuron_bytes
from ..weighted_svd import shrink

_VALUE_SHRINKAGE = 1e-6  # of the attention input's covariance, so that directions it never saw still count a little


@dataclass(frozen=True)
class Widths:
    """What stays of a block: channels of each query/key head and of each value head, and neurons."""

    channels: int
    values: int
    neurons: int


def check(block: Block, keep: float, *, ridge: float, query_key_removal: float, selection: str, update: bool) -> None:
    """Refuse what cannot be sliced, and budgets too small for one channel of each head and one neuron."""
    for matrix in block.matrices():
        if not is_dense(matrix.module):
            raise TransectError(
                f"{matrix.name} is stored as {type(matrix.module).__name__}; modegpt slices dense matrices: apply it "
                "to the dense model"
            )
    attention = block.attention
    if attention is not None:
        q, k, v = attention.q, attention.k, attention.v
        if not has_regular_heads(attention):
            raise TransectError(
                f"{q.name}, k, v, o of shapes {q.shape}, {k.shape}, {v.shape}, {attention.o.shape} do not consist of "
                f"heads of size {attention.head_size}"
            )
        if queries_are_keys(attention):
            raise TransectError(f"{q.name} and {k.name} are one tensor: modegpt cannot slice tied queries and keys")
    widths_for(block, keep, query_key_removal)


def widths_for(block: Block, keep: float, query_key_removal: float) -> Widths:
    """The widths that `keep` of the block's bytes pay for; OutOfReach where there are none.

    Values and neurons lose one share φ, queries and keys query_key_removal · φ, nothing if they are normalised; then φ
    is what the budget asks for. Widths within heads are rounded down, and what that leaves goes to the neurons.
    """
    dense = sum(map(dense_bytes, block.matrices()))
    budget = int(keep * dense * (1 + 1e-12))
    attention, mlp = block.attention, block.mlp
    neurons = mlp.neurons if mlp is not None else 0
    per_neuron = neuron_bytes(block)
    if attention is None:
        widths = Widths(0, 0, min(neurons, budget // max(per_neuron, 1)))
        if widths.neurons < 1:
            raise OutOfReach(_too_little(block, keep))
        return widths

    size = attention.head_size
    relative = 0.0 if are_normalised(attention) else query_key_removal
    query_key = query_key_bytes(attention, size)
    removable = dense - (1 - relative) * query_key
    removed = (1 - keep) * dense / removable  # φ
    if removed >= 1:
        raise OutOfReach(_too_little(block, keep))
    step = 2 if block.rotary_width == size else 1
    channels = max(step, int((1 - relative * removed) * size + 1e-9) // step * step) if relative else size
    values = max(1, int((1 - removed) * size + 1e-9))

    def left(channels: int, values: int) -> int:
        return budget - query_key_bytes(attention, channels) - value_bytes(attention, values)

    fitting = left(channels, values) // per_neuron if neurons else 0
    if left(channels, values) < 0 or (neurons and fitting < 1):
        raise OutOfReach(_too_little(block, keep))
    if fitting >= neurons:  # every neuron is paid for: the rest buys width within the heads
        spent = neurons * per_neuron
        while channels < size and left(channels + step, values) >= spent:
            channels += step
        while values < size and left(channels, values + 1) >= spent:
            values += 1
    return Widths(channels, values, min(neurons, fitting))


def _too_little(block: Block, keep: float) -> str:
    return (
        f"keep={keep:.4g} of block {block.index} does not pay for one channel of each head (two with rotary positions) "
        "and one neuron; queries and keys that are normalised, or removed less, must be paid for first"
    )


@slicing(
    "modegpt",
    paper="arXiv:2408.09632",
    check=check,
    needs=[InputCovariance(), InputMean()],
    allocation="similarity",
)
def modegpt(
    block: Block,
    statistics: Statistics,
    keep: float,
    *,
    ridge: Annotated[float, Range(1e-6, 1e3)] = 1e-2,
    query_key_removal: Annotated[float, Range(0, 1)] = 1.0,
    selection: Literal["leverage", "magnitude"] = "leverage",
    update: bool = True,
) -> None:
    """Make every block narrower inside: fewer MLP neurons, query/key channels and value channels, in closed form.

    MLP: the neurons of the largest ridge leverage scores stay, and the down matrix makes up for the others. Queries and
    keys: of each key/value head the channels (pairs, under rotary positions) of the largest √(E[q_i²] E[k_i²]) stay,
    summed over the query heads that share them; the softmax scale and the rotation frequencies stay as well. Values
    and outputs: O V of each head is replaced by its best approximation on the calibration data; where several query
    heads share their values, it is that of their O on top of one another (ours; the paper has no grouped heads). How
    much each block loses is the paper's `similarity` allocation, unless another is named.

    Where queries and keys are normalised after their projection (Qwen3, Gemma 3, OLMo-2), dropping channels would
    change the norm of the others: they stay dense, and MLP and values pay for it. The model's own attention still sees
    heads of full size, zeros where channels are gone, so the key/value cache stays as large. Widths within heads are
    rounded down, the paper's up, and what is left goes to the neurons; they need not be multiples of 8.

    ridge: λ of the leverage scores, relative to mean diag E[h hᵀ]; the default is a re-implementation's. The update
        itself and the values' covariance have a ridge and a shrinkage of 1e-6, ours.
    query_key_removal: share removed from queries and keys, relative to that removed from MLP and values; below 1 these
        lose more instead. 1 is the paper's; other values are our addition.
    selection: neurons stay by leverage scores, or by the magnitude of their weights, as a baseline.
    update: whether the down matrix is recomputed for the neurons that stay; false only cuts it, as a baseline.
    """
    widths = widths_for(block, keep, query_key_removal)
    attention, mlp = block.attention, block.mlp
    if attention is not None and widths.channels < attention.head_size:
        _slice_queries_and_keys(attention, statistics, widths.channels)
    if attention is not None and widths.values < attention.head_size:
        _slice_values(attention, statistics, widths.values)
    if isinstance(mlp, MLP) and widths.neurons < mlp.neurons:
        _slice_neurons(mlp, statistics, widths.neurons, ridge, selection, update)


def _slice_neurons(mlp: MLP, statistics: Statistics, count: int, ridge: float, selection: str, update: bool) -> None:
    """Type I of the paper."""
    weight = mlp.down.weight.double()  # d x neurons
    covariance = _covariance(mlp.down, statistics)
    if selection == "leverage":
        of = (mlp.down.name, "leverage scores", ridge)  # the same for every budget
        scores = statistics.derived(of, lambda: leverage_scores(covariance, ridge))
    else:
        reading = [matrix.weight.double() for matrix in (mlp.gate, mlp.up) if matrix is not None]
        scores = weight.square().sum(0) + sum(rows.square().sum(1) for rows in reading)
    kept = scores.argsort(descending=True, stable=True)[:count].sort().values
    new = nystrom_update(weight, covariance, kept) if update else weight[:, kept]
    mlp.keep(kept.tolist())
    mlp.down.write(new)


def _slice_queries_and_keys(attention: Attention, statistics: Statistics, count: int) -> None:
    """Type II of the paper."""
    size, key_heads = attention.head_size, attention.key_value_heads
    powers = []
    for matrix in (attention.q, attention.k):
        mean = statistics.value(key_of(matrix, InputMean()), InputMean()).to(matrix.weight.device).double()
        bias = matrix.bias
        power = output_power(
            matrix.weight.double(), None if bias is None else bias.double(), _covariance(matrix, statistics), mean
        )
        powers.append(power.view(key_heads, -1, size).sum(1))  # over the query heads of a group
    channels = strongest_channels(  # key heads x count
        powers[0] * powers[1], attention.block.rotary_width, count, attention.block.rotates_neighbours
    )
    keep_channels(attention, channels)


def _slice_values(attention: Attention, statistics: Statistics, count: int) -> None:
    """Type III of the paper. Attention weights sum to one, so the value bias is a constant: it joins the output's."""
    size, heads, key_heads = attention.head_size, attention.heads, attention.key_value_heads
    v, o = attention.v, attention.o
    values = v.weight.double().view(key_heads, size, -1)
    group = heads // key_heads
    d = o.shape[0]
    outputs = o.weight.double().view(d, key_heads, group, size).permute(1, 2, 0, 3)  # key heads, group, d, size
    covariance = shrink(_covariance(v, statistics), _VALUE_SHRINKAGE)
    new_values, new_outputs = narrower_values(values, outputs.flatten(1, 2), covariance, count)
    columns = new_outputs.view(key_heads, group, d, count).permute(2, 0, 1, 3).flatten(1)  # d x heads · count

    bias = o.bias
    if v.bias is not None:
        of_heads = v.bias.double().view(key_heads, 1, size).expand(-1, group, -1).flatten()
        constant = o.weight.double() @ of_heads
        bias = constant if bias is None else bias.double() + constant
    put_values(attention, new_values.flatten(0, 1), columns, None, bias)


def _covariance(matrix: Matrix, statistics: Statistics) -> Tensor:
    """E[x xᵀ] of the matrix's input, in float64."""
    value = statistics.value(key_of(matrix, InputCovariance()), InputCovariance())
    return value.to(matrix.weight.device).double()
