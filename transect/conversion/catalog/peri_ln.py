"""Peri-LN (Kim et al., ICML 2025, arXiv:2502.02732) in a trained model that norms in front alone. Ours; not exact."""

from __future__ import annotations

from ...anatomy import Anatomy
from ...errors import TransectError
from ...parts import add_output_norms
from ...parts.insert import check_places, places
from ..registry import Calibration, conversion
from ..stage import Stage


def _check(anatomy: Anatomy) -> None:
    for block in anatomy.blocks:
        places(anatomy, "block", block.index)
        check_places(block)
        if any(block.part(unit) is None and getattr(block, unit) is None for unit in ("attention", "mlp")):
            raise TransectError(f"a sublayer of block {block.index} was dropped: a norm behind nothing has no gain")


@conversion(
    "peri-ln",
    paper="arXiv:2502.02732",
    group="rewrites and starts",
    exact="nothing; were what a sublayer adds of one size for all tokens, it would be the model as it was",
    check=_check,
    stages=(Stage("peri-ln", train="full", lr=1e-4),),
    causal=False,
)
def peri_ln(anatomy: Anatomy, calibration: Calibration) -> None:
    """Every sublayer gets an RMSNorm behind it, with the gains that change the least on the data.

    The gains are least squares fits (see `parts.add_output_norms`); what is lost is that the size of what a sublayer
    adds differs from token to token, so all blocks are trained afterwards, gains among them. There is no way back.
    """
    add_output_norms(anatomy.model, calibration.batches)
