"""Liger (Lan et al., ICML 2025, arXiv:2503.01496): softmax attention as a gated recurrence and a window."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ...anatomy import Anatomy
from ...errors import TransectError
from ...parameters import block_numbers
from ...parts.catalog.liger import check_settings
from ..attention import check_is_softmax, put_mixer
from ..registry import Calibration, Range, conversion
from ..stage import Stage


def _chosen(anatomy: Anatomy, layers: str, keep_every: int) -> list[int]:
    """The blocks that are converted: of those named, all but every `keep_every`-th of the model."""
    return [n for n in block_numbers(layers, anatomy.blocks) if not keep_every or (n + 1) % keep_every]


def _check(anatomy: Anatomy, layers: str, keep_every: int, alpha: float, beta: float, gates: int, **_: Any) -> None:
    check_settings(anatomy.head_size, gates, alpha, beta)
    chosen = _chosen(anatomy, layers, keep_every)
    if not chosen:
        raise TransectError(f"liger: with layers={layers!r} and keep_every={keep_every} no block is converted")
    check_is_softmax(anatomy, chosen)


@conversion(
    "liger",
    paper="arXiv:2503.01496",
    group="linear attention",
    exact="with alpha 0, beta 1 and a window of all positions it is the model as it was",
    check=_check,
    stages=(Stage("liger", train="lora", roles=("q", "k", "v"), rank=8, alpha=8.0, lr=1e-3),),
)
def liger(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    gate: Literal["gla", "hgrn2", "gsa"] = "gla",
    gates: Annotated[int, Range(0, 2**16)] = 0,
    window: Annotated[int, Range(1, 2**20)] = 64,
    alpha: Annotated[float, Range(0, 1)] = 0.5,
    beta: Annotated[float, Range(0, 1)] = 0.5,
    keep_every: Annotated[int, Range(0, 2**16)] = 0,
    layers: str = "",
) -> None:
    """Attention becomes a decaying memory, gated by the key itself, beside softmax within a window.

    All four matrices stay; nothing is added, and the state of generation no longer grows with the text. Untrained the
    model is much worse; low-rank updates of q, k and v on the data mend most of it (Section 3.3: rank 8, next tokens
    only, rate 1e-3).

    gate: how the memory decays, and what it keeps: see the mixer.
    gates: numbers of a head's gate, means over runs of the key's channels; 0 is every channel, for gsa half as many.
    window: how far softmax attention sees, the position itself included.
    alpha: weight of the memory.
    beta: weight of the window, 1 - alpha.
    keep_every: leave every so-manieth block as it is: 8 is the paper's hybrid, seven converted before each that stays.
    layers: only these blocks, such as 0-5,7; default all.
    """
    put_mixer(
        anatomy, "liger", _chosen(anatomy, layers, keep_every),
        {"gate": gate, "gates": gates, "window": window, "alpha": alpha, "beta": beta}, calibration.seed,
    )  # fmt: skip
