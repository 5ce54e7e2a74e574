"""Projected gradient on the input embeddings, within a ball around what the model is given (Madry et al., 2018).

The start, step and ball are those of model-tuning via prompts (Raman et al., 2023, arXiv:2303.07320).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...forward import Batch, at_rest
from .substitution import Robustness


@contextmanager
def added(embedding: nn.Module, delta: Tensor) -> Iterator[None]:
    """Inside the `with`, delta (N x L x d) is added to what the embedding puts out for N sequences of L tokens."""
    handle = embedding.register_forward_hook(lambda module, args, output: output + delta.to(output))
    try:
        yield
    finally:
        handle.remove()


def perturbation(
    model: Any,
    loss: Callable[[], Tensor],
    real: Tensor,
    *,
    epsilon: float,
    steps: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What to add to the input embeddings (N x L x d) so that the loss rises, of l2 norm epsilon a sequence at most.

    loss: runs the model on N sequences of L tokens and gives a scalar. real: which of them (N x L) are no padding; only
    they are changed. From a random point of the ball's surface, each step goes 1.5 epsilon / steps along the gradient
    of each sequence, and back to the ball. The model is at rest meanwhile.
    """
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    inside = real.bool().to(device)[..., None]
    start = torch.randn(*real.shape, embedding.weight.shape[1], generator=generator).to(device) * inside
    delta = epsilon * start / _norm(start)
    with at_rest(model), torch.enable_grad():
        for _ in range(steps):
            delta.requires_grad_(True)
            with added(embedding, delta):
                (gradient,) = torch.autograd.grad(loss(), delta)
            gradient = gradient * inside
            moved = delta.detach() + 1.5 * epsilon / steps * gradient / _norm(gradient)
            delta = moved * (epsilon / _norm(moved)).clamp(max=1)
    return delta.detach()


def _norm(delta: Tensor) -> Tensor:
    """Of each sequence (N x 1 x 1), never 0."""
    return delta.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12)


@torch.no_grad()
def gradient_attack(
    model: Any,
    losses: Callable[[Batch], tuple[Tensor, Tensor]],
    real: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    epsilon: float,
    steps: int = 10,
    seed: int = 0,
) -> Robustness:
    """How many examples are right before, and still after, their embeddings are moved by at most epsilon.

    losses: of a batch's examples, and whether the model is right about each (B). real: which positions of the sequences
    that the model is given (N x L) are no padding.
    """
    generator, before, after = torch.Generator().manual_seed(seed), [], []
    with at_rest(model):
        for batch in batches:
            right = losses(batch)[1]
            delta = perturbation(
                model, lambda batch=batch: losses(batch)[0].sum(), real(batch), epsilon=epsilon, steps=steps,
                generator=generator,
            )  # fmt: skip
            with added(model.get_input_embeddings(), delta):
                still = losses(batch)[1]
            before += right.tolist()
            after += (right & still).tolist()
    return Robustness.of(before, after)
