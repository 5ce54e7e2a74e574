"""What a dictionary makes of held-out text: how few features are active, how often each is, and where it is most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ....anatomy import Anatomy
from ....dictionaries import Dictionary, counted, numbered
from ....forward import at_rest, run_body, to_device, watch
from ....forward.blocks import stopping_behind
from .attribution import by_head, by_source

KEPT = 3  # places that are kept of a feature, each in another sequence
NEAR = 8  # a source that is at most so many tokens back is near
KINDS = ("the token itself", "the token before", "tokens near by", "the first token", "tokens far back",
         "what came behind an earlier copy")  # fmt: skip


class Contexts:
    """Sums over vectors for one dictionary, and each feature's strongest places.

    values, sequences, positions: KEPT x F, -1 where there is none; sequences are counted over the text.
    """

    def __init__(self, dictionary: Dictionary) -> None:
        features, width = dictionary.features, dictionary.width
        self.dictionary = dictionary
        self.tokens = self.active = 0
        self.fired = torch.zeros(features, dtype=torch.long)
        self.squares = torch.zeros(features, dtype=torch.float64)
        self.error = self.length = 0.0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.values = torch.zeros(KEPT, features)
        self.sequences, self.positions = (torch.full((KEPT, features), -1) for _ in range(2))

    def add(self, x: Tensor, sequence: int, positions: Tensor) -> None:
        """The vectors (n x D) of one sequence, and where they stand in its row (n)."""
        if not len(x):
            return
        a = self.dictionary.encode(x.to(self.dictionary.decoder))
        on = a > 0
        self.tokens += len(x)
        self.active += int(on.sum())
        self.fired += on.sum(0).cpu()
        self.squares += a.double().square().sum(0).cpu()
        self.error += float((self.dictionary.decode(a) - x).double().square().sum())
        self.length += float(x.double().square().sum())
        self.sum += x.double().sum(0).cpu()
        best = a.max(0)
        values = torch.cat([self.values, best.values[None].float().cpu()])
        places = torch.cat([self.positions, positions[best.indices.cpu()][None]])
        sequences = torch.cat([self.sequences, torch.full((1, a.shape[1]), sequence)])
        self.values, order = values.topk(KEPT, dim=0)
        some = self.values > 0
        self.sequences = sequences.gather(0, order).where(some, -1)
        self.positions = places.gather(0, order).where(some, -1)

    @property
    def explained(self) -> float:
        """Share of the vectors' variance; 1 - Σ‖x̂ - x‖² / Σ‖x - mean‖²."""
        spread = self.length - float(self.sum.square().sum()) / self.tokens
        return 1 - self.error / spread if spread > 0 else float("nan")


@torch.no_grad()
def contexts_of(
    anatomy: Anatomy, layer: int, dictionary: Dictionary, text: Iterable[Mapping[str, Tensor]], first: bool
) -> Contexts:
    """One pass over the text, no further than the layer."""
    found, sequence = Contexts(dictionary), 0
    for batch in text:
        with at_rest(anatomy.model), stopping_behind(anatomy, layer), watch(anatomy, ["heads"], [layer]) as seen:
            run_body(anatomy.model, to_device(batch, anatomy.model.device))
        for row, taken in zip(numbered(seen.heads[layer], batch), counted(batch, first), strict=True):
            found.add(row[taken.to(row.device)], sequence, taken.nonzero()[:, 0].cpu())
            sequence += 1
    return found


@dataclass(frozen=True)
class Example:
    """A place where a feature is active. ids: the sequence's tokens. start: where it begins behind padding.

    heads: what each head contributes (H). sources: each token, over all heads (T). remainder: of what the sources
    explain of what the heads contribute, the largest difference; attention that is not Σ A v leaves one.
    """

    feature: int
    value: float
    ids: Tensor
    position: int
    start: int
    heads: Tensor
    sources: Tensor
    remainder: float

    @property
    def source(self) -> int:
        """The token that contributes most."""
        return int(self.sources.argmax())

    @property
    def kind(self) -> int:
        """Which of KINDS the source is."""
        source, position = self.source, self.position
        if source == position:
            return 0
        if source > self.start and self.ids[source - 1] == self.ids[position]:
            return 5
        if source == position - 1:
            return 1
        if source == self.start:
            return 3
        return 2 if position - NEAR <= source else 4


@torch.no_grad()
def examples_of(
    anatomy: Anatomy, layer: int, contexts: Contexts, features: Iterable[int], text: Iterable[Mapping[str, Tensor]]
) -> list[Example]:
    """The strongest places of these features, strongest first for each, with what they come from; one pass."""
    attention = anatomy.blocks[layer].attention
    assert attention is not None  # whoever chose the layer saw it
    wanted: dict[int, list[tuple[int, int, float]]] = {}
    for feature in dict.fromkeys(features):
        for rank in range(KEPT):
            sequence = int(contexts.sequences[rank, feature])
            if sequence >= 0:
                place = (feature, int(contexts.positions[rank, feature]), float(contexts.values[rank, feature]))
                wanted.setdefault(sequence, []).append(place)
    found, sequence = [], 0
    for batch in text:
        rows = range(len(batch["input_ids"]))
        if any(sequence + row in wanted for row in rows):
            points = watch(anatomy, ["heads", "patterns", "v"], [layer])
            with at_rest(anatomy.model), stopping_behind(anatomy, layer), points as seen:
                run_body(anatomy.model, to_device(batch, anatomy.model.device))
            z, v = numbered(seen.heads[layer], batch), numbered(seen.v[layer], batch)
            v = v.unflatten(2, (-1, attention.head_size))
            for row in rows:
                start = int(counted(batch, True)[row].int().argmax())
                ids = batch["input_ids"][row].cpu()
                for feature, position, value in wanted.get(sequence + row, ()):
                    one, at = torch.tensor([feature], device=z.device), slice(position, position + 1)
                    heads = by_head(contexts.dictionary, z[row, at].to(contexts.dictionary.decoder), one,
                                    attention.heads)[0]  # fmt: skip
                    patterns = seen.patterns[layer][row, :, position][None]
                    split = by_source(contexts.dictionary, one, patterns, v[row][None])[0]
                    remainder = float((split.sum(1) - heads).abs().max())
                    found.append(Example(feature, value, ids, position, start, heads.cpu(), split.sum(0).cpu(),
                                         remainder))  # fmt: skip
        sequence += len(rows)
    return sorted(found, key=lambda example: (example.feature, -example.value))


def kinds_of(examples: Iterable[Example]) -> dict[int, int]:
    """Which of KINDS most of a feature's places are of; of several the first."""
    counts: dict[int, Tensor] = {}
    for example in examples:
        counts.setdefault(example.feature, torch.zeros(len(KINDS)))[example.kind] += 1
    return {feature: int(count.argmax()) for feature, count in counts.items()}
