"""Expert pruning by count: of every mixture, the experts that the router uses most stay."""

from __future__ import annotations

import math
from typing import Literal

from ...anatomy import Anatomy, Experts
from ...anatomy.storage import weight_tensors
from ...errors import NotApplicable, OutOfReach
from ...statistics import ExpertLoad
from ..registry import Calibration, restructuring

_COUNT, _WEIGHT = ExpertLoad(), ExpertLoad(weighted=True)


def mixtures_of(anatomy: Anatomy) -> list[Experts]:
    """The mixtures of experts of all blocks; NotApplicable where there is none."""
    found = [block.mlp for block in anatomy.blocks if isinstance(block.mlp, Experts)]
    if not found:
        raise NotApplicable(f"{type(anatomy.model).__name__} has no mixture of experts whose experts could go")
    return found


def sizes_of(mixture: Experts) -> list[int]:
    """Bytes of every expert's matrices."""
    return [
        sum(
            tensor.numel() * tensor.element_size()
            for matrix in (expert.gate, expert.up, expert.down)
            for tensor in weight_tensors(matrix.module)
        )
        for expert in mixture.experts
    ]


def count_for(anatomy: Anatomy, keep: float) -> int:
    """How many experts of each mixture may stay, the largest ones if they differ; OutOfReach where that is too few."""
    mixtures = mixtures_of(anatomy)
    whole = anatomy.matrix_bytes()
    sizes = [sorted(sizes_of(mixture), reverse=True) for mixture in mixtures]
    rest = whole - sum(map(sum, sizes))
    kept = [rest + sum(sum(each[:count]) for each in sizes) for count in range(max(map(len, sizes)) + 1)]
    count = max((count for count, size in enumerate(kept) if size <= keep * whole * (1 + 1e-12)), default=0)
    least = max(mixture.paths.least for mixture in mixtures)
    if count < least:
        raise OutOfReach(
            f"expert-count removes experts and nothing else: with {least} in each block it keeps "
            f"{kept[least] / whole:.4g} of the matrices' bytes, so it needs keep >= "
            f"{math.ceil(kept[least] / whole * 1e4) / 1e4:.4g}"
        )
    return count


def check(anatomy: Anatomy, keep: float, *, score: str) -> None:
    """Refuse models without experts, and budgets that do not pay for the fewest experts."""
    count_for(anatomy, keep)


@restructuring("expert-count", paper="a baseline of arXiv:2404.05089", check=check, needs=[_COUNT, _WEIGHT])
def expert_count(
    anatomy: Anatomy, calibration: Calibration, keep: float, *, score: Literal["count", "weight"] = "count"
) -> None:
    """Keep the experts of a mixture that the router sends most tokens to.

    Counting is the usual baseline of expert pruning (SEER-MoE calls it heavy-hitters counting; there and in other work
    a repair follows, for which there is `recover`). As many experts stay in every block, so that the result is an
    ordinary, smaller model: as many as the budget allows, attention and shared experts being kept whole. The router
    loses the rows of those that go, and spreads its probability over those that stay. Of equally used experts the first
    stay. An expert that no token was sent to scores 0.

    score: "count", the share of tokens sent to an expert, or "weight", the mean weight that the router gives it, 0
        where it is not chosen (soft counting).
    """
    statistic = _COUNT if score == "count" else _WEIGHT
    count = count_for(anatomy, keep)
    for mixture in mixtures_of(anatomy):
        if len(mixture.experts) > count:
            load = calibration.statistics.value(mixture.name, statistic)
            mixture.keep(load.argsort(descending=True, stable=True)[:count].sort().values.tolist())
