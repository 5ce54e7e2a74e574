"""Linear recurrences over positions, in chunks: what every linear mixer is computed by.

The state S (d_k x d_v) of a head goes on as S_t = diag(a_t) S_{t-1} + k_t v_tᵀ and is read as y_t = S_tᵀ q_t. Within a
chunk this is attention with decays between the positions; from chunk to chunk only the state goes on, so that the work
for N positions is O(N (chunk + d_k) d_v) and all but the states' own step is batched over the chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def decayed_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, chunk: int = 16
) -> tuple[Tensor, Tensor]:
    """y (B x h x N x d_v) and the state afterwards (B x h x d_k x d_v), both in float32 or wider.

    q, k: B x h x N x d_k. v: B x h x N x d_v. log_decay: log a_t <= 0, B x h x N x d_k, or x 1 for one decay of a head.
    state: before the first position; default zeros.
    A difference of sums of log_decay is taken before its exponential, so that nothing overflows however strong it is.
    """
    q, k, v, log_decay = (
        tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in (q, k, v, log_decay)
    )
    count = q.shape[2]
    chunk = min(chunk, count)
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
    y = (q * since.exp()) @ torch.stack(before, dim=2)
    behind = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    apart = since.unsqueeze(-2) - since.unsqueeze(-3)  # B x h x C x c x c x d_k (or 1): from key to query
    apart = apart.masked_fill(~behind[..., None], float("-inf")).exp()
    if log_decay.shape[-1] == 1:
        scores = (q @ k.transpose(-1, -2)) * apart.squeeze(-1)
    else:
        scores = torch.einsum("bhnid,bhnjd,bhnijd->bhnij", q, k, apart)
    y = (y + scores @ v).flatten(2, 3)[:, :, :count]
    return y, state
