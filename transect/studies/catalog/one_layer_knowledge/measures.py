"""What is measured of models side by side: right answers and what stands in their place, gradients, the bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .facts import Facts, Rows
from .layer import OneLayer
from .learning import pieces, summed_loss

KINDS = ("right", "another attribute", "another subject", "no answer")


@torch.no_grad()
def answered(model: OneLayer, rows: Rows, *, uniform: bool = False, mlp: bool = True) -> Tensor:
    """The most likely token of every row (G, B), on the CPU. uniform, mlp: see `OneLayer.forward`."""
    said = [model(piece.tokens, uniform=uniform, mlp=mlp).argmax(-1) for piece in pieces(model, rows)]
    return torch.cat(said, 1).cpu()


@torch.no_grad()
def mean_loss(model: OneLayer, rows: Rows) -> Tensor:
    """Each model's mean cross-entropy in nats (G)."""
    total = torch.zeros(model.models, dtype=torch.float64)
    for piece in pieces(model, rows):
        logs = model(piece.tokens).log_softmax(-1).gather(-1, piece.answers[..., None])
        total -= logs.double().sum((1, 2)).cpu()
    return (total / rows.answers.shape[1]).float()


def kinds_of(facts: Facts, said: Tensor, answers: Tensor) -> Tensor:
    """Shares (4, G) of KINDS among the tokens said (G, B), where the answers (G, B) are right.

    A wrong one belongs to another attribute of the same subject, to another subject, or is no answer's token.
    """
    first, attributes = facts.first_answer, facts.attributes
    right, answer = said == answers, said >= first
    same = (said - first).div(attributes, rounding_mode="floor") == (answers - first) // attributes
    found = [right, answer & same & ~right, answer & ~same, ~answer]
    return torch.stack([one.float().mean(1) for one in found])


@dataclass(frozen=True)
class Directions:
    """The first fine-tuning step's gradient of every watched matrix.

    share: ||G||₂² / ||G||_F², its top direction's share of the energy (matrices, G). inputs: the singular vector on
    the side of the inputs (matrices, G, d). Both are NaN where a gradient is zero.
    """

    share: Tensor
    inputs: Tensor


def first_step(model: OneLayer, rows: Rows) -> Directions:
    """Of the loss on the rows that are fine-tuned (G, B), at the weights as they are."""
    weights = [getattr(model, name) for name in model.watched]
    totals = [torch.zeros_like(weight) for weight in weights]
    for piece in pieces(model, rows):
        found = torch.autograd.grad(summed_loss(model, piece), weights)
        totals = [total + gradient for total, gradient in zip(totals, found, strict=True)]
    shares, inputs = [], []
    for gradient in totals:
        _, values, right = torch.linalg.svd(gradient.double(), full_matrices=False)
        energy = values.square()
        zero = energy.sum(1) == 0
        shares.append((energy[:, 0] / energy.sum(1)).float())
        inputs.append(right[:, 0].masked_fill(zero[:, None], torch.nan).float())
    return Directions(torch.stack(shares).cpu(), torch.stack(inputs).cpu())


def inside(vectors: Tensor, span: Tensor) -> Tensor:
    """How much of unit vectors (..., G, d) lies in the span of others (G, A, d): 1 all, 0 none; |cos| where A is 1.

    A random vector has about (A / d)^½.
    """
    basis = torch.linalg.qr(span.double().mT).Q  # (G, d, A)
    return (vectors.double()[..., None, :] @ basis)[..., 0, :].norm(dim=-1).float()


def error_bound(tuned: float, multiplicity: float, templates: int) -> float:
    """exp(-N_f K² ln|R| / (2 |R|²)): the form of the paper's bound on the error of held-out questions.

    Ruichen Xu and Kexin Chen, arXiv:2508.00901 (v1 to v3), as its summaries print it; what it assumes and its constants
    could not be read. A trend line, and no bound on what is measured here. templates: of an attribute.
    """
    return math.exp(-tuned * multiplicity**2 * math.log(templates) / (2 * templates**2))
