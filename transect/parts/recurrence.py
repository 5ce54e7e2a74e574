"""Linear recurrences over positions, in chunks: what every linear mixer is computed by.

The state S (d_k x d_v) of a head goes on as S_t = diag(a_t) S_{t-1} + k_t v_tᵀ and is read as y_t = S_tᵀ q_t. Within a
chunk this is attention with decays between the positions; from chunk to chunk only the state goes on, so that the work
for N positions is O(N (chunk + d_k) d_v) and all but the states' own step is batched over the chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SAFE = 60.0  # e^60 and its inverse are far from the ends of float32


def decayed_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """y (B x h x N x d_v) and the state afterwards (B x h x d_k x d_v), both in float32 or wider.

    q, k: B x h x N x d_k. v: B x h x N x d_v. log_decay: log a_t <= 0, B x h x N x d_k, or x 1 for one decay of a head.
    state: before the first position; default zeros. chunk: positions that are computed as attention.
    Where decays of single channels are so strong that their product over a chunk would leave float32, the chunks are
    short, and every difference of sums of log_decay is taken before its exponential: exact, and slower.
    """
    given = (q, k, v, log_decay)
    q, k, v, log_decay = (tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in given)
    count, by_channel = q.shape[2], log_decay.shape[-1] > 1
    strong = by_channel and float(log_decay.detach().amin()) * min(chunk, count) < -_SAFE
    chunk = min(16 if strong else chunk, count)
    q, k, v, log_decay = (
        functional.pad(tensor, (0, 0, 0, -count % chunk)).unflatten(2, (-1, chunk)) for tensor in (q, k, v, log_decay)
    )  # B x h x C x c x d
    since = log_decay.cumsum(dim=3)  # Σ of the chunk's log decays up to each position
    whole = since[..., -1:, :]
    added = (k * (whole - since).exp()).transpose(-1, -2) @ v  # of each chunk to the state: B x h x C x d_k x d_v
    if state is None:
        state = added.new_zeros(*added.shape[:2], *added.shape[3:])
    before, keeps = [], whole.transpose(-1, -2).exp()  # B x h x C x d_k (or 1) x 1
    for number in range(added.shape[2]):
        before.append(state)
        state = keeps[:, :, number] * state + added[:, :, number]
    read = q * since.exp()
    y = read @ torch.stack(before, dim=2)
    behind = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    if not by_channel:
        apart = (since - since.transpose(-1, -2)).masked_fill(~behind, float("-inf"))  # from key to query
        scores = (q @ k.transpose(-1, -2)) * apart.exp()
    elif strong:
        apart = since.unsqueeze(-2) - since.unsqueeze(-3)  # B x h x C x c x c x d_k
        apart = apart.masked_fill(~behind[..., None], float("-inf"))
        scores = torch.einsum("bhnid,bhnjd,bhnijd->bhnij", q, k, apart.exp())
    else:
        scores = (read @ (k * (-since).exp()).transpose(-1, -2)).masked_fill(~behind, 0.0)
    return (y + scores @ v).flatten(2, 3)[:, :, :count], state
