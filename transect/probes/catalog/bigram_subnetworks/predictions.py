"""What a model predicts on held-out text with some of its weights, beside what the bigram table predicts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....data import Batches
from ....forward import at_rest, computing_wide, scored
from ....forward.objective import IGNORED, targets_of
from .table import BigramTable


@dataclass(frozen=True)
class Outcome:
    """surprisals: -ln p of each held-out token (n). distance: mean cross-entropy with the table's predictions. Nats."""

    surprisals: Tensor
    distance: float

    @property
    def loss(self) -> float:
        """Mean surprisal."""
        return float(self.surprisals.mean())


@torch.no_grad()
def outcome(model: object, text: Batches, table: BigramTable) -> Outcome:
    """Of the model as it is at the moment, on every token that has one before it."""
    found, distance = [], 0.0
    with at_rest(model), computing_wide(model):
        for batch in text:
            contexts, start = contexts_of(model, batch), 0
            for logits, labels, _ in scored(model, batch):
                part = logits[:, : table.vocabulary].double()
                before = contexts[start : start + len(part)]
                start += len(part)
                logs = part.log_softmax(-1)
                found.append(-logs.gather(1, labels[:, None])[:, 0].cpu())
                distance += float(table.cross_entropies(before, part).sum())
    surprisals = torch.cat(found)
    return Outcome(surprisals, distance / len(surprisals))


def contexts_of(model: object, batch: dict[str, Tensor]) -> Tensor:
    """The token (n) from which each of the batch's predictions is made, in the order of `scored`, on the CPU."""
    return batch["input_ids"][targets_of(model, batch) != IGNORED].long().cpu()


def bigram_surprisals(model: object, text: Batches, table: BigramTable) -> Tensor:
    """-ln P of each held-out token under the table (n), in the order of `outcome`; infinite for what it never saw."""
    found = []
    for batch in text:
        targets = targets_of(model, batch)
        found.append(table.surprisals(contexts_of(model, batch), targets[targets != IGNORED].long().cpu()))
    return torch.cat(found)


def correlation(ours: Tensor, bigram: Tensor) -> float:
    """Pearson's r of surprisals (n each). As in the paper tokens that are impossible to the table are left out, and an
    infinite surprisal of the model is the largest finite one. NaN where one of them is constant, or fewer than 2 are
    left."""
    possible = bigram.isfinite()
    x, y = ours[possible].double(), bigram[possible].double()
    finite = x[x.isfinite()]
    if len(x) < 2 or not len(finite):
        return float("nan")
    x = torch.where(x.isfinite(), x, finite.max())
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 1e-12 * len(x) else float("nan")
