"""The statistics that methods can ask for. Each is a set of sums, so that parts of the data merge exactly.

A statistic is a small frozen description (hashable, with its settings); the sums live in a dict of tensors beside it:
`zeros` makes them, `update` adds one batch, `value` turns them into the tensor that a method receives. Merging is
addition for all of them, done once in `Statistics.merge`.

Shapes: x is a matrix's input (B, T, d_in), g the gradient of the summed loss with respect to its output (B, T, d_out),
mask (B, T) is True where a position counts, or None where all do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .gram import add_gram_, gram_zeros, symmetric

Sums = dict[str, Tensor]
_FEW = 64  # rows that are added up in the precision in which they come
Needs = Literal["input", "matrix", "gradient", "both", "block", "routing"]


@dataclass
class Trace:
    """One block's pass over a batch: the residual stream (B, T, d) before and after it, and what each sublayer added.

    attention, mlp: None where the sublayer was dropped. parallel: both read `before`.
    """

    before: Tensor
    after: Tensor
    attention: Tensor | None
    mlp: Tensor | None
    parallel: bool


@dataclass(frozen=True)
class Statistic:
    """needs: what `update` is given: a matrix's input (with "matrix" also its weight W, d_out x d_in), its output
        gradient, both, a block's `Trace`, or where a router sends each position.
    shared: True where the statistic depends on the input alone, so that q, k and v (gate and up) share one.
    roles: the only matrices that it is collected at; None for all.
    sublayers: True where it follows single sublayers along the residual stream; it is then not collected in blocks with
        norms after the residual sum.
    """

    needs: ClassVar[Needs]
    shared: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...] | None] = None
    sublayers: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """Name and settings, the key under which the sums are kept on disk."""
        return repr(self)

    def zeros(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
        """The sums before any data, for a matrix W (d_out x d_in)."""
        raise NotImplementedError

    def value(self, sums: Sums) -> Tensor:
        """What a method receives, from the sums."""
        raise NotImplementedError


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that already: float16 cannot hold the square of 256, nor bfloat16 a sum."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions (n x d) that count, in float32 or wider."""
    return _wide(x.flatten(0, 1) if mask is None else x[mask])


