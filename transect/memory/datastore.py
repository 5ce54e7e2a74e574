"""What a corpus says behind states like this one: keys, next tokens, nearest neighbours (Section 3 of arXiv:2508.01832;
kNN-LM: Khandelwal et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..errors import BadData, TransectError
from ..forward import at_rest, task_of
from ..forward.objective import IGNORED, Batch, inputs_of, targets_of, to_device

BLOCK = 1 << 24  # distances at once: 64 MB


@dataclass(frozen=True)
class Datastore:
    """keys: the state in front of the last MLP, behind its norm (N x d). values: the token that comes next (N).

    own: the model's log-probability of that token (N).
    """

    keys: Tensor
    values: Tensor
    own: Tensor


@dataclass(frozen=True)
class Targets:
    """The next tokens (N x k) of each position's neighbours with their weights (N x k), which sum to 1.

    entropy: of the distribution that they make, in nats (N); a token's weights add up. temperature: of the weights.
    """

    tokens: Tensor
    weights: Tensor
    entropy: Tensor
    temperature: float


def last_mlp(anatomy: Anatomy) -> str:
    """Path of the last block's MLP; TransectError for a model that has none, or does not predict the next token."""
    name = type(anatomy.model).__name__
    if task_of(anatomy.model) != "causal":
        raise TransectError(f"a memory of next tokens needs a model that predicts them, which {name} does not")
    block = anatomy.blocks[-1]
    path = block.slot_path("mlp")
    if path is None or block.has_experts:
        raise TransectError(f"the last block of {name} has no MLP in one module, whose input would be the memory's")
    return path


@torch.no_grad()
def states_of(anatomy: Anatomy, batches: Iterable[Batch]) -> Datastore:
    """Keys and next tokens of every position that predicts one."""
    model = anatomy.model
    keys, values, own, seen = [], [], [], []
    hook = model.get_submodule(last_mlp(anatomy)).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with at_rest(model):
            for batch in batches:
                batch = to_device(batch, model.device)
                targets = targets_of(model, batch).flatten()
                seen.clear()
                logits = model(**inputs_of(model, batch)).logits.flatten(0, 1)
                where = targets != IGNORED
                state = seen[-1].reshape(len(targets), -1)
                keys.append(state[where].float().cpu())
                values.append(targets[where].cpu())
                own.append(logits[where].float().log_softmax(-1).gather(1, targets[where, None])[:, 0].cpu())
    finally:
        hook.remove()
    if not sum(map(len, values)):
        raise BadData("the data holds nothing to be predicted")
    return Datastore(torch.cat(keys), torch.cat(values), torch.cat(own))


@torch.no_grad()
def neighbours_of(store: Datastore, neighbours: int, temperature: float = 0.0) -> Targets:
    """Of every position the k nearest others by squared distance, exactly; a position is never its own neighbour.

    temperature: weights are exp(-distance² / temperature) over their sum; 0 is a fifth of the median of the last
    neighbour's. Repeated passages are neighbours at distance 0: they should not be in the corpus.
    """
    keys, count = store.keys, len(store.values)
    if not 0 < neighbours < count:
        raise TransectError(f"neighbours={neighbours} of {count} positions: choose a number below, or give more data")
    squares = keys.square().sum(1)
    rows = max(1, BLOCK // count)
    found, distances = [], []
    for start in range(0, count, rows):
        apart = squares[start : start + rows, None] + squares - 2 * keys[start : start + rows] @ keys.T
        here = torch.arange(len(apart))
        apart[here, here + start] = torch.inf
        nearest = apart.topk(neighbours, dim=1, largest=False)
        distances.append(nearest.values.clamp_min(0))
        found.append(nearest.indices)
    distance, index = torch.cat(distances), torch.cat(found)
    temperature = temperature or max(float(distance[:, -1].median()) / 5, torch.finfo(distance.dtype).tiny)
    tokens, weights = store.values[index], (-distance / temperature).softmax(1)
    return Targets(tokens, weights, _entropy(tokens, weights), temperature)


def _entropy(tokens: Tensor, weights: Tensor) -> Tensor:
    """-Σ_w p(w) log p(w) of each row, with p(w) the sum of the weights of the entries whose token is w."""
    order = tokens.argsort(dim=1)
    tokens, weights = tokens.gather(1, order), weights.gather(1, order)
    new = torch.ones_like(tokens, dtype=torch.bool)
    new[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    p = torch.zeros_like(weights).scatter_add_(1, new.long().cumsum(1) - 1, weights)
    return -torch.xlogy(p, p).sum(1)
