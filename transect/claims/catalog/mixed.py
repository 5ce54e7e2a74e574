"""Claims of mixed structures, Transect's own."""

from __future__ import annotations

from ...compression import method as registered
from ..context import Variant
from ..ordering import claim_order

MIXED = registered("mixed")
_KEEPS = (0.8, 0.6, 0.4)
# Each part at its best: with the allocation that suits it.
_PARTS = (
    Variant(registered("kfac-svd"), "ilp"), Variant(registered("kfac-svd"), "global"), Variant(registered("cospadi")),
    Variant(registered("modegpt")),
)  # fmt: skip


claim_order(
    "mixed/no-worse-than-its-parts", *((Variant(MIXED), part) for part in _PARTS),
    paper="Transect's own",
    statement="Mixed structures lose no more than low rank, dictionaries or narrower layers alone, at the same size.",
    keeps=_KEEPS,
    or_equal=True,
)  # fmt: skip


# The same choice of structures, with and without the refit.
claim_order(
    "mixed/refit", (Variant(MIXED), Variant(MIXED, settings=(("refit_outputs", False),))),
    paper="Transect's own",
    statement="Refitting the operators to the dense model's outputs lowers the loss.",
    keeps=_KEEPS,
)  # fmt: skip
