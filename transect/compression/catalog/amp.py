"""AMP: the weakest heads and neurons of every block go (Mugnaini et al., IJCNN 2025, arXiv:2504.21174)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...anatomy import Block
from ...anatomy.storage import is_dense
from ...errors import OutOfReach, TransectError
from ...statistics import HeadContribution, SequenceMagnitude, Statistics, key_of
from ..registry import Range, slicing
from ..sizes import dense_bytes, neuron_bytes

_HEADS, _NEURONS = HeadContribution(), SequenceMagnitude()


def counts(block: Block, keep: float) -> tuple[int, int]:
    """How many key/value groups of heads and how many neurons of a block remain at `keep` of its bytes.

    With G groups, round((1 - keep) G) of them go, but not all. The neurons fill what is left of the bytes, and so make
    up for that rounding exactly; the authors' code counts a head as if it were one neuron here. Where less than one
    neuron is left, more groups go. A dropped sublayer counts 0. OutOfReach below one group and one neuron.
    """
    matrices = block.matrices()
    if not all(is_dense(matrix.module) for matrix in matrices):
        raise TransectError(f"amp cuts heads and neurons out of dense matrices, and block {block.index} has others")
    sizes = {matrix.role: dense_bytes(matrix) for matrix in matrices}
    whole = sum(sizes.values())
    attention, mlp = block.attention, block.mlp
    groups = attention.key_value_heads if attention else 0
    neurons = mlp.neurons if mlp else 0
    per_group = sum(sizes[role] for role in "qkvo") // groups if attention else 0
    per_neuron = neuron_bytes(block)
    budget = int(keep * whole * (1 + 1e-12))  # the rounding of a share must not cost a neuron
    if budget < per_group + per_neuron:
        least = math.ceil((per_group + per_neuron) / whole * 1e4) / 1e4
        raise OutOfReach(
            f"keep={keep:.4g} leaves less than one group of heads and one neuron of block {block.index}: "
            f"they need keep >= {least:.4g}"
        )
    if attention:
        groups = min(max(1, groups - round((1 - keep) * groups)), (budget - per_neuron) // per_group)
    if mlp:
        neurons = min(neurons, (budget - groups * per_group) // per_neuron)
    return groups, neurons


def check(block: Block, keep: float, *, order: str, neuron_score: str, draw: int) -> None:
    """Raise OutOfReach where the share leaves the block no head or no neuron."""
    counts(block, keep)


@slicing("amp", paper="arXiv:2504.21174", check=check, needs=[_HEADS, _NEURONS])
def amp(
    block: Block,
    statistics: Statistics,
    keep: float,
    *,
    order: Literal["standard", "reversed", "random"] = "standard",
    neuron_score: Literal["activation", "output"] = "activation",
    draw: Annotated[int, Range(0, 2**31)] = 0,
) -> None:
    """Remove the heads that add least to the residual stream and the neurons that are least active.

    Head n scores E||W_o,n c_n||_1, the mean size of what it adds. Heads that share keys and values go together, by the
    sum of their scores (our rule; the paper has none for them). Neuron m scores E|x_m|, where x is the input of the
    down matrix. Both are means over sequences of each one's mean over its positions, so that a short prompt counts as
    much as a long one. The same share of the groups of heads goes in every block, rounded, and as many neurons as bring
    the block's bytes to its budget, so that equal shares leave an ordinary, smaller model. The paper's share r is of
    all parameters, embeddings included; `keep` is of the blocks' matrices.

    order: which go: the lowest scores, or, as controls, the highest, or random ones.
    neuron_score: "activation" is the paper's E|x_m|; "output", ours, is E|x_m| ||W_down[:, m]||_1, the size of what the
        neuron adds, as for heads.
    draw: the number of the random draw, for `order` random.
    """
    groups, neurons = counts(block, keep)
    attention, mlp = block.attention, block.mlp
    generator = torch.Generator().manual_seed(draw * 100_003 + block.index)  # its own for every block
    if attention is not None:
        per_group = attention.heads // attention.key_value_heads
        channels = statistics.value(key_of(attention.o, _HEADS), _HEADS)
        scores = channels[:: attention.head_size].view(-1, per_group).sum(1)  # (key/value heads)
        kept = _chosen(scores, groups, order, generator)
        attention.keep([group * per_group + head for group in kept.tolist() for head in range(per_group)])
    if mlp is not None:
        scores = statistics.value(key_of(mlp.down, _NEURONS), _NEURONS)
        if neuron_score == "output":
            scores = scores * mlp.down.weight.to(scores).abs().sum(0)
        mlp.keep(_chosen(scores, neurons, order, generator).tolist())


def _chosen(scores: Tensor, count: int, order: str, generator: torch.Generator) -> Tensor:
    """The `count` that stay, in their old order. Of equal scores the first stay."""
    if order == "random":
        ranking = torch.randperm(len(scores), generator=generator)
    else:
        ranking = scores.cpu().sort(descending=order == "standard", stable=True).indices
    return ranking[:count].sort().values
