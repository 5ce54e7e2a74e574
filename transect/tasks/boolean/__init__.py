"""In-context learning of Boolean functions (Bhattamishra et al., ICLR 2024, arXiv:2310.03016): every sequence has a
function of its own, and examples of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import TransectError
from ...forward.objective import IGNORED
from ...parameters import Range
from ..registry import Drawn, task
from .families import FAMILIES, drawn_from
from .learners import LEARNERS, learners_of

__all__ = ["FAMILIES", "LEARNERS", "Family", "drawn_from", "icl_boolean", "learners_of"]

Family = Literal[
    "conjunction", "disjunction", "sparse-disjunction", "dnf", "cnf", "majority", "integer-halfspace", "threshold",
    "parity", "sparse-parity", "nearest-neighbour", "monotone-teaching", "conjunction-teaching", "dnf-teaching",
]  # fmt: skip


def _baselines(drawn: Drawn, *, family: str, bits: int, points: int) -> Mapping[str, Tensor]:
    """Whether each learner is right, at every example (count x 2 points); the constant guess is the commoner class."""
    x, labels = drawn.inputs[:, ::2], drawn.inputs[:, 1::2, 0]
    commoner = 1.0 if float(labels[drawn.asked[:, 1::2]].sum()) >= 0 else -1.0
    said = {"constant": torch.full_like(labels, commoner)}
    said |= {name: LEARNERS[name](x, labels) for name in learners_of(family)}
    return {name: (guess == labels).float().repeat_interleave(2, dim=1) for name, guess in said.items()}


@task("icl-boolean", paper="arXiv:2310.03016", over="example in the prompt", baselines=_baselines)
def icl_boolean(
    count: int, generator: torch.Generator, *, family: Family = "conjunction",
    bits: Annotated[int, Range(2, 512)] = 8, points: Annotated[int, Range(2, 2**16)] = 24,
) -> Drawn:  # fmt: skip
    """Inputs of -1 and +1 with what a function makes of them, drawn anew for every sequence: the next label is asked.

    x_1, y_1, x_2, y_2, ... are vectors, y_i = (y_i, 0, ..., 0), which a linear map leads into the model. The answer is
    one of two classes, so that the loss is the paper's. What exact learners, nearest neighbours and averaging get right
    of the same sequences stands beside the models.

    family: of functions; those named teaching begin with examples that single the function out in its class.
    bits: of an input. points: examples in a sequence.
    """
    longest = {"monotone-teaching": bits + 1, "conjunction-teaching": bits + 2, "dnf-teaching": 3 * (bits + 2)}
    if points <= longest.get(family, 0):
        raise TransectError(
            f"icl-boolean: a teaching sequence of {bits} bits has up to {longest[family]} examples, so that points "
            f"must be more, not {points}"
        )
    if bits < {"sparse-disjunction": 4}.get(family, 2):
        raise TransectError(f"icl-boolean: {family} has functions of 4 bits, so that bits must be 4 or more")
    x, labels = drawn_from(family, count, points, bits, generator)
    shown = functional.pad(labels[:, :, None], (0, bits - 1))
    inputs = torch.stack([x, shown], dim=2).flatten(1, 2)
    answers = torch.full((count, 2 * points), IGNORED)
    known = points // 2 if family == "nearest-neighbour" else 0  # labels of the first ones are random there
    answers[:, 2 * known + 1 :: 2] = (labels[:, known:] > 0).long()
    over = torch.arange(1, points + 1).repeat_interleave(2).expand(count, 2 * points)
    return Drawn(inputs, answers, 2, over)
