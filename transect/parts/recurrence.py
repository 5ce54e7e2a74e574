"""Linear recurrences over positions, in chunks: what every linear mixer is computed by.

The state S (d_k x d_v) of a head of keys goes on as S_t = diag(a_t) S_{t-1} + k_t v_tᵀ, or by the delta rule, and is
read as y_t = S_tᵀ q_t, by each head of queries that shares these keys. Within a chunk this is attention with decays
between the positions; from chunk to chunk only the state goes on, so that the work for N positions is
O(N (chunk + d_k) d_v) and all but the states' own step is batched over the chunks. Sums, exponentials and the state are
in float32 or wider, also under autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .fused import fused
from .precision import wide

CHUNK = 64  # positions that are computed as attention
_SAFE = 60.0  # e^60 and its inverse are far from the ends of float32


def decayed_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """y (B x H x N x d_v) and the state afterwards (B x h x d_k x d_v), both in float32 or wider.

    k: B x h x N x d_k. v: B x h x N x d_v. q: B x H x N x d_k; H / h heads of queries in a row read one head's state.
    log_decay: log a_t <= 0, B x h x N x d_k, or x 1 for one decay of a head; None where nothing is forgotten. state:
    before the first position; default zeros. chunk: positions that are computed as attention, a power of 2.
    The decay from j to i is the quotient of two products of decays. Where these would leave float32, chunks are halved
    until they do not; what a half reads of the half before it has factors of at most 1. On a GPU it may be a fused
    kernel that does it, see `fused`.
    """
    with torch.autocast(q.device.type, enabled=False):
        if kernel := fused(q, v, log_decay, _in_chunks):
            return kernel(q, k, v, log_decay, state)
        return _in_chunks(q, k, v, log_decay, state, chunk)


def _in_chunks(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`decayed_recurrence`, in torch."""
    of_queries, batch = q.shape, k.shape[:2]
    q, k, v = _queries(q, k, chunk), _chunks(k, chunk), _chunks(v, chunk)
    near, read, write, keeps = None, q, k, k.new_ones(len(k), 1, 1)
    if log_decay is not None:
        log_decay = _chunks(log_decay, chunk)
        since = log_decay.cumsum(dim=1)  # Σ of the chunk's log decays up to each position
        grown, safe = since.exp(), _safe_length(log_decay, since)
        read, keeps = q * grown[:, None], grown[:, -1:].mT
        if safe < k.shape[1]:
            near = _within(q, k, v, log_decay, safe)
            added = (k * _until_end(log_decay).exp()).mT @ v  # of each chunk to the state
        else:
            write = k * (-since).exp()  # k / grown has 1 / grown² in its gradient, which overflows
    if near is None:
        near, added = _by(_by(read, write.mT).tril(), v), keeps * (write.mT @ v)
    before, state = _carried(added, keeps, state, batch, torch.addcmul)
    return _answers(_by(read, before, onto=near), of_queries), state


def value_decayed_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} diag(a_t) + k_t v_tᵀ: what is forgotten is a channel of the values, whatever key it came with.

    Shapes, results and chunks as for `decayed_recurrence`, but log_decay is B x h x N x d_v (log a_t <= 0).
    """
    with torch.autocast(q.device.type, enabled=False):
        of_queries, batch = q.shape, k.shape[:2]
        q, k, v, log_decay = _queries(q, k, chunk), *(_chunks(tensor, chunk) for tensor in (k, v, log_decay))
        since = log_decay.cumsum(dim=1)
        grown, safe = since.exp(), _safe_length(log_decay, since)
        near = _within_values(q, k, v, log_decay, safe)
        added = k.mT @ (v * _until_end(log_decay).exp())
        before, state = _carried(added, grown[:, -1:], state, batch, torch.addcmul)
        return _answers(near + grown[:, None] * _by(q, before), of_queries), state


def delta_recurrence(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The (gated) delta rule S_t = a_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ: what k_t gives is moved to v_t.

    Shapes and results as for `decayed_recurrence`, with as many heads of queries as of keys; beta (B x h x N x 1) in
    [0, 1], keys of length 1 at most.
    log_decay: log a_t <= 0 (B x h x N x 1), or None for the rule without gate.
    S_t = a_t S_{t-1} + k_t u_tᵀ with u_t = β_t (v_t - a_t S_{t-1}ᵀ k_t). Within a chunk the u solve a system that is
    triangular, with ones on its diagonal, and linear in the state before it: U = X - W S (the WY form of the product of
    the I - β k kᵀ; Yang et al. 2024, arXiv:2406.06484, Section 3, with decays arXiv:2412.06464, Section 3.3).
    """
    with torch.autocast(q.device.type, enabled=False):
        batch, count = q.shape[:2], q.shape[2]
        q, k, v, beta = (_chunks(tensor, chunk) for tensor in (q, k, v, beta))
        alike, scores = k @ k.mT, q @ k.mT
        read, late, keeps = k, k, k.new_ones(1, 1, 1)
        if log_decay is None:
            scores = scores.tril()
        else:
            log_decay = _chunks(log_decay, chunk)
            apart = log_decay.expand_as(alike).tril(-1).cumsum(dim=1).exp().tril()  # from key to query
            alike, scores = alike * apart, scores * apart
            grown = log_decay.cumsum(dim=1).exp()
            q, read, late, keeps = q * grown, k * grown, k * _until_end(log_decay).exp(), grown[:, -1:]
        known = beta * torch.cat([v, read], dim=-1)
        solved = torch.linalg.solve_triangular((beta * alike).tril(-1), known, upper=False, unitriangular=True)
        x, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        moves = keeps * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - late.mT @ w
        before, state = _carried(late.mT @ x, moves, state, batch, torch.baddbmm)
        u = torch.baddbmm(x, w, before, alpha=-1)
        return _positions(torch.baddbmm(scores @ u, q, before), batch, count), state


