"""Heads that copy: on random tokens said twice, which look one token back, and which look at what came next.

After Olsson et al., arXiv:2209.11895: an induction head attends from a token to the one behind its earlier
occurrence, and finds it by what a previous-token head in an earlier layer has written there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import Specimen
from ..errors import NotApplicable
from ..forward import watch

LENGTH = 12  # tokens that are said twice
SHARE = 0.3  # of its attention that makes a head one of the two kinds; our choice


def repeated(specimen: Specimen, count: int) -> Tensor:
    """Random tokens said twice (count x 24), on the CPU."""
    generator = torch.Generator().manual_seed(specimen.seed)
    half = torch.randint(len(specimen.lens.weight), (count, LENGTH), generator=generator)
    return torch.cat([half, half], 1)


@torch.no_grad()
def copying_heads(specimen: Specimen, count: int = 16) -> tuple[Tensor, Tensor]:
    """Mean attention in the second half to the token before, and to the one behind the earlier occurrence (L x H).

    0 where a block has fewer heads, or no attention.
    """
    with watch(specimen.anatomy, ["patterns"]) as seen:
        specimen.model.base_model(input_ids=repeated(specimen, count).to(specimen.model.device), use_cache=False)
    most = max((pattern.shape[1] for pattern in seen.patterns.values()), default=0)
    shares = torch.zeros(2, specimen.layers, most)
    for layer, pattern in seen.patterns.items():
        for kind, back in enumerate((1, LENGTH - 1)):
            looked = pattern.float().diagonal(-back, 2, 3)[..., LENGTH - back :]  # of the queries in the second half
            shares[kind, layer, : pattern.shape[1]] = looked.mean((0, 2)).cpu()
    return shares[0], shares[1]


def heads_that(shares: Tensor, what: str) -> list[tuple[int, int]]:
    """(layer, head) of those whose share is large enough, the largest first; NotApplicable where there is none."""
    order = shares.flatten().argsort(descending=True).tolist()
    found = [divmod(place, shares.shape[1]) for place in order if shares.flatten()[place] >= SHARE]
    if not found:
        raise NotApplicable(
            f"no head of this model {what}: on random tokens said twice, the best gives {float(shares.max()):.0%} of "
            f"its attention to that, and {SHARE:.0%} is our threshold"
        )
    return found
