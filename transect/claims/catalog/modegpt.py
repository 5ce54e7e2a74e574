"""Claims of MoDeGPT (Lin et al., ICLR 2025, arXiv:2408.09632)."""

from __future__ import annotations

from ...compression import method as registered
from ..context import Variant
from ..ordering import claim_order

MODEGPT, SVD_LLM = registered("modegpt"), registered("svd-llm")
BARE = Variant(MODEGPT, settings=(("update", False),))
MAGNITUDE = Variant(MODEGPT, settings=(("selection", "magnitude"), ("update", False)))


# Type I alone differs: queries, keys, values and outputs are cut alike in all three.
claim_order(
    "modegpt/nystrom", (Variant(MODEGPT), BARE), (BARE, MAGNITUDE),
    paper=MODEGPT.paper,
    statement="Cutting MLPs, the Nyström update loses less than the same neurons without it, and these less than the "
    "neurons of the largest weights.",
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
