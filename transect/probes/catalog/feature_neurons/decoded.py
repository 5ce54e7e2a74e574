"""MLP neurons by the tokens that their vectors decode to, and how far random vectors single out a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data import Specimen
from ...neurons import Vector, scores, standardised, vectors

RANDOM = 4096  # Gaussian vectors of the control


@dataclass(frozen=True)
class Decoded:
    """kinds: which vectors a neuron has. z (kind, sign, layer, neuron): NaN where there is no such neuron.

    tokens (kind, sign, layer, neuron, place): ids of the top tokens, -1 where there is none. searched (kind, layer,
    neuron): mean score of the searched forms in standard deviations, NaN where nothing was searched.
    """

    kinds: Sequence[Vector]
    z: Tensor
    tokens: Tensor
    searched: Tensor

    def ranked(self, count: int, kinds: Sequence[Vector], signs: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """Places (kind, sign, layer, neuron) of the largest z, one for each top token."""
        allowed = torch.full_like(self.z, -torch.inf)
        for kind in kinds:
            for sign in signs:
                allowed[self.kinds.index(kind), sign] = self.z[self.kinds.index(kind), sign].nan_to_num(-torch.inf)
        values, order = allowed.flatten().topk(min(allowed.numel(), 1000 * count))
        firsts, chosen, seen = self.tokens[..., 0].flatten()[order], [], set()
        for value, token, place in zip(values.tolist(), firsts.tolist(), order, strict=True):
            if value <= 0 or len(chosen) == count:
                break
            if token not in seen:
                seen.add(token)
                kind, sign, layer, neuron = (int(i) for i in torch.unravel_index(place, self.z.shape))
                chosen.append((kind, sign, layer, neuron))
        return chosen


def decode(
    specimen: Specimen, head: Tensor, kinds: Sequence[Vector], top: int, fold: bool = True, forms: Sequence[int] = ()
) -> Decoded:
    """Decode every neuron's vectors through W_U (V x d). forms: token ids whose mean score is kept, too."""
    lens, blocks = specimen.lens if fold else None, specimen.anatomy.blocks
    shape = (len(kinds), 2, len(blocks), max(block.find("up").shape[0] for block in blocks if block.mlp is not None))
    z, searched = torch.full(shape, torch.nan), torch.full((shape[0], *shape[2:]), torch.nan)
    tokens = torch.full((*shape, top), -1, dtype=torch.long)
    for layer, block in enumerate(specimen.shown(blocks, "neurons")):
        for kind, which in enumerate(kinds):
            found = vectors(block, which, lens)
            if found is None:
                continue
            for rows, part in scores(head, found.to(head)):
                part = standardised(part)
                for sign, signed in enumerate((part, -part)):
                    high = signed.topk(top, dim=1)
                    z[kind, sign, layer, rows] = high.values[:, 0].float().cpu()
                    tokens[kind, sign, layer, rows] = high.indices.cpu()
                if forms:
                    searched[kind, layer, rows] = part[:, list(forms)].mean(1).float().cpu()
    return Decoded(kinds, z, tokens, searched)


def random_z(head: Tensor, seed: int) -> Tensor:
    """z of Gaussian vectors on this unembedding, the larger of both signs (4096)."""
    random = torch.randn(RANDOM, head.shape[1], generator=torch.Generator().manual_seed(seed)).to(head)
    return torch.cat([standardised(part).abs().amax(1) for _, part in scores(head, random)]).float().cpu()
