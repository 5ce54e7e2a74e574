"""UltraMemV2 (Huang et al., ICLR 2026, arXiv:2508.18756) beside trained MLPs, at first without effect."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ...anatomy import Anatomy
from ...anatomy.surround import AROUND
from ...errors import TransectError
from ...parameters import block_numbers
from ...parts import insert
from ...parts.catalog.ultramem_v2 import grid_side
from ...parts.insert import places
from ..registry import Calibration, Range, conversion
from ..stage import Stage


def _check(anatomy: Anatomy, side: int, top: int, share: float, layers: str, **_: Any) -> None:
    chosen = block_numbers(layers, anatomy.blocks)
    for number in chosen:
        places(anatomy, "block", number)
    rows = grid_side(side, len(chosen), share)
    if top > rows:
        raise TransectError(f"ultramem-v2: top={top} of {rows} rows cannot be kept: choose a smaller top")


@conversion(
    "ultramem-v2",
    paper="arXiv:2508.18756",
    group="rewrites and starts",
    exact="it is the model as it was",
    check=_check,
    stages=(Stage("ultramem-v2", train="new", new=rf"\.{AROUND}\.part\.", lr=1e-3),),
    causal=False,
)
def ultramem_v2(
    anatomy: Anatomy, calibration: Calibration, *, side: Annotated[int, Range(2, 4096)] = 64,
    top: Annotated[int, Range(1, 128)] = 16, share: Annotated[float, Range(0, 1, above=True)] = 0.5,
    key: Annotated[int, Range(0, 2**16)] = 0, queries: Literal["each", "shared"] = "each",
    values: Literal["neurons", "vectors"] = "neurons", layers: str = "",
) -> None:  # fmt: skip
    """Every block gets a large memory beside it, of which a position reads a few slots; its output begins at zero.

    That a trained model gets one is ours. Only the memory is then trained, so that what the model knew stays where
    nothing is read; the paper's fourfold learning rate of values, from scratch, is left out.

    side: of a layer's own part of the pool: it adds side² slots.
    top: slots that a position reads, and rows and columns that it looks at.
    share: of the pool that a layer reads, see the part.
    key: width of a key; 0 is half of the stream's.
    queries: each rank has its own row and column query, or both ranks share one.
    values: slots are linear neurons, or plain vectors.
    layers: beside these blocks only, such as 0-5,7; default all.
    """
    insert(
        anatomy.model, "block", "ultramem-v2", layers=block_numbers(layers, anatomy.blocks), seed=calibration.seed,
        settings={
            "side": side, "top": top, "share": share, "key": key, "queries": queries, "values": values, "start": "zero",
        },
    )  # fmt: skip
