"""Claims of FuseGPT (Pei et al., 2024, arXiv:2411.14507)."""

from __future__ import annotations

from typing import Any

from ...compression import method as registered
from ..context import Variant
from ..ordering import claim_order

FUSEGPT = registered("fusegpt")
PAPER = FUSEGPT.paper
KEEPS = (0.75, 0.5)  # a quarter and half of the blocks removed


def _with(**settings: Any) -> Variant:
    return Variant(FUSEGPT, settings=tuple(settings.items()))


FUSED, PLAIN, BY_COSINE = _with(), _with(epochs=0), _with(epochs=0, choice="cosine")
_FASTER = FUSEGPT.settings({})["fusion_rate"]


# The paper's headline.
claim_order(
    "fusegpt/below-plain-removal", (FUSED, PLAIN), (FUSED, BY_COSINE),
    paper=PAPER,
    statement="Fusing removed blocks into their neighbours loses less than removing the same number without fusion, "
    "chosen by Macro Influence or by cosine similarity.",
    keeps=KEEPS,
)  # fmt: skip


# Macro Influence is measured at the end of the network, and anew after every removal.
claim_order(
    "fusegpt/influence", (PLAIN, BY_COSINE),
    paper=PAPER,
    statement="Without repair, blocks chosen by Macro Influence cost no more than blocks chosen by cosine similarity.",
    keeps=KEEPS,
    or_equal=True,
)  # fmt: skip


# After plain removal, where the choice of blocks is the only difference.
claim_order(
    "fusegpt/measured-anew", (PLAIN, _with(epochs=0, choice="once")),
    paper=PAPER,
    statement="Measuring Macro Influence anew after every removal loses no more than measuring it once.",
    keeps=KEEPS,
    or_equal=True,
)  # fmt: skip


# The ablation of the injected term: against low rank at the paper's rate and, our addition, at the injection's.
claim_order(
    "fusegpt/injection",
    *((FUSED, alone) for alone in (_with(inject=False), _with(inject=False, repair_rate=_FASTER))),
    paper=PAPER,
    statement="Injecting the removed block's weights loses no more than low-rank training of its neighbours alone.",
    keeps=KEEPS,
    or_equal=True,
)  # fmt: skip


# What the published procedure costs memory for.
claim_order(
    "fusegpt/learning-on", (FUSED, _with(collapse="every")),
    paper="Transect's own",
    statement="Letting masks of earlier removals go on learning loses no more than collapsing them after each.",
    keeps=KEEPS,
    or_equal=True,
)  # fmt: skip
