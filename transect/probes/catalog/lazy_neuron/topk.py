"""Only the k largest activations of each token: the Top-k MLP of Li et al. 2023 (arXiv:2210.06313), section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import TransectError


def top_k(activations: Tensor, k: int, *, magnitude: bool = False) -> Tensor:
    """The k largest entries of each token (... x n), zero elsewhere; all of them for k >= n.

    magnitude: the largest by |a| instead of a. After a ReLU both are the same; after GELU, SiLU or a gate they are
    not. Of equal entries some are chosen, so that never more than k are left. Gradients reach the kept entries
    alone. Raises TransectError for k < 1.
    """
    values, places = largest(activations, k, magnitude=magnitude)
    return torch.zeros_like(activations).scatter(-1, places, values)


def largest(activations: Tensor, k: int, *, magnitude: bool = False) -> tuple[Tensor, Tensor]:
    """Values and places (... x k) of the k largest entries of each token, as in `top_k`."""
    if k < 1:
        raise TransectError(f"at least one neuron must stay active, got k={k}")
    scores = activations.detach().abs() if magnitude else activations.detach()
    places = scores.topk(min(k, activations.shape[-1]), sorted=False).indices
    return activations.gather(-1, places), places


def gathered(weight: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """W a (... x d) from W (d x n) and the few entries of a that are not zero (values and places, ... x k).

    2 d k operations a token instead of 2 d n. It reads k columns of W for each token, so on ordinary hardware it is
    not faster than the dense product by that factor.
    """
    columns = weight.T[places]  # ... x k x d
    return (values[..., None, :] @ columns)[..., 0, :]
