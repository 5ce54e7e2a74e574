"""Merged attention matrices of a trained model (Bermeitinger et al. 2024, arXiv:2410.13732): M = Wqᵀ Wk and P = Wo Wv.

The paper builds such models; that a trained layer becomes one, with its biases, is ours. With a query bias b_q scores
have the term x_jᵀ Wkᵀ b_q, which stays as c; what a key bias adds is the same for all keys of a query, so that softmax
does not see it; and since weights add up to 1, value and output bias leave Wo b_v + b_o.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...anatomy import Anatomy, Block
from ...errors import TransectError
from ...parameters import block_numbers
from ...parts import insert
from ...parts.insert import places
from ..attention import check_is_softmax, put_projection, scale_of, trained_projections
from ..registry import Calibration, conversion
from ..stage import Stage

PAPER, GROUP = "arXiv:2410.13732", "fewer attention matrices"
Merge = Literal["both", "qk", "vo"]


@dataclass(frozen=True)
class Whole:
    """Of each head, in float64: M (heads x d x d) with c (heads x d), or P with b (d). The latter None without biases.

    Scores are (x_iᵀ M + c) x_j / sqrt(head size).
    """

    matrix: Tensor
    shift: Tensor | None


def whole_similarities(block: Block) -> Whole:
    """M and c of the block's attention."""
    attention: Any = block.attention
    (q, query_bias), (k, _) = (_by_heads(attention, role) for role in "qk")
    scale = scale_of(block) * attention.head_size**0.5
    shift = None if query_bias is None else torch.einsum("hs,hsd->hd", query_bias, k) * scale
    return Whole(q.mT @ k * scale, shift)


def whole_outputs(block: Block) -> Whole:
    """P and b of the block's attention."""
    attention: Any = block.attention
    v, value_bias = _by_heads(attention, "v")
    o = attention.o.weight.double().unflatten(1, (attention.heads, -1)).transpose(0, 1)  # heads x d x size
    shift = None if attention.o.bias is None else attention.o.bias.double()
    if value_bias is not None:
        added = torch.einsum("hds,hs->d", o, value_bias)
        shift = added if shift is None else shift + added
    return Whole(o @ v, shift)


def _by_heads(attention: Any, role: str) -> tuple[Tensor, Tensor | None]:
    """The rows (heads x size x d) and the bias (heads x size) of each query head; shared keys and values repeated."""
    matrix = getattr(attention, role)
    rows = matrix.weight.double().unflatten(0, (-1, attention.head_size))
    bias = None if matrix.bias is None else matrix.bias.double().unflatten(0, (-1, attention.head_size))
    repeats = attention.heads // len(rows)
    return rows.repeat_interleave(repeats, 0), None if bias is None else bias.repeat_interleave(repeats, 0)


def symmetrized(matrix: Tensor) -> tuple[Tensor, float, float]:
    """T (... x d x d), lower triangular, with T Tᵀ the nearest symmetric matrix that has no negative eigenvalue.

    With it ||M - Mᵀ|| / ||M||, the probe that says whether M is symmetric by itself (sqrt 2 for a random one), and the
    distance ||T Tᵀ - M|| / ||M||; of several matrices, together.
    """
    size = matrix.norm()
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    root = values.clamp_min(0).sqrt()[..., None] * vectors.mT  # rootᵀ root = T Tᵀ
    factor = torch.linalg.qr(root).R.mT
    probe, off = (matrix - matrix.mT).norm() / size, (factor @ factor.mT - matrix).norm() / size
    return factor.tril(), float(probe), float(off)


def check_merges(anatomy: Anatomy, chosen: list[int], name: str, merges_queries: bool, several: bool) -> None:
    """TransectError unless attention in these blocks is softmax whose matrices can be merged."""
    for number in chosen:
        places(anatomy, "mixer", number)
        block = anatomy.blocks[number]
        trained_projections(block)
        attention: Any = block.attention
        if merges_queries and block.rotary_width:
            raise TransectError(
                f"{name}: rotary positions turn queries and keys of {anatomy.architecture.name} apart, so that they "
                "have no one matrix; values and output can be merged (merge=vo)"
            )
        if merges_queries and (attention.q_norm is not None or attention.k_norm is not None):
            raise TransectError(f"{name}: norms stand between the queries and keys of {anatomy.architecture.name}")
        if attention.heads > 1 and not several:
            raise TransectError(
                f"{name}: block {number} has {attention.heads} heads of {attention.head_size}, and merged matrices are "
                f"as wide as the stream ({attention.q.shape[1]}) for each of them: from three heads on that is more "
                "than there was; several=true does it all the same"
            )
    check_is_softmax(anatomy, chosen)


