"""Lossless rewrites of norms (Ba, Kiros & Hinton 2016, arXiv:1607.06450): gains folded away, LayerNorm as RMSNorm."""

from __future__ import annotations

from ...anatomy import Anatomy
from ...errors import TransectError
from ...parts.rewrites import check_rms_norms, fold_norms, foldable, rms_norms
from ..registry import Calibration, conversion

PAPER, GROUP = "arXiv:1607.06450", "lossless rewrites"


def _check_folding(anatomy: Anatomy) -> None:
    foldable(anatomy)


@conversion(
    "fold-norms", paper=PAPER, group=GROUP, exact="it is the model as it was", check=_check_folding, causal=False
)
def fold(anatomy: Anatomy, calibration: Calibration) -> None:
    """The gain and bias of each norm go into the matrices that read it, which leaves plain norms. See `parts.rewrites`.

    Weights then say by themselves what they do to a normed stream, and methods that read weights alone see it.
    """
    for parameter in anatomy.model.parameters():  # what is written in place below can then be taken back
        parameter.data = parameter.data.clone()
    folded = fold_norms(anatomy.model)
    if not folded:
        raise TransectError(f"{anatomy.architecture.name} has no norm whose gain could go into matrices")
    calibration.told["norms folded"] = len(folded)


def _check_centring(anatomy: Anatomy) -> None:
    check_rms_norms(anatomy)


@conversion(
    "rms-norms", paper=PAPER, group=GROUP, exact="it is the model as it was", check=_check_centring, causal=False
)
def centre(anatomy: Anatomy, calibration: Calibration) -> None:
    """Every LayerNorm becomes an RMSNorm; what writes to the stream is centred instead. See `parts.rewrites`.

    Of tied embeddings the head keeps its own matrix. It is refused where something else writes to the stream.
    """
    for parameter in anatomy.model.parameters():
        parameter.data = parameter.data.clone()
    calibration.told["norms replaced"] = len(rms_norms(anatomy.model))
