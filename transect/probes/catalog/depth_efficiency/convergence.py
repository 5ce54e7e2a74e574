"""From which layer on the final prediction can be read from the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ....data import Specimen
from ....forward import watch
from ...places import wide


@torch.no_grad()
def lens_convergence(specimen: Specimen, ids: Tensor) -> tuple[Tensor, Tensor]:
    """KL(final || lens) in nats, and overlap of the five most likely tokens, at each state (L + 1 each).

    Means over all positions but the first.
    """
    with watch(specimen.anatomy, ["residual"]) as seen:
        specimen.model.base_model(input_ids=ids, use_cache=False)
    lens, layers = specimen.lens, specimen.layers
    final = wide(lens(seen.residual[layers][:, 1:])).log_softmax(-1)
    probabilities, best = final.exp(), final.topk(5).indices
    divergence, overlap = torch.zeros(layers + 1), torch.zeros(layers + 1)
    for layer in range(layers + 1):
        now = wide(lens(seen.residual[layer][:, 1:])).log_softmax(-1)
        divergence[layer] = (probabilities * (final - now)).sum(-1).mean()
        shared = best[..., :, None] == now.topk(5).indices[..., None, :]
        overlap[layer] = shared.any(-1).float().mean()
    return divergence, overlap


def late_share(divergence: Tensor, start: int = 0) -> float:
    """The share of the second half of the layers in the fall of the divergence (L + 1) from state `start` on.

    The middle layer of an odd number is in the second half. NaN where it does not fall.
    """
    fall = float(divergence[start] - divergence[-1])
    middle = (len(divergence) - 1) // 2
    return float(divergence[middle] - divergence[-1]) / fall if fall > 0 else float("nan")
