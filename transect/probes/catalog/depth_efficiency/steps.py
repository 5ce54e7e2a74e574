"""What the attention and the MLP of a layer add to the residual stream, and how large that is beside it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ....forward import Seen
from ...places import wide


def added_parts(seen: Seen, layer: int, stream: Tensor) -> tuple[Tensor, Tensor]:
    """What attention and MLP of a layer add (each like `stream`, B x T x d, float32 or wider); 0 where dropped."""
    nothing = torch.zeros_like(wide(stream))
    parts = (seen.attention, seen.mlp)
    attention, mlp = (wide(part[layer]).reshape(stream.shape) if layer in part else nothing for part in parts)
    return attention, mlp


def contributions(seen: Seen, layer: int, parallel: bool, spans: tuple[Tensor, ...]) -> Tensor:
    """Relative length and cosine (2) of what attention, MLP and both add, summed over each span: 2 x spans x 3.

    The parts are in the order of PARTS: the layer, attention, the MLP. A dropped sublayer adds zeros.
    """
    h = wide(seen.residual[layer])
    a, m = added_parts(seen, layer, h)
    pairs = ((a + m, h), (a, h), (m, h if parallel else h + a))
    lengths = torch.stack([added.norm(dim=-1) / base.norm(dim=-1).clamp_min(1e-6) for added, base in pairs])
    cosines = torch.stack([cosine_similarity(added, base, dim=-1) for added, base in pairs])
    both = torch.stack([lengths, cosines])
    return torch.stack([both[..., span].sum(-1) for span in spans], 1).cpu().double()
