"""How much each token's state contributes to what follows, layer by layer: integrated gradients.

Csordas et al. 2025 (arXiv:2505.13898), the second view of residual erasure, after Sundararajan et al. 2017
(arXiv:1703.01365). The states h (T' x d) of the first T' tokens that block l reads are moved on a straight line
from the mean state of that layer, b, to what they are; F is the mean log-probability of the tokens that follow.
Token t gets

    A[l, t] = (h_t - b) · integral over a in [0, 1] of dF / dh_t at b + a (h - b)

and the sum over t is F(h) - F(b), which is called completeness. A positive number: this token's state at this layer
makes the right continuation more likely.

The authors' code (analysis/igrad.py, lib/igrad.py) attributes the sum of probabilities to outputs of the layers,
sublayers too, from the mean over the prompt's own positions, with 256 steps of equal length. Log-probabilities,
states that a block reads, the mean over the text (as for erasure), and Gauss-Legendre points are our choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....data import Specimen
from ....forward import watch
from ....forward.blocks import feeds_of, run_blocks
from ...places import wide


@dataclass(frozen=True)
class Integrated:
    """Means over sequences. attribution: L x T', nats. change: F(h) - F(b) at each layer (L), nats.

    error: |F(h) - F(b) - sum of the attributions| of a sequence, the largest (L), nats: what the quadrature misses.
    """

    attribution: Tensor
    change: Tensor
    error: Tensor


def integrated_gradients(specimen: Specimen, ids: Tensor, means: Tensor, start: int, steps: int) -> Integrated:
    """Attribute what is predicted behind position `start` to the states of the first `start` tokens.

    ids: n x T, at least two tokens longer than `start`. means: L x d or longer, b of each layer. steps: points of
    the line. For a sequence one pass, and for each layer what is left of a pass over `steps` + 2 copies, forward and
    back.
    """
    points, weights = legendre(steps)
    points = torch.cat([torch.tensor([0.0, 1.0]).to(points), points]).to(ids.device)  # the ends give F(b) and F(h)
    weights = torch.cat([torch.zeros(2).to(weights), weights]).to(ids.device)
    layers = specimen.layers
    attribution, change, error = torch.zeros(layers, start), torch.zeros(layers), torch.zeros(layers)
    for row in ids:
        (feed,) = feeds_of(specimen.anatomy, [{"input_ids": row[None]}])
        with torch.no_grad(), watch(specimen.anatomy, ["residual"]) as clean:
            run_blocks(specimen.anatomy, feed, 0, feed.hidden)
        for layer in specimen.shown(range(layers), "integrated gradients"):
            h = wide(clean.residual[layer])
            away = h - means[layer].to(h)
            away[:, start:] = 0
            states = (h - (1 - points.to(h))[:, None, None] * away).to(clean.residual[layer].dtype).requires_grad_()
            with torch.enable_grad():
                values = following(specimen, row, run_blocks(specimen.anatomy, feed, layer, states), start)
                (gradients,) = torch.autograd.grad(values.sum(), states)
            summed = torch.einsum("n,ntd->td", weights.to(h), wide(gradients))
            parts, whole = (summed * away[0]).sum(-1)[:start], values[1].detach() - values[0].detach()
            attribution[layer] += parts.cpu().float() / len(ids)
            change[layer] += float(whole) / len(ids)
            error[layer] = max(float(error[layer]), abs(float(whole - parts.sum())))
    return Integrated(attribution, change, error)


def following(specimen: Specimen, ids: Tensor, left: Tensor, start: int) -> Tensor:
    """Mean log-probability (n), in nats, of tokens start + 1 ... T - 1 of ids (T).

    They are predicted at positions from `start` on. left: what the last block leaves (n x T x d).
    """
    logits = wide(specimen.lens(left[:, start:-1]))
    wanted = ids[start + 1 :].expand(len(left), -1)
    return logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0].mean(1)


def legendre(count: int) -> tuple[Tensor, Tensor]:
    """Points and weights (float64) of Gauss-Legendre quadrature on [0, 1], exact for degrees up to 2 count - 1.

    By Golub and Welsch 1969: eigenvalues of the matrix of the recurrence, and first components of its eigenvectors.
    """
    k = torch.arange(1, count, dtype=torch.float64)
    beside = (k / (4 * k.square() - 1).sqrt()).diag_embed(1)
    points, vectors = torch.linalg.eigh(beside + beside.T)
    return (points + 1) / 2, vectors[0].square()
