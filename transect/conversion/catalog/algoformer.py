"""AlgoFormer (Gao et al., 2024, arXiv:2402.13572): some blocks of a trained model gone through several times."""

from __future__ import annotations

from typing import Annotated, Any

from ...anatomy import Anatomy
from ...errors import TransectError
from ...parameters import block_numbers
from ..registry import Calibration, Range, conversion
from ..stage import Stage


def looped(anatomy: Anatomy, loop: str) -> list[int]:
    """The blocks of the loop: those named, or the middle third; TransectError unless they follow one another."""
    count = len(anatomy.blocks)
    if not loop.strip():
        third = max(1, count // 3)
        return list(range((count - third) // 2, (count - third) // 2 + third))
    found = block_numbers(loop, anatomy.blocks)
    if found != list(range(found[0], found[-1] + 1)):
        raise TransectError(f"algoformer: the loop's blocks should follow one another, such as 2-5, not {loop!r}")
    return found


def order_of(count: int, loop: list[int], times: int) -> list[int]:
    """Numbers of the blocks in the order in which they are gone through."""
    return [*range(loop[0]), *loop * times, *range(loop[-1] + 1, count)]


def _check(anatomy: Anatomy, loop: str, times: int) -> None:
    chosen, count = looped(anatomy, loop), len(anatomy.blocks)
    if not order_of(count, chosen, times):
        raise TransectError("algoformer: the loop is all there is, so that it has to be gone through at least once")
    if times != 1:
        anatomy.refuse_dropping_blocks()
    for number in chosen if times > 1 else ():
        if any(hasattr(module, "bank_group") for module in anatomy.blocks[number].module.modules()):
            raise TransectError(f"block {number} shares a bank of numbers with others and cannot be repeated")


def _stages(**settings: Any) -> list[Stage]:
    return [Stage("loop", train="full", lr=1e-4, lowers="distill")] if settings["times"] != 1 else []


@conversion(
    "algoformer",
    paper="arXiv:2402.13572",
    group="loops and shared blocks",
    exact="gone through once, it is the model as it was",
    check=_check,
    stages=_stages,
    causal=False,
)
def algoformer(
    anatomy: Anatomy, calibration: Calibration, *, loop: str = "", times: Annotated[int, Range(0, 2**10)] = 2
) -> None:
    """Blocks in the middle become a loop that is gone through several times, with the others before and behind it.

    The numbers stay as many, whatever `times`; each turn has its own place in the cache. The paper trains such models
    from new weights on tasks with examples in the prompt; that a trained model is arranged so, and then follows its own
    earlier predictions, is ours. Nothing is added again between the turns.

    loop: the blocks, such as 2-5, which follow one another; the middle third if empty.
    times: how often they are gone through; 0 leaves them out.
    """
    anatomy.arrange(order_of(len(anatomy.blocks), looped(anatomy, loop), times))
