"""ARank: the rank of each block's attention maps, by which gamma-MoD chooses what to route."""

from __future__ import annotations

import torch

from ...data import Specimen
from ...forward.attention_rank import SEQUENCES, maps_below, ranks_of
from ..draw import Drawing, lines
from ..registry import Looking, probing
from ..result import Quantity, Result


def draw(result: Result) -> list[Drawing]:
    """Both ranks by block."""
    return [
        lines(
            "Rank of attention maps", "How many distinct patterns the heads of a block have on a sequence, on average. "
            "A low rank means that many positions look at the same ones.",
            {"rank": result["rank"], "effective rank": result["effective"]}, xlabel="block", ylabel="rank",
        )
    ]  # fmt: skip


@probing(
    "arank", title="Rank of attention maps", paper="arXiv:2410.13859", watches=["patterns"], of_patterns=maps_below,
    draw=draw,
)  # fmt: skip
def arank(specimen: Specimen) -> Looking:
    """Rank the blocks by the rank of their attention maps: the lowest are said to be redundant.

    The rank of a head's map strictly below the diagonal, in float32 with torch's own tolerance (largest singular value
    times length times precision), mean over heads and then over sequences, each counting once. It depends on the length
    of the sequences: from 0 to that less one. Beside it exp of the entropy of the singular values' shares, which has no
    tolerance (our design). The first 256 tokens of 16 sequences are looked at (ours; the authors look at samples too).
    """
    specimen.require_causal()
    sums, count, longest = torch.zeros(2, specimen.layers), 0, 0
    there = torch.zeros(specimen.layers, dtype=torch.bool)
    while (seen := (yield)) is not None:
        sequences = 0
        for layer, maps in seen.patterns.items() if count < SEQUENCES else ():
            maps = maps[: SEQUENCES - count]
            sums[:, layer] += torch.stack([rank.sum().cpu() for rank in ranks_of(maps)])
            there[layer], sequences, longest = True, len(maps), max(longest, maps.shape[-1])
        count += sequences
    sums = (sums / max(1, count)).masked_fill(~there, torch.nan)
    found = Result(
        {
            "rank": Quantity(sums[0], ("layer",), "", "mean rank of attention maps below the diagonal"),
            "effective": Quantity(sums[1], ("layer",), "", "exp of the entropy of their singular values' shares"),
        }
    )
    order = [layer for layer in sums[0].argsort().tolist() if there[layer]]
    if order:
        low, high = order[0], order[-1]
        found.findings = [
            f"The lowest mean rank is {float(sums[0, low]):.1f} in block {low}, the highest {float(sums[0, high]):.1f} "
            f"in block {high}, of at most {longest - 1}. From the lowest: {', '.join(map(str, order))}."
        ]
    else:
        found.findings = ["No block of this model gives an attention map."]
    found.caveats = [
        "Ranks depend on the length of the sequences, and on the tolerance: compare only on the same text.",
        "That attention of low rank can be left out is gamma-MoD's finding on image tokens, not a property of ranks.",
    ]
    return found
