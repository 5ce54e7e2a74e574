"""Claims of MoDeGPT (Lin et al., ICLR 2025, arXiv:2408.09632)."""

from __future__ import annotations

from itertools import pairwise

from ...compression import method as registered
from ..context import Variant
from ..ordering import claim_order

MODEGPT, SVD_LLM = registered("modegpt"), registered("svd-llm")
# How neurons are chosen and updated, in the order of what is claimed to lose least.
_WAYS = ((), (("update", False),), (("selection", "magnitude"), ("update", False)))


def _ways(allocation: str) -> list[tuple[Variant, Variant]]:
    """Each way beside the next. Type I alone differs: queries, keys, values and outputs are cut alike in all three."""
    return list(pairwise(Variant(MODEGPT, allocation, settings=settings) for settings in _WAYS))


# Every block is cut alike, as the paper's boxes cut one block: what a way loses is not mixed with where it is cut.
claim_order(
    "modegpt/nystrom", *_ways("uniform"),
    paper=MODEGPT.paper,
    statement="Cutting the MLPs of all blocks alike, the Nyström update loses less than the same neurons without it, "
    "and these less than the neurons of the largest weights.",
)  # fmt: skip


# The same order as a user of the defaults meets it. There a block may lose most of its attention with its MLP, while
# the update is fitted to what the dense block puts out.
claim_order(
    "modegpt/nystrom-allocated", *_ways("similarity"),
    paper=MODEGPT.paper,
    statement="With the paper's own allocation (`similarity`), too, the Nyström update loses less than the same "
    "neurons without it, and these less than the neurons of the largest weights.",
)  # fmt: skip


# The paper's comparison with factorizations of single matrices: MoDeGPT with its own allocation, the other with uniform
# shares.
claim_order(
    "modegpt/below-svd-llm", (Variant(MODEGPT), Variant(SVD_LLM)),
    paper=MODEGPT.paper,
    statement="At the same size, MoDeGPT loses less than SVD-LLM.",
)  # fmt: skip


# The paper's allocation against equal shares, with the default temperature.
claim_order(
    "modegpt/allocation", (Variant(MODEGPT), Variant(MODEGPT, "uniform")),
    paper=MODEGPT.paper,
    statement="Sparing the blocks that turn the residual stream most (`similarity`) loses no more than uniform shares.",
    or_equal=True,
)  # fmt: skip
