"""Gamma-MoD (Luo et al., 2024, arXiv:2410.13859): redundant blocks process routed tokens only."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ...anatomy import Anatomy
from ...errors import TransectError
from ...forward.attention_rank import attention_ranks
from ...parameters import block_numbers
from ...parts import insert
from ...parts.catalog.gamma_mod import check_some_kept
from ..registry import Calibration, Range, conversion
from ..routed import check_reach, check_routed, loss_behind
from ..stage import Stage


def _candidates(anatomy: Anatomy, layers: str) -> list[int]:
    """The blocks that may be converted: those named, by default the released rule, all but 0, 1, 2 and the last."""
    return block_numbers(layers, anatomy.blocks) if layers.strip() else list(range(3, len(anatomy.blocks) - 1))


def _check(
    anatomy: Anatomy, layers: str, lowest: int, routable: int, skip: float, choose: str, threshold: float, **_: Any
) -> None:
    check_some_kept(routable, skip, choose, threshold)
    chosen = _candidates(anatomy, layers)
    check_routed(anatomy, "gamma-mod", chosen, multiplied=True)
    if "attention_input" not in anatomy.blocks[0].norms:
        raise TransectError(
            f"gamma-mod: the router reads the input of attention behind its norm, and {anatomy.architecture.name} has "
            "no norm there: take a model such as llama, gpt2 or qwen3"
        )
    if lowest > len(chosen):
        raise TransectError(f"gamma-mod: lowest={lowest} of {len(chosen)} blocks cannot be chosen")


def _stages(routable: int, weight: float, **_: Any) -> list[Stage]:
    return [Stage("gamma-mod", train="full", lr=2e-5, auxiliary=weight, loss=loss_behind(routable), keeps="last")]


@conversion(
    "gamma-mod",
    paper="arXiv:2410.13859",
    group="routed depth and tokens",
    exact="with skip=0 and start=100 it is the model as it was, before the training",
    check=_check,
    stages=_stages,
)
def gamma_mod(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    routable: Annotated[int, Range(1, 2**20)] = 24,
    skip: Annotated[float, Range(0, 1)] = 0.5,
    choose: Literal["threshold", "top"] = "threshold",
    threshold: Annotated[float, Range(0, 1)] = 0.005,
    later: Annotated[float, Range(0, 1)] = 0.0,
    start: Annotated[float, Range(-100, 100)] = 4.0,
    weight: Annotated[float, Range(0, 1e6)] = 0.01,
    lowest: Annotated[int, Range(0, 2**16)] = 0,
    layers: str = "",
) -> None:
    """Blocks leave out some of the first tokens of a text, as one router for all of them says.

    In the paper these are an image's tokens and the system prompt; here the first of the text, whose other tokens are
    always processed. Every number of the blocks is trained, at 2e-5, on the predictions behind them, and the router
    also to tell what was kept. In training tokens are kept by rank, afterwards by threshold: until the router has
    learned, the threshold keeps nearly all.

    routable: how many first positions may be left out.
    skip: share of them that is left out by rank.
    choose: after training, by threshold, as the code does, or by rank (top), as in training; prompts should then be at
        least as long as `routable`.
    threshold: probability of a routable token above which it is processed.
    later: probability from which a token behind them is processed; 0 is all of them, the code has 0.5 for new tokens.
    start: of the router's logit for processing; 0 is the paper's, and halves every MLP at first.
    weight: of the router's own loss.
    lowest: convert only so many of the blocks, those whose attention maps have the lowest rank on the training text; 0
        converts all.
    layers: the blocks, such as 4-11; default all but 0, 1, 2 and the last.
    """
    check_reach(calibration.data, "gamma-mod", "routable", routable)
    chosen = _candidates(anatomy, layers)
    if lowest:
        ranks = attention_ranks(anatomy, calibration.batches)
        chosen = sorted(sorted(chosen, key=lambda number: float(ranks[number]))[:lowest])
    settings = {
        "routable": routable, "skip": skip, "choose": choose, "threshold": threshold, "later": later, "start": start,
    }  # fmt: skip
    insert(anatomy.model, "block", "gamma-mod", layers=chosen, settings=settings, seed=calibration.seed)