def _column_sums(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over the rows (d): of a few rows in their own precision, of these in `dtype`. Eight times as fast as all in
    a wider one, and as exact as a product of matrices is.
    """
    few = len(rows) // _FEW * _FEW
    sums = rows[:few].unflatten(0, (-1, _FEW)).sum(1) if few else rows[:0]
    return torch.cat([sums, rows[few:]]).sum(0, dtype=dtype)


@dataclass(frozen=True)
class InputCovariance(Statistic):
    """E[x xᵀ] (d_in x d_in), uncentred: the Gram matrix of the inputs over the number of positions; K-FAC's A."""

    needs = "input"
    shared = True

    def zeros(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
        return {**gram_zeros(d_in, dtype, device), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, sums: Sums, x: Tensor, mask: Tensor | None) -> None:
        """Add x xᵀ of every position that counts."""
        rows = _rows(x, mask)
        add_gram_(sums, rows)
        sums["count"] += len(rows)

    def value(self, sums: Sums) -> Tensor:
        return symmetric(sums).div_(sums["count"].item())


@dataclass(frozen=True)
class InputMean(Statistic):
    """E[x] (d_in)."""

    needs = "input"
    shared = True

    def zeros(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
        return {"sum": torch.zeros(d_in, dtype=dtype, device=device), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, sums: Sums, x: Tensor, mask: Tensor | None) -> None:
        """Add x of every position that counts."""
        rows = _rows(x, mask)
        sums["sum"] += _column_sums(rows, sums["sum"].dtype)
        sums["count"] += len(rows)

    def value(self, sums: Sums) -> Tensor:
        return sums["sum"] / sums["count"].item()


@dataclass(frozen=True)
class FeatureNorm(Statistic):
    """(E |x_j|^p)^(1/p) (d_in) of every input feature: p = 1 is the mean magnitude, p = 2 the root mean square."""

    power: int = 2
    needs = "input"
    shared = True

    def zeros(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
        return {"sum": torch.zeros(d_in, dtype=dtype, device=device), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, sums: Sums, x: Tensor, mask: Tensor | None) -> None:
        """Add |x|^p of every position that counts."""
        rows = _rows(x, mask)
        sums["sum"] += _column_sums(rows.abs().pow(self.power), sums["sum"].dtype)
        sums["count"] += len(rows)

    def value(self, sums: Sums) -> Tensor:
        return (sums["sum"] / sums["count"].item()).pow(1 / self.power)


@dataclass(frozen=True)
class OutputGradientCovariance(Statistic):
    """E[g gᵀ] (d_out x d_out) over positions; K-FAC's second factor Γ (also B or G).

    g is one position's gradient of the loss summed over the sequence, so no averaging hides in it.
    trim: share of positions to leave out at either end of every sequence of a language model (LEMS: 1/8), padding not
        counted. A row in which several sequences are packed is trimmed as one.
    clip: clamp each position's gradient norm to [clip[0], clip[1]] x the mean norm of its sequence (after trimming);
        norms below 1e-10 stay as they are, and do not count in the mean. None: no clamping.
    """

    trim: float = 0.0
    clip: tuple[float, float] | None = None
    needs = "gradient"

    def zeros(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
        return {**gram_zeros(d_out, dtype, device), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, sums: Sums, g: Tensor, mask: Tensor | None, trims: bool, reached: Tensor | None = None) -> None:
        """Add g gᵀ of every position that counts and is not trimmed. trims: whether positions are trimmed at all.

        mask: the positions of each sequence. reached: those of them that count, in an expert of a mixture.
        """
        if self.trim and trims:
            mask = _without_ends(torch.ones_like(g[..., 0], dtype=torch.bool) if mask is None else mask, self.trim)
        if reached is not None:
            mask = reached if mask is None else mask & reached
        if self.clip is not None:
            g = clip_norms(g, mask, *self.clip)
        rows = _rows(g, mask)
        add_gram_(sums, rows)
        sums["count"] += len(rows)

    def value(self, sums: Sums) -> Tensor:
        return symmetric(sums).div_(sums["count"].item())


def _without_ends(mask: Tensor, share: float) -> Tensor:
    """The mask (B, T) without ⌊share n⌋ positions at either end of each sequence, n being how many it has."""
    number, length = mask.long().cumsum(1) - 1, mask.sum(1, keepdim=True)
    cut = (share * length.double()).long()
    return mask & (number >= cut) & (number < length - cut)


def clip_norms(g: Tensor, mask: Tensor | None, low: float, high: float) -> Tensor:
    """Scale each position of g (B, T, d) so that its norm lies in [low, high] x its sequence's mean norm.

    Positions without a gradient (a norm below 1e-10) stay as they are and do not count in the mean. In float32 or
    wider, whatever g is in.
    """
    g = _wide(g)
    norms = torch.linalg.vector_norm(g, dim=-1)  # (B, T)
    counted = norms >= 1e-10 if mask is None else mask & (norms >= 1e-10)
    mean = norms.where(counted, 0).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min(1)
    clamped = torch.minimum(torch.maximum(norms, low * mean), high * mean)
    scale = torch.where(norms < 1e-10, torch.ones_like(norms), clamped / norms.clamp_min(1e-10))
    return g * scale[..., None]


@dataclass(frozen=True)
class FisherDiagonal(Statistic):
    """E[(dL/dW)²] (d_out x d_in): the squared gradient of each example's loss, averaged over examples."""

    needs = "both"

    def zeros(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
        return {
            "sum": torch.zeros(d_out, d_in, dtype=dtype, device=device),
            "count": torch.zeros((), dtype=torch.float64),
        }

    def update(self, sums: Sums, x: Tensor, g: Tensor, mask: Tensor | None) -> None:
        """Add each example's squared gradient (gᵀ x)², without ever holding those of a batch."""
        for number in range(len(x)):  # one example at a time: its d_out x d_in gradient is the peak
            own = slice(number, number + 1)
            rows, gradients = (_rows(one[own], None if mask is None else mask[own]) for one in (x, g))
            sums["sum"] += (gradients.T @ rows).square_()
        sums["count"] += len(x)

    def value(self, sums: Sums) -> Tensor:
        return sums["sum"] / sums["count"].item()


@dataclass(frozen=True)
class BlockSimilarity(Statistic):
    """E[cos(h_in, h_out)] (a scalar): how little a block turns the residual stream, per position."""

    needs = "block"

    def zeros(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
        return {"sum": torch.zeros((), dtype=torch.float64), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, sums: Sums, trace: Trace, mask: Tensor | None) -> None:
        """Add the cosine of every position that counts."""
        total, count = _cosines(trace.before, trace.after, mask)
        sums["sum"] += total
        sums["count"] += count

    def value(self, sums: Sums) -> Tensor:
        return sums["sum"] / sums["count"]


@dataclass(frozen=True)
class SublayerSimilarity(Statistic):
    """E[cos(x, y)] of the attention and of the MLP sublayer (2): x enters it on the residual stream, y = x + what it
    adds. A sublayer that was dropped counts as 1, since it changes nothing.
    """

    needs = "block"
    sublayers = True

    def zeros(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
        return {"sum": torch.zeros(2, dtype=torch.float64), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, sums: Sums, trace: Trace, mask: Tensor | None) -> None:
        """Add both sublayers' cosines of every position that counts."""
        before = _wide(trace.before)
        start = before if trace.parallel or trace.attention is None else before + trace.attention
        for unit, (x, added) in enumerate(((before, trace.attention), (start, trace.mlp))):
            total, count = _cosines(x, x if added is None else x + added, mask)
            sums["sum"][unit] += total
        sums["count"] += count

    def value(self, sums: Sums) -> Tensor:
        return sums["sum"] / sums["count"]


def _cosines(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """Sum of cos(x, y) over positions, in float32 or wider, and their number."""
    cosine = torch.nn.functional.cosine_similarity(_rows(x, mask), _rows(y, mask), dim=-1).clamp(-1, 1)
    return cosine.sum(dtype=torch.float64).cpu(), cosine.numel()


@dataclass(frozen=True)
class HeadContribution(Statistic):
    """E||W_o,n c_n||_1 (d_in of o) of every query head n: the mean size of what it adds to the residual stream (AMP).

    Each of a head's channels carries the head's number.

    c_n (head_size) is head n's part of the output matrix's input, W_o,n (d x head_size) its columns. Summed over the
    residual stream's features, averaged over the positions of each sequence, then over sequences.
    """

    needs = "matrix"
    roles = ("o",)

    def zeros(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
        return {"sum": torch.zeros(d_in, dtype=dtype, device=device), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, sums: Sums, x: Tensor, mask: Tensor | None, weight: Tensor, head_size: int) -> None:
        """Add each sequence's mean contributions. weight: W of o (d x d_in)."""
        heads = x.shape[-1] // head_size
        totals = _wide(x.new_zeros(*x.shape[:2], heads))
        for head in range(heads):  # one at a time: all heads' contributions would be heads times the residual stream
            part = slice(head * head_size, (head + 1) * head_size)
            totals[..., head] = (_wide(x[..., part]) @ weight[:, part].T.to(totals)).abs().sum(-1)
        means = _sequence_means(totals, mask)
        sums["sum"] += means.sum(0).to(sums["sum"]).repeat_interleave(head_size)
        sums["count"] += len(means)

    def value(self, sums: Sums) -> Tensor:
        return sums["sum"] / sums["count"].item()


@dataclass(frozen=True)
class ExpertLoad(Statistic):
    """How much each expert of a mixture is used (experts): the share of positions that are sent to it, or, weighted,
    the mean of the weights that the router gives it, 0 where it is not chosen.
    """

    weighted: bool = False
    needs = "routing"

    def zeros(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
        return {"sum": torch.zeros(d_out, dtype=torch.float64), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, sums: Sums, index: Tensor, weights: Tensor, mask: Tensor | None) -> None:
        """Add what every position that counts is sent to. index, weights: its experts and their weights (B, T, k)."""
        chosen = _rows(index, mask).long()
        amounts = _rows(weights, mask).double() if self.weighted else torch.ones_like(chosen, dtype=torch.float64)
        sums["sum"].index_add_(0, chosen.flatten().cpu(), amounts.flatten().cpu())
        sums["count"] += len(chosen)

    def value(self, sums: Sums) -> Tensor:
        return sums["sum"] / sums["count"]


@dataclass(frozen=True)
class SequenceMagnitude(Statistic):
    """Mean over sequences of each one's mean |x_j| (d_in), so that every sequence counts alike, however long (AMP)."""

    needs = "input"
    shared = True

    def zeros(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
        return {"sum": torch.zeros(d_in, dtype=dtype, device=device), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, sums: Sums, x: Tensor, mask: Tensor | None) -> None:
        """Add each sequence's mean magnitudes."""
        means = _sequence_means(_wide(x).abs(), mask)
        sums["sum"] += means.sum(0).to(sums["sum"])
        sums["count"] += len(means)

    def value(self, sums: Sums) -> Tensor:
        return sums["sum"] / sums["count"].item()


def _sequence_means(values: Tensor, mask: Tensor | None) -> Tensor:
    """Means over the positions that count (sequences x features) of values (B, T, features); sequences without any are
    left out.
    """
    if mask is None:
        return values.mean(1)
    counts = mask.sum(1, keepdim=True)
    means = values.masked_fill(~mask[..., None], 0).sum(1) / counts.clamp_min(1)
    return means[counts[:, 0] > 0]
