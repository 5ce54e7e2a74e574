"""Claims of MoDeGPT (Lin et al., ICLR 2025, arXiv:2408.09632)."""

from __future__ import annotations

from ...compression import method as registered
from ..context import Context, Variant
from ..ordering import ordered
from ..registry import Result, claim

MODEGPT, SVD_LLM = registered("modegpt"), registered("svd-llm")


@claim(
    "modegpt/nystrom",
    method="modegpt",
    paper=MODEGPT.paper,
    statement="Cutting MLPs, the Nyström update loses less than the same neurons without it, and these less than the "
    "neurons of the largest weights.",
    uses=["modegpt"],
)
def nystrom(context: Context) -> Result:
    """Type I alone differs: queries, keys, values and outputs are cut alike in all three."""
    context.require_language_model()
    bare = Variant(MODEGPT, settings=(("update", False),))
    magnitude = Variant(MODEGPT, settings=(("selection", "magnitude"), ("update", False)))
    return ordered(context, (Variant(MODEGPT), bare), (bare, magnitude))


@claim(
    "modegpt/below-svd-llm",
    method="modegpt",
    paper=MODEGPT.paper,
    statement="At the same size, MoDeGPT loses less than SVD-LLM.",
    uses=["modegpt", "svd-llm"],
)
def below_svd_llm(context: Context) -> Result:
    """The paper's comparison with factorizations of single matrices, both with uniform shares."""
    context.require_language_model()
    return ordered(context, (Variant(MODEGPT), Variant(SVD_LLM)))


@claim(
    "modegpt/allocation",
    method="modegpt",
    paper=MODEGPT.paper,
    statement="Sparing the blocks that turn the residual stream most (`similarity`) loses no more than uniform shares.",
    uses=["modegpt"],
)
def allocation(context: Context) -> Result:
    """The paper's allocation against equal shares, with the default temperature."""
    context.require_language_model()
    return ordered(context, (Variant(MODEGPT, "similarity"), Variant(MODEGPT)), or_equal=True)
