"""Whether neurons still stand for the same tokens after a model was tuned (Davies, arXiv:2501.02688)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data import Specimen
from ....errors import NotApplicable, TransectError
from ...neurons import Vector, kinds_of, unembedding
from .decoded import decode


@dataclass(frozen=True)
class Stability:
    """Share of neurons whose top token is the same in both models.

    kinds: up, gate and down, as far as the models have them. layers: by kind and layer (kinds x L), NaN where a block
    has no MLP. shares: by kind (kinds). chance: by kind, the share if the neurons of one model were shuffled within
    their layer.
    """

    kinds: Sequence[Vector]
    layers: Tensor
    shares: Tensor
    chance: Tensor


@torch.no_grad()
def stability(base: Specimen, tuned: Specimen, *, fold: bool = True) -> Stability:
    """Compare the neurons of a model with those of another that was tuned from it.

    Each model's vectors are decoded by its own norms and its own head. The top token is that of the vector itself, as
    in the paper, which looks at rows of up; gate, down and the chance level are our additions.

    fold: multiply by the gains of the norms, as in the probe.
    Raises TransectError for models of different shape, and NotApplicable where there is no head or no MLP.
    """
    kinds = kinds_of(base.anatomy.blocks)
    if not kinds:
        raise NotApplicable("no block of this model has an MLP of neurons left")
    shapes = [_shape(specimen) for specimen in (base, tuned)]
    if shapes[0] != shapes[1]:
        raise TransectError(
            f"the models have {' and '.join(map(str, shapes))} tokens, and neurons by block: only a model that was "
            "tuned from the other, with the same tokens, can be compared neuron by neuron"
        )
    tops = [
        decode(specimen, unembedding(specimen.lens), kinds, top=1, fold=fold).tokens[:, 0, ..., 0]
        for specimen in (base, tuned)
    ]
    present = tops[0] >= 0  # kinds x L x neurons
    same, count = ((tops[0] == tops[1]) & present).sum(-1), present.sum(-1)
    pairs = zip(*(one.flatten(0, 1) for one in tops), strict=True)
    expected = torch.stack([_shuffled(a, b) for a, b in pairs]).view(same.shape)
    return Stability(kinds, same / count, same.sum(-1) / count.sum(-1), expected.sum(-1) / count.sum(-1))


def _shape(specimen: Specimen) -> tuple[int, list[int]]:
    return len(specimen.lens.weight), [block.find("up").shape[0] for block in specimen.anatomy.blocks]


def _shuffled(a: Tensor, b: Tensor) -> Tensor:
    """How many of n neurons agree on average when one model's tokens (n) are shuffled; -1 stands for no neuron."""
    a, b = a[a >= 0], b[b >= 0]
    most = 1 + int(torch.cat([a, b, torch.zeros(1, dtype=torch.long)]).max())
    together = a.bincount(minlength=most).double() @ b.bincount(minlength=most).double()
    return together / max(1, len(a))