def _chunks(tensor: Tensor, chunk: int) -> Tensor:
    """B x h x N x d as (B h chunks) x chunk x d in float32 or wider, with zeros behind; shorter if all is in one."""
    tensor = wide(tensor)
    count = tensor.shape[2]
    chunk = min(chunk, 1 << (count - 1).bit_length())
    if count % chunk:
        tensor = functional.pad(tensor, (0, 0, 0, -count % chunk))
    return tensor.reshape(-1, chunk, tensor.shape[-1])


def _positions(chunks: Tensor, batch: torch.Size, count: int) -> Tensor:
    """The way back: B x h x N x d."""
    return chunks.reshape(*batch, -1, chunks.shape[-1])[:, :, :count]


def _queries(q: Tensor, k: Tensor, chunk: int) -> Tensor:
    """q (B x H x N x d) as (B h chunks) x heads of queries that read one of the keys (B x h x N x d) x chunk x d."""
    chunks = _chunks(q, chunk)
    return chunks.unflatten(0, (k.shape[:2].numel(), q.shape[1] // k.shape[1], -1)).transpose(1, 2).flatten(0, 1)


def _answers(chunks: Tensor, of_queries: torch.Size) -> Tensor:
    """The way back: B x H x N x d. of_queries: the shape of the queries."""
    batch, heads, count = of_queries[:3]
    in_a_row = chunks.unflatten(0, (batch * heads // chunks.shape[1], -1)).transpose(1, 2)
    return in_a_row.reshape(batch, heads, -1, chunks.shape[-1])[:, :, :count]


def _by(q: Tensor, matrix: Tensor, onto: Tensor | None = None) -> Tensor:
    """Queries (n x heads x chunk x d) times their n matrices (d x e): one product for all heads that share it.

    onto: what it is added to (n x heads x chunk x e).
    """
    rows = q.flatten(1, 2)
    product = rows @ matrix if onto is None else torch.baddbmm(onto.flatten(1, 2), rows, matrix)
    return product.unflatten(1, q.shape[1:3])


def _carried(
    added: Tensor, moves: Tensor, state: Tensor | None, batch: torch.Size,
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state before each chunk ((B h chunks) x d_k x d_v), and behind the last (B x h x d_k x d_v).

    added, moves: of each chunk; step(added, moves, state) is the next state.
    """
    added, moves = (tensor.unflatten(0, (batch.numel(), -1)) for tensor in (added, moves))
    now = added.new_zeros(added[:, 0].shape) if state is None else state.flatten(0, 1).to(added.dtype)
    before = []
    for more, move in zip(added.unbind(1), moves.unbind(1), strict=True):
        before.append(now)
        now = step(more, move, now)
    return torch.stack(before, dim=1).flatten(0, 1), now.unflatten(0, batch)


def _safe_length(log_decay: Tensor, since: Tensor) -> int:
    """The chunk's length, halved until no such block decays by more than e^-60; 0 if a single position does."""
    length, log_decay = since.shape[1], log_decay.detach()
    total = since.detach()[:, -1:]
    while length and float(total.amin()) < -_SAFE:
        length //= 2
        total = log_decay.unflatten(1, (-1, max(length, 1))).sum(dim=2)
    return length


def _until_end(log_decay: Tensor) -> Tensor:
    """Σ of the log decays behind each position of a chunk, added from its end, since differences of sums round."""
    return functional.pad(log_decay[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(dim=1).flip(1)


def _within(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, safe: int) -> Tensor:
    """What the queries of each chunk (n x heads x chunk x d) are given by its positions, halved down to `safe`."""
    if k.shape[1] <= max(safe, 1):
        since = functional.pad(log_decay[:, 1:], (0, 0, 1, 0)).cumsum(dim=1)  # its own decay reaches no position
        return _by(_by(q * since.exp()[:, None], (k * (-since).exp()).mT).tril(), v)
    (_, later), of_halves = _halves(q, k, v, log_decay)
    own = _within(*of_halves, safe=safe).unflatten(0, (-1, 2))
    (k, _), (v, _), (before, since) = (one.chunk(2, dim=1) for one in (k, v, log_decay))
    read = later * since.cumsum(dim=1).exp()[:, None]
    write = k * _until_end(before).exp()
    return torch.cat([own[:, 0], _by(_by(read, write.mT), v, onto=own[:, 1])], dim=2)


def _within_values(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, safe: int) -> Tensor:
    """`_within` where the channels of the values decay."""
    if k.shape[1] <= max(safe, 1):
        since = functional.pad(log_decay[:, 1:], (0, 0, 1, 0)).cumsum(dim=1)
        return since.exp()[:, None] * _by(_by(q, k.mT).tril(), v * (-since).exp())
    (_, later), of_halves = _halves(q, k, v, log_decay)
    own = _within_values(*of_halves, safe=safe).unflatten(0, (-1, 2))
    (k, _), (v, _), (before, since) = (one.chunk(2, dim=1) for one in (k, v, log_decay))
    written = v * _until_end(before).exp()
    read = since.cumsum(dim=1).exp()[:, None] * _by(_by(later, k.mT), written)
    return torch.cat([own[:, 0], own[:, 1] + read], dim=2)


def _halves(q: Tensor, *others: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Both halves of each chunk's queries, and all of them and the others with each half as a chunk by itself."""
    of_queries = q.unflatten(2, (2, -1)).transpose(1, 2)  # n x 2 x heads x half a chunk x d
    halves = [of_queries, *(one.unflatten(1, (2, -1)) for one in others)]
    return of_queries.unbind(1), [half.flatten(0, 1) for half in halves]
