"""Multiply-adds per position of a language model's passes and of the statistics: the floor under the times.

Counted are the matrix products: block matrices, head, and attention (causal, so half of its square). Norms, activations
and softmax are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transect.anatomy import Anatomy
from transect.statistics import InputCovariance, OutputGradientCovariance, key_of
from transect.statistics.gram import gram_zeros


@dataclass(frozen=True)
class Flops:
    """matrices, attention, head: of one forward pass. inputs: Gram matrices of all distinct inputs; gradients: of all
    output gradients, both with the lower triangle left out as `transect.statistics.gram` does.

    full_inputs, full_gradients: the same with whole Gram matrices, and with one input each for q, k, v, gate and up.
    """

    matrices: float
    attention: float
    head: float
    inputs: float
    gradients: float
    full_inputs: float
    full_gradients: float

    @property
    def forward(self) -> float:
        return self.matrices + self.attention + self.head

    @property
    def backward_activations(self) -> float:
        """Each product with a weight needs one to pass the gradient on; each of attention's two, one per factor."""
        return self.matrices + 2 * self.attention + self.head

    @property
    def backward_weights(self) -> float:
        """Every weight gradient is a product as large as the forward one."""
        return self.matrices + self.head

    @property
    def covariance_floor(self) -> float:
        """Input covariances over a plain forward pass; collecting them needs no head."""
        return (self.matrices + self.attention + self.inputs) / self.forward

    @property
    def kfac_floor(self) -> float:
        """Both K-FAC factors over a plain forward and backward pass; collecting them needs no weight gradients."""
        ours = self.forward + self.backward_activations + self.inputs + self.gradients
        return ours / (self.forward + self.backward_activations + self.backward_weights)


def count(anatomy: Anatomy, length: int) -> Flops:
    """For sequences of `length` positions."""
    matrices = anatomy.matrices()
    inputs = {key_of(matrix, InputCovariance()): matrix.shape[1] for matrix in matrices}
    outputs = {key_of(matrix, OutputGradientCovariance()): matrix.shape[0] for matrix in matrices}
    embedding = anatomy.model.get_output_embeddings().weight
    return Flops(
        matrices=sum(m * n for m, n in (matrix.shape for matrix in matrices)),
        attention=sum(length * block.find("o").shape[1] for block in anatomy.blocks),
        head=embedding.numel(),
        inputs=sum(upper(n) for n in inputs.values()),
        gradients=sum(upper(m) for m in outputs.values()),
        full_inputs=sum(matrix.shape[1] ** 2 for matrix in matrices),
        full_gradients=sum(matrix.shape[0] ** 2 for matrix in matrices),
    )


def upper(n: int) -> int:
    """Multiply-adds per row of the panels on and above the diagonal of an n x n Gram matrix."""
    return sum(panel.numel() for panel in gram_zeros(n, torch.float32, torch.device("meta")).values())