@torch.no_grad()
def merged(anatomy: Anatomy, chosen: list[int], queries: str, values: str, seed: int) -> dict[str, float]:
    """Put `mixer.merged` with the trained numbers in the place of attention, in place; what there is to say of it."""
    trained = {number: trained_projections(anatomy.blocks[number]) for number in chosen}
    similar = {n: whole_similarities(anatomy.blocks[n]) for n in chosen if queries != "separate"}
    put_out = {n: whole_outputs(anatomy.blocks[n]) for n in chosen if values == "merged"}
    factors = {n: symmetrized(one.matrix) for n, one in similar.items()} if queries == "symmetric" else {}
    before = sum(_numbers(anatomy, number) for number in chosen)
    for number in chosen:
        modules = trained[number].shared
        wholes = [table[number] for table in (similar, put_out) if number in table]
        bias = any(one.shift is not None for one in wholes) or any(
            getattr(getattr(one, "linear", one), "bias", None) is not None for one in modules.values()
        )
        settings = {"queries": queries, "values": values, "bias": bias}
        insert(anatomy.model, "mixer", "merged", layers=[number], settings=settings, seed=seed)
        part: Any = anatomy.blocks[number].part("attention")
        path = f"{anatomy.blocks[number].slot_path('attention')}.part"
        separate = [*(("q", "k") if queries == "separate" else ()), *(("v", "o") if values == "separate" else ())]
        for role in separate:
            put_projection(anatomy, f"{path}.{role}_proj", modules[role])
        if number in similar:
            rows, columns = torch.tril_indices(part.width, part.width)
            numbers = factors[number][0][:, rows, columns] if number in factors else similar[number].matrix
            part.similarity.copy_(numbers)
            if similar[number].shift is not None:
                part.shift.copy_(similar[number].shift)
        if number in put_out:
            part.o_proj.weight.copy_(put_out[number].matrix.transpose(0, 1).flatten(1))  # P_1 ... P_H side by side
            if bias:
                shift = put_out[number].shift
                part.o_proj.bias.copy_(torch.zeros(part.width) if shift is None else shift)
    told = {"numbers of attention, times those before": sum(_numbers(anatomy, n) for n in chosen) / before}
    if factors:
        told["||M - M'|| / ||M||, the largest of a block"] = max(probe for _, probe, _ in factors.values())
        told["||T T' - M|| / ||M||, the largest of a block"] = max(off for _, _, off in factors.values())
    return told


def _numbers(anatomy: Anatomy, number: int) -> int:
    module: Any = anatomy.model.get_submodule(str(anatomy.blocks[number].slot_path("attention")))
    return sum(parameter.numel() for parameter in module.parameters())


def _check_exact(anatomy: Anatomy, merge: Merge, several: bool, layers: str) -> None:
    check_merges(anatomy, block_numbers(layers, anatomy.blocks), "merge-attention", merge != "vo", several)


def _check_symmetric(anatomy: Anatomy, several: bool, layers: str) -> None:
    check_merges(anatomy, block_numbers(layers, anatomy.blocks), "symmetrize-attention", True, several)


@conversion(
    "merge-attention", paper=PAPER, group=GROUP, exact="it is the model as it was", check=_check_exact, causal=False
)  # fmt: skip
def merge_attention(
    anatomy: Anatomy, calibration: Calibration, *, merge: Merge = "both", several: bool = False, layers: str = ""
) -> None:
    """Queries and keys become one matrix, and values and output one, with no number changed but by rounding.

    With one head that is half of the numbers, and generation keeps the input in place of keys and values. It is refused
    where something stands between the matrices: rotary positions or norms of queries and keys, and scores that are
    more than softmax (checked by running it).

    merge: queries with keys (qk), values with the output (vo), or both.
    several: also where there are several heads, whose matrices are as wide as the stream each: more numbers than before
        from three heads on, and keys or values that heads share are written out for each. How many more is said.
    layers: only these blocks, such as 0-5,7; default all.
    """
    chosen = block_numbers(layers, anatomy.blocks)
    queries, values = ("separate" if merge == pair else "merged" for pair in ("vo", "qk"))
    calibration.told |= merged(anatomy, chosen, queries, values, calibration.seed)


@conversion(
    "symmetrize-attention",
    paper=PAPER,
    group=GROUP,
    exact="nothing, unless its similarities are symmetric and positive by themselves",
    check=_check_symmetric,
    stages=(Stage("symmetrize-attention", train="full", lr=1e-4, lowers="distill"),),
    causal=False,
)
def symmetrize_attention(
    anatomy: Anatomy, calibration: Calibration, *, several: bool = False, layers: str = ""
) -> None:
    """The matrix of queries and keys becomes the nearest symmetric one without negative eigenvalues, T Tᵀ.

    Of it T is kept, d (d + 1) / 2 numbers a head; values and output are merged. What is lost is said, beside the probe
    ||M - Mᵀ|| / ||M|| that says how far M was from symmetric. The training is ours: all blocks follow the predictions
    of the model as it was.

    several: also where there are several heads, see `merge-attention`.
    layers: only these blocks, such as 0-5,7; default all.
    """
    calibration.told |= merged(anatomy, block_numbers(layers, anatomy.blocks), "symmetric", "merged", calibration.seed)
