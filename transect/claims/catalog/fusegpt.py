"""Claims of FuseGPT (Pei et al., 2024, arXiv:2411.14507)."""

from __future__ import annotations

from typing import Any

from ...compression import method as registered
from ..context import Context, Variant
from ..ordering import ordered_at
from ..registry import Result, claim

FUSEGPT = registered("fusegpt")
PAPER = FUSEGPT.paper
KEEPS = (0.75, 0.5)  # a quarter and half of the blocks removed


def _with(**settings: Any) -> Variant:
    return Variant(FUSEGPT, settings=tuple(settings.items()))


def _ordered(context: Context, *pairs: tuple[Variant, Variant], or_equal: bool = False) -> Result:
    """Judge that the first of each pair loses less than the second, at the same number of removed blocks."""
    context.require_language_model()
    return ordered_at(context, KEEPS, *pairs, or_equal=or_equal)


@claim(
    "fusegpt/below-plain-removal",
    method="fusegpt",
    paper=PAPER,
    statement="Fusing removed blocks into their neighbours loses less than removing the same number without fusion, "
    "chosen by Macro Influence or by cosine similarity.",
    uses=["fusegpt"],
)
def below_plain_removal(context: Context) -> Result:
    """The paper's headline."""
    fused = Variant(FUSEGPT)
    return _ordered(context, (fused, _with(epochs=0)), (fused, _with(epochs=0, choice="cosine")))


@claim(
    "fusegpt/influence",
    method="fusegpt",
    paper=PAPER,
    statement="Without repair, blocks chosen by Macro Influence cost no more than blocks chosen by cosine similarity.",
    uses=["fusegpt"],
)
def influence(context: Context) -> Result:
    """Macro Influence is measured at the end of the network, and anew after every removal."""
    return _ordered(context, (_with(epochs=0), _with(epochs=0, choice="cosine")), or_equal=True)


@claim(
    "fusegpt/measured-anew",
    method="fusegpt",
    paper=PAPER,
    statement="Measuring Macro Influence anew after every removal loses no more than measuring it once.",
    uses=["fusegpt"],
)
def measured_anew(context: Context) -> Result:
    """After plain removal, where the choice of blocks is the only difference."""
    return _ordered(context, (_with(epochs=0), _with(epochs=0, choice="once")), or_equal=True)


@claim(
    "fusegpt/injection",
    method="fusegpt",
    paper=PAPER,
    statement="Injecting the removed block's weights loses no more than low-rank training of its neighbours alone.",
    uses=["fusegpt"],
)
def injection(context: Context) -> Result:
    """The ablation of the injected term: against low rank at the paper's rate and, our addition, at the injection's."""
    faster = FUSEGPT.settings({})["fusion_rate"]
    alone = (_with(inject=False), _with(inject=False, repair_rate=faster))
    return _ordered(context, *((Variant(FUSEGPT), other) for other in alone), or_equal=True)
