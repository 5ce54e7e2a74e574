"""Linear maps from each layer's stream to the last one and back to the input: where the prediction is, and the token.

Chang and Bergen 2025 fit them by ridge regression (alpha 1, with an intercept) on about 128,000 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ....data import Batches, Specimen
from ....forward import Batch, at_rest, computing_wide, inputs_of, real_positions, watch
from ....forward.objective import IGNORED, targets_of
from .predictions import correlation

ALPHA = 1.0
TRIED = 512  # held-out tokens, or those of one batch more; each layer has the whole vocabulary for each


@dataclass(frozen=True)
class Lenses:
    """By state of the stream (L + 1). output: r of the surprisals that the map to the last state gives with those of
    the model. recall: share of tokens whose own embedding has the largest product with what the map to the input gives.
    rotation: median angle by which the map to the last state turns, in radians."""

    output: Tensor
    recall: Tensor
    rotation: Tensor


class Sums:
    """What ridge regression needs of pairs (x, y), n x d and n x d': sums that do not grow with n."""

    def __init__(self) -> None:
        self.count = 0
        self.x = self.y = self.xx = self.xy = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """More pairs."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x, self.y = self.x + x.sum(0).cpu(), self.y + y.sum(0).cpu()
        self.xx, self.xy = self.xx + (x.T @ x).cpu(), self.xy + (x.T @ y).cpu()

    def solve(self) -> tuple[Tensor, Tensor]:
        """A (d x d') and b (d') of y ≈ x A + b, which minimise the squared error + alpha ||A||²."""
        mean, middle = self.x / self.count, self.y / self.count
        gram = self.xx - self.count * torch.outer(mean, mean)
        gram.diagonal().add_(ALPHA)
        slope = torch.linalg.solve(gram, self.xy - self.count * torch.outer(mean, middle))
        return slope, middle - mean @ slope


def turned(slope: Tensor) -> float:
    """Median of |arg| over the complex eigenvalues of a map (d x d), in radians; 0 where all are real."""
    values = torch.linalg.eigvals(slope)
    angles = values.angle().abs()[values.imag.abs() > 1e-9 * values.abs()]
    return float(angles.median()) if len(angles) else 0.0


@torch.no_grad()
def lenses(specimen: Specimen, training: Batches, held_out: Batches) -> Lenses:
    """Fit the maps of the model as it is at the moment on one text, and try them on the first tokens of another."""
    model, states, lens = specimen.model, specimen.layers + 1, specimen.lens
    sums, width = [Sums() for _ in range(states)], lens.weight.shape[1]
    with at_rest(model), computing_wide(model):
        embedding = model.get_input_embeddings().weight.detach()
        for batch in training:
            seen, real, _ = _watched(specimen, batch)
            tokens = batch["input_ids"].to(embedding.device)[real]
            goals = torch.cat([seen[-1][real], embedding[tokens].to(seen[-1])], -1)  # the last state, and the input
            for one, state in zip(sums, seen, strict=True):
                one.add(state[real], goals)
        maps = [one.solve() for one in sums]
        own, ours, hits, tried = [], [[] for _ in range(states)], torch.zeros(states, dtype=torch.float64), 0
        for batch in held_out:
            targets = targets_of(model, batch).to(model.device)
            asked = targets != IGNORED
            if tried >= TRIED or not bool(asked.any()):
                continue
            seen, _, logits = _watched(specimen, batch)
            tokens, labels = batch["input_ids"].to(model.device)[asked], targets[asked]
            own.append(_surprisals(logits[asked], labels))
            tried += len(tokens)
            for number, state in enumerate(seen):
                slope, shift = (part.to(state) for part in maps[number])
                last, first = (state[asked] @ slope + shift).split(width, -1)
                ours[number].append(_surprisals(lens(last), labels))
                hits[number] += float(((first.to(embedding) @ embedding.T).argmax(-1) == tokens).sum())
    output = torch.tensor([correlation(torch.cat(part), torch.cat(own)) for part in ours], dtype=torch.float64)
    rotation = torch.tensor([turned(slope[:, :width]) for slope, _ in maps], dtype=torch.float64)
    return Lenses(output, hits / max(1, tried), rotation)


def _surprisals(logits: Tensor, labels: Tensor) -> Tensor:
    """-ln p of the labels (n), in float64 on the CPU."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, labels, reduction="none").double().cpu()


def _watched(specimen: Specimen, batch: Batch) -> tuple[list[Tensor], Tensor, Tensor]:
    """The stream's states (B x T x d each), which positions are real (B x T), and the logits."""
    with watch(specimen.anatomy, ["residual"]) as seen:
        logits = specimen.model(**inputs_of(specimen.model, batch)).logits
    states = [seen.residual[state] for state in range(specimen.layers + 1)]
    real = real_positions(batch)
    kept = torch.ones_like(batch["input_ids"], dtype=torch.bool) if real is None else real
    return states, kept.to(logits.device), logits
