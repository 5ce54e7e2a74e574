"""Any mixer of the parts with queries, keys, values and output, filled with what trained attention has of these."""

from __future__ import annotations

from ...anatomy import Anatomy
from ...parameters import block_numbers
from ..attention import check_mixer, put_mixer
from ..registry import Calibration, conversion
from ..stage import Stage


def _check(anatomy: Anatomy, mixer: str, layers: str) -> None:
    check_mixer(anatomy, mixer, block_numbers(layers, anatomy.blocks))


@conversion(
    "mixer",
    paper="arXiv:2103.13076",
    group="linear attention",
    exact="with softmax it is the model as it was, if its attention is that alone; of others, what their limit says",
    check=_check,
    stages=(Stage("mixer", train="full", lr=1e-4, lowers="distill"),),
)
def mixer(anatomy: Anatomy, calibration: Calibration, *, mixer: str = "gated-linear", layers: str = "") -> None:
    """Attention becomes any mixer of the parts; queries, keys, values and output keep their weights.

    Finetuning a transformer into a recurrence (T2R, Kasai et al. 2021) in its general form: what the mixer has besides
    begins with random numbers, and all blocks then follow the predictions of the model as it was (our choice).

    mixer: see `transect parts --slot mixer`; one that has queries, keys, values and an output.
    layers: only these blocks, such as 0-5,7; default all.
    """
    put_mixer(anatomy, mixer, block_numbers(layers, anatomy.blocks), seed=calibration.seed)
