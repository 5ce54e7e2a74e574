"""Growing a circuit of heads from the output down, and asking what it does alone (CD-T, arXiv:2407.00886)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ....data import Specimen
from ....forward import changed, watch
from .decomposition import Decomposition, Node


@torch.no_grad()
def mean_heads(specimen: Specimen, ids: Tensor) -> dict[int, Tensor]:
    """What each layer's heads say on average over prompts of one length (N x T), by position: T x H d_h."""
    with watch(specimen.anatomy, ["heads"]) as seen:
        specimen.model.base_model(input_ids=ids.to(specimen.model.device), use_cache=False)
    return {layer: heads.mean(0) for layer, heads in seen.heads.items()}


def direction_to(token: int, vocabulary: int) -> Tensor:
    """The direction of one token's logit (V)."""
    direction = torch.zeros(vocabulary)
    direction[token] = 1
    return direction


def scores_on_logits(
    made: Decomposition, nodes: Sequence[Node], direction: Tensor, means: Mapping[int, Tensor] | None, batch: int = 64
) -> Tensor:
    """What each node adds to direction · logits at the last position (n). direction: V numbers, such as e_a - e_b."""
    parts = []
    for start in range(0, len(nodes), batch):
        parts.append(made.heads(nodes[start : start + batch], means).logits @ direction.to(made.logits))
    return torch.cat(parts)


def scores_on_nodes(
    made: Decomposition,
    nodes: Sequence[Node],
    targets: Sequence[Node],
    means: Mapping[int, Tensor] | None,
    batch: int = 64,
) -> Tensor:
    """How much of the targets' outputs comes of each earlier node: Σ_targets mean|r| / (mean|r| + mean|i|) (n)."""
    parts = []
    for start in range(0, len(nodes), batch):
        found = made.heads(nodes[start : start + batch], means, targets).nodes
        shares = []
        for r, x in found.values():
            relevant, rest = r.abs().mean(-1), (x - r).abs().mean(-1)
            shares.append(relevant / (relevant + rest).clamp_min(1e-30))
        parts.append(torch.stack(shares).sum(0))
    return torch.cat(parts)


def grow(
    made: Decomposition, scores: Tensor, means: Mapping[int, Tensor] | None, most: int, threshold: float
) -> list[Node]:
    """Nodes that matter, from the output down: the strongest on the logits, then the strongest on those, and so on.

    scores: of all of `made.nodes` on the logits (n). most: nodes that a round adds at most. threshold: a node is added
    only where it scores at least this share of its round's best (ours; the authors' demonstration has no rule to stop).
    Scores are divided by their layer's mean, as the authors do, in the rounds after the first.
    """
    nodes = made.nodes
    circuit = _best(nodes, scores.abs(), most, threshold)
    frontier = circuit
    while frontier:
        lowest = min(layer for layer, _, _ in frontier)
        targets = [node for node in frontier if node[0] > 0]
        earlier = [node for node in nodes if node[0] < lowest and node not in circuit]
        if not targets or not earlier:
            break
        scores = scores_on_nodes(made, earlier, targets, means)
        layers = torch.tensor([layer for layer, _, _ in earlier])
        for layer in layers.unique():
            scores[layers == layer] /= scores[layers == layer].mean().clamp_min(1e-30)
        frontier = _best(earlier, scores, most, threshold)
        circuit = [*circuit, *frontier]
    return sorted(circuit)


def _best(nodes: Sequence[Node], scores: Tensor, most: int, threshold: float) -> list[Node]:
    values, order = scores.topk(min(most, len(nodes)))
    chosen = values >= threshold * values[0].clamp_min(1e-30)
    return [nodes[int(number)] for number in order[chosen]]


@torch.no_grad()
def alone(specimen: Specimen, ids: Tensor, circuit: Iterable[Node], means: Mapping[int, Tensor]) -> Tensor:
    """Logits at the last position (N x V) with every head outside the circuit at its mean. ids: N x T."""
    size = specimen.anatomy.head_size
    kept: dict[int, Tensor] = {layer: torch.zeros_like(mean, dtype=torch.bool) for layer, mean in means.items()}
    for layer, position, head in circuit:
        kept[layer][position, head * size : (head + 1) * size] = True
    changes = {
        ("heads", layer): lambda x, mean=mean, keep=kept[layer]: torch.where(keep, x, mean)
        for layer, mean in means.items()
    }
    with changed(specimen.anatomy, changes):
        return specimen.model(input_ids=ids.to(specimen.model.device), use_cache=False).logits[:, -1]
