"""What each kind of text loses without the neurons that serve a kind, and how far these sets overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ....data import Specimen
from ....evaluation import evaluate_loss
from ....forward import changed
from ...neurons import held
from .scores import Texts

Rank = Literal["score", "margin"]
Fill = Literal["zero", "mean"]


def ranked(scores: Tensor, rank: Rank) -> Tensor:
    """By what neurons are chosen for a kind (C x N): the score, or how far it is above the best of the other kinds."""
    if rank == "score":
        return scores
    others = torch.stack([torch.cat([scores[:c], scores[c + 1 :]]).amax(0) for c in range(len(scores))])
    return scores - others


def chosen(values: Tensor, widths: Sequence[int], share: float, per_layer: bool) -> Tensor:
    """Which neurons are in the top share of each row (C x N, bool). widths: of the layers, side by side in N."""
    parts = values.split(list(widths), -1) if per_layer else [values]
    found = []
    for part in parts:
        mask = torch.zeros_like(part, dtype=torch.bool)
        places = part.topk(max(1, round(share * part.shape[-1])), dim=-1).indices
        found.append(mask.scatter(-1, places, True))
    return torch.cat(found, -1)


def overlaps(sets: Tensor) -> Tensor:
    """|A ∩ B| / |A| of sets of one size (C x N, bool): C x C."""
    members = sets.double()
    return members @ members.T / members.sum(1, keepdim=True)


def losses_by_kind(specimen: Specimen, texts: Texts) -> Tensor:
    """Mean loss of each kind's texts (C), in nats, as the model is at the moment."""
    found = []
    for kind in range(len(texts.names)):
        part = texts.of((texts.labels == kind).nonzero()[:, 0])
        found.append(evaluate_loss(specimen.model, [batch for batch, _, _ in part.batches()]).loss)
    return torch.tensor(found, dtype=torch.float64)


def pruned_losses(specimen: Specimen, widths: Mapping[int, int], sets: Tensor, texts: Texts, values: Tensor) -> Tensor:
    """Loss by kind with each set of neurons held at values (N): S x C. sets: S x N, bool. widths: neurons by layer."""
    sizes, rows = list(widths.values()), []
    for members in specimen.shown(sets, "groups of neurons at rest"):
        changes = {}
        for layer, inside, at in zip(widths, members.split(sizes), values.split(sizes), strict=True):
            neurons = inside.nonzero()[:, 0]
            if len(neurons):
                changes["neurons", layer] = held(neurons.tolist(), at[neurons])
        with changed(specimen.anatomy, changes):
            rows.append(losses_by_kind(specimen, texts))
    return torch.stack(rows)
