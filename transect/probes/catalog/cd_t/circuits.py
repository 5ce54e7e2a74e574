"""Growing a circuit of heads from the output down, and asking what it does alone (CD-T, arXiv:2407.00886)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ....data import Specimen
from ....forward import changed, last_logits, watch
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
    """How much of the targets' outputs comes of each node: Σ_targets mean|r| / (mean|r| + mean|i|) (n).

    A target that is not behind a node counts nothing for it.
    """
    parts = []
    for start in range(0, len(nodes), batch):
        some = nodes[start : start + batch]
        first = min(layer for layer, _, _ in some)
        total = torch.zeros(len(some)).to(made.logits)
        for r, x in made.heads(some, means, [target for target in targets if target[0] > first]).nodes.values():
            relevant, rest = r.abs().mean(-1), (x - r).abs().mean(-1)
            total += relevant / (relevant + rest).clamp_min(1e-30)
        parts.append(total)
    return torch.cat(parts)


def grow(
    made: Decomposition, scores: Tensor, means: Mapping[int, Tensor] | None, most: int, threshold: float
) -> list[list[Node]]:
    """Nodes that matter, in rounds from the output down: those that add most to the logits, then what those come of.

    scores: of all of `made.nodes` on the logits (n), with their signs: what lowers them is not looked for. most: nodes
    of a round at most. threshold: a node counts only where it scores at least this share of its round's best (ours; the
    authors' demonstration has no such rule). In the rounds after the first, every node in front of any of the last
    round's is asked, and scores are divided by their layer's sum. It ends where nothing is in front of them.
    """
    nodes = made.nodes
    rounds = [_best(nodes, scores, most, threshold)]
    while True:
        targets = [node for node in rounds[-1] if node[0] > 0]
        last = max((layer for layer, _, _ in targets), default=0)
        earlier = [node for node in nodes if node[0] < last and node not in targets]
        if not earlier:
            return rounds
        scores = scores_on_nodes(made, earlier, targets, means)
        layers = torch.tensor([layer for layer, _, _ in earlier])
        for layer in layers.unique():
            scores[layers == layer] /= scores[layers == layer].sum().clamp_min(1e-30)
        rounds.append(_best(earlier, scores, most, threshold))


def _best(nodes: Sequence[Node], scores: Tensor, most: int, threshold: float) -> list[Node]:
    """The largest scores above 0."""
    values, order = scores.topk(min(most, len(nodes)))
    chosen = (values > 0) & (values >= threshold * values[0])
    return [nodes[int(number)] for number in order[chosen]]


def prune(
    circuit: Sequence[Node], protected: Collection[Node], score: Callable[[Sequence[Node]], float], most: int
) -> list[Node]:
    """A circuit without the nodes that it does better without, greedily: as long as one is found whose removal raises
    the score, the one that raises it most goes; `most` at most. Protected nodes stay.
    """
    kept, best = list(circuit), score(circuit)
    for _ in range(most):
        without = [(score([one for one in kept if one != node]), node) for node in kept if node not in protected]
        value, node = max(without, default=(best, None))
        if node is None or value <= best:
            break
        kept.remove(node)
        best = value
    return kept


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
        return last_logits(specimen.model, ids.to(specimen.model.device))[:, 0]
