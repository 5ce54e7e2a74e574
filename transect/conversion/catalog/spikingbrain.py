"""SpikingBrain (Pan et al., 2025, arXiv:2509.05276): softmax attention as linear attention and windows, by layers."""

from __future__ import annotations

from typing import Annotated, Any

from ...anatomy import Anatomy
from ...parameters import block_numbers
from ..attention import check_is_softmax, put_mixer
from ..registry import Calibration, Range, conversion
from ..stage import Stage

_FULL = 7  # within layers: each such block's window is all positions


def _check(anatomy: Anatomy, layers: str, **_: Any) -> None:
    check_is_softmax(anatomy, block_numbers(layers, anatomy.blocks))


@conversion(
    "spikingbrain",
    paper="arXiv:2509.05276",
    group="linear attention",
    exact="with every layer a window of all positions it is the model as it was",
    check=_check,
    stages=(Stage("spikingbrain", train="full", lr=3e-5),),
)
def spikingbrain(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    windows: Annotated[int, Range(0, 2**16)] = 2,
    window: Annotated[int, Range(1, 2**20)] = 4096,
    gate_rank: Annotated[int, Range(1, 4096)] = 16,
    within: bool = False,
    layers: str = "",
) -> None:
    """Every second attention sees a window, the others become linear attention with gates, without positions.

    Queries, keys, values and output stay, in both; a linear layer gets gates of low rank and a norm of each head. Its
    outputs are of another size than softmax's, so that untrained the model is much worse. All is trained on next tokens
    (rate 3e-5 as in the ablations of the report; its own run takes 150 billion tokens, at 8, 32 and 128 thousand).

    windows: every so-manieth layer sees a window; 2 is the smaller model, 1 is windows alone, 0 linear attention alone.
    window: how far softmax attention sees, the position itself included.
    gate_rank: of the gates.
    within: both side by side in every layer instead, with gates tied to the keys and no rank, all positions seen in
        every seventh: the larger model, without its sinks.
    layers: only these blocks, such as 0-5,7; default all.
    """
    kinds: dict[tuple[str, int], list[int]] = {}
    for number in block_numbers(layers, anatomy.blocks):
        if within:
            kind = "both", window if (number + 1) % _FULL else 2**20
        else:
            kind = ("window" if windows and not (number + 1) % windows else "linear"), window
        kinds.setdefault(kind, []).append(number)
    for (branches, seen), numbers in kinds.items():
        settings = {"branches": branches, "window": seen, "gate_rank": 0 if within else gate_rank}
        put_mixer(anatomy, "spikingbrain", numbers, settings, calibration.seed)
