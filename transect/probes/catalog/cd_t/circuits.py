"""Growing a circuit of heads from the output down, and asking what it does alone (CD-T, arXiv:2407.00886)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ....data import Specimen
from ....errors import NotApplicable
from ....forward import Behind, changed, last_logits, put_out, watch
from .decomposition import Decomposition, Node

_ROWS = 128  # short sequences that run at once


def require_heads(specimen: Specimen) -> None:
    """NotApplicable unless the model is a causal one that can be decomposed, with heads in it."""
    specimen.require_causal()
    specimen.require_contributions()
    specimen.require_own_sublayers()
    if not any(block.attention is not None for block in specimen.anatomy.blocks):
        raise NotApplicable("no block of this model has attention left, whose heads could be found")


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
    made: Decomposition, nodes: Sequence[Node], direction: Tensor, means: Mapping[int, Tensor] | None, batch: int = 32
) -> Tensor:
    """What each node adds to direction · logits at the last position (n). direction: V numbers, such as e_a - e_b."""
    found = torch.zeros(len(nodes)).to(made.logits)
    for some, numbers in _batches(nodes, batch):
        found[numbers] = made.heads(some, means).logits @ direction.to(found)
    return found


def scores_on_everything(
    made: Decomposition, direction: Tensor, means: Mapping[int, Tensor] | None, batch: int = 32
) -> tuple[Tensor, Tensor]:
    """What each of `made.nodes` adds to direction · logits (n), and its share in what each of them says (n x n).

    A node's share in another is mean|r| / (mean|r| + mean|i|) over that head's numbers; 0 where it is not in front.
    One pass for both, since the rounds of every search ask for some of the shares.
    """
    nodes = made.nodes
    scores, shares = torch.zeros(len(nodes)).to(made.logits), torch.zeros(len(nodes), len(nodes))
    layers = torch.tensor([layer for layer, _, _ in nodes])
    size = made.anatomy.head_size
    for some, numbers in _batches(nodes, batch):
        parts = made.heads(some, means, keep=True)
        scores[numbers] = parts.logits @ direction.to(scores)
        for layer, r in parts.heads.items():
            if layer > some[0][0]:
                relevant, rest = (
                    part.abs().unflatten(-1, (-1, size)).mean(-1).flatten(1) for part in (r, made.seen.heads[layer] - r)
                )  # n x T H, in the order of the nodes
                found = (relevant / (relevant + rest).clamp_min(1e-30)).to(shares)
                shares[numbers[:, None], (layers == layer).nonzero()[:, 0]] = found
    return scores, shares


def _batches(nodes: Sequence[Node], size: int) -> Iterator[tuple[list[Node], Tensor]]:
    """Nodes of one layer and of positions near each other, and which of all they are: in front of them is nothing."""
    order = sorted(range(len(nodes)), key=lambda number: nodes[number])
    for _, group in groupby(order, key=lambda number: nodes[number][0]):
        numbers = list(group)
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            yield [nodes[number] for number in some], torch.tensor(some)


def grow(nodes: Sequence[Node], scores: Tensor, shares: Tensor, most: int, threshold: float) -> list[list[Node]]:
    """Nodes that matter, in rounds from the output down: those that add most to the logits, then what those come of.

    scores: of all nodes on the logits (n), with their signs: what lowers them is not looked for. shares: of all nodes
    in each other (n x n). most: nodes of a round at most. threshold: a node counts only where it scores at least this
    share of its round's best (ours; the authors' demonstration has no such rule). In the rounds after the first, every
    node in front of any of the last round's is asked: its shares in them are added up, and divided by their layer's
    sum. It ends where nothing is in front of them.
    """
    rounds = [_best(nodes, scores, most, threshold)]
    number_of = {node: number for number, node in enumerate(nodes)}
    while True:
        targets = [node for node in rounds[-1] if node[0] > 0]
        last = max((layer for layer, _, _ in targets), default=0)
        earlier = [node for node in nodes if node[0] < last and node not in targets]
        if not earlier:
            return rounds
        asked, asking = (torch.tensor([number_of[node] for node in some]) for some in (earlier, targets))
        scores = shares[asked][:, asking].sum(1)
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
    circuit: Sequence[Node],
    protected: Collection[Node],
    score: Callable[[Sequence[Node]], float],
    without: Callable[[Sequence[Node], Sequence[Node]], Tensor],
    most: int,
) -> list[Node]:
    """A circuit without the nodes that it does better without, greedily: as long as one is found whose removal raises
    the score, the one that raises it most goes; `most` at most. Protected nodes stay.

    without: the scores of a circuit less each of some of its nodes.
    """
    kept, best = list(circuit), score(circuit)
    for _ in range(most):
        able = [node for node in kept if node not in protected]
        values = without(kept, able) if able else torch.zeros(0)
        if not able or float(values.max()) <= best:
            break
        kept.remove(able[int(values.argmax())])
        best = float(values.max())
    return kept


class Alone:
    """Some prompts of one length (N x T) in a model in which only some heads speak; the others are at their mean."""

    def __init__(self, specimen: Specimen, ids: Tensor, means: Mapping[int, Tensor]) -> None:
        self.specimen, self.ids, self.means = specimen, ids.to(specimen.model.device), means

    @torch.no_grad()
    def logits(self, circuit: Iterable[Node]) -> Tensor:
        """At the last position (N x V)."""
        with changed(self.specimen.anatomy, self._changes(circuit)):
            return last_logits(self.specimen.model, self.ids)[:, 0]

    @torch.no_grad()
    def without(self, circuit: Sequence[Node], nodes: Iterable[Node]) -> Iterator[tuple[list[Node], Tensor]]:
        """Some of the circuit's nodes, and the logits (n x N x V) of the circuit less each of them.

        In front of a node everything is as with the whole circuit, so only what is behind it runs, and nodes of a layer
        together.
        """
        anatomy, changes = self.specimen.anatomy, self._changes(circuit)
        with changed(anatomy, changes), watch(anatomy, ["residual"]) as seen:
            self.specimen.model.base_model(input_ids=self.ids, use_cache=False)
        behind = Behind(anatomy, self.ids, 0, None, seen.residual)
        for some, _ in _batches(sorted(nodes), max(1, _ROWS // len(self.ids))):
            layer = some[0][0]
            hidden = seen.residual[layer].repeat(len(some), 1, 1)  # those of one node one after another
            with changed(anatomy, changes | {("heads", layer): self._less(layer, circuit, some)}):
                for number in range(layer, self.specimen.layers):
                    hidden = behind.run(number, hidden)
            with put_out(anatomy, hidden[:, -1:]):
                logits = last_logits(self.specimen.model, self.ids[:, -1:].repeat(len(some), 1))[:, 0]
            yield some, logits.unflatten(0, (len(some), -1))

    def _changes(self, circuit: Iterable[Node]) -> dict[Any, Callable[[Tensor], Tensor]]:
        kept = {layer: torch.zeros_like(mean, dtype=torch.bool) for layer, mean in self.means.items()}
        for layer, position, head in circuit:
            kept[layer][position, self._numbers(head)] = True
        return {
            ("heads", layer): lambda x, mean=mean, keep=kept[layer]: torch.where(keep, x, mean)
            for layer, mean in self.means.items()
        }

    def _less(self, layer: int, circuit: Iterable[Node], nodes: Sequence[Node]) -> Callable[[Tensor], Tensor]:
        """The change of a layer's heads in copies of the prompts, each of which lacks one of the nodes."""
        change = self._changes(circuit)["heads", layer]

        def less(x: Tensor) -> Tensor:
            new = change(x).unflatten(0, (len(nodes), -1)).clone()
            for number, (_, position, head) in enumerate(nodes):
                new[number, :, position, self._numbers(head)] = self.means[layer][position, self._numbers(head)]
            return new.flatten(0, 1)

        return less

    def _numbers(self, head: int) -> slice:
        size = self.specimen.anatomy.head_size
        return slice(head * size, (head + 1) * size)
