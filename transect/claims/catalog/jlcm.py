"""Claims of JLCM (Yvinec, Dapogny, Bailly, ICLR 2024, arXiv:2309.17361)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...compression import Method
from ...compression import method as registered
from ...compression.frame import replace_matrix, temporarily
from ...compression.registry import Size
from ...errors import OutOfReach
from ...operators.codebook import Codebook
from ..context import Context, Measured
from ..ordering import beside_dense, comparison, judge
from ..registry import NotApplicable, Result, claim

JLCM = registered("jlcm")
PAPER = JLCM.paper
BITS = (2, 3)  # where the ways to choose codes are far apart


def uniform(weight: Tensor, *, bits: int) -> Codebook:
    """Rounding to evenly spaced numbers, from the matrix's least to its largest."""
    codes = weight.min() + (weight.max() - weight.min()) * torch.linspace(0, 1, 2**bits).to(weight)
    indices = torch.bucketize(weight, (codes[1:] + codes[:-1]) / 2)
    return Codebook.from_codes(indices, torch.zeros(len(weight)), codes[None], None)


UNIFORM = Method("uniform", "replacement", "", uniform)


@claim(
    "jlcm/order",
    method="jlcm",
    paper=PAPER,
    statement="With as many bits a weight, uniform steps lose more than one codebook by k-means, that more than one "
    "with a scale for each group of rows, and that more than the same with codes and assignment learned together.",
    uses=["jlcm"],
)
def order(context: Context) -> Result:
    """Every matrix has the same bits in all four. Scales and groups add the few bytes that the shares show."""
    grouped: dict[str, Any] = {"steps": 0}
    return in_order(
        context,
        {
            "learned": (JLCM, {}), "groups": (JLCM, grouped), "one codebook": (JLCM, {**grouped, "groups": 1}),
            "uniform": (UNIFORM, None),
        },
    )  # fmt: skip


@claim(
    "jlcm/surrogate",
    method="jlcm",
    paper=PAPER,
    statement="With as many bits a weight, moving weights to neighbouring codes only loses less than soft assignment.",
    uses=["jlcm"],
)
def surrogate(context: Context) -> Result:
    """The largest gain of the paper's ablation, its reviewers say. Both have the same steps and rates."""
    return in_order(context, {"neighbouring": (JLCM, {}), "soft": (JLCM, {"surrogate": "soft"})})


def in_order(context: Context, ways: dict[str, tuple[Method, dict[str, Any] | None]]) -> Result:
    """Judge that each of the ways loses less than the next. Their settings; None for what has none."""
    context.require_language_model()
    found = []
    for bits in BITS:
        measured = []
        for name, (way, settings) in ways.items():
            whole = {} if settings is None else JLCM.settings(settings)
            measured.append((f"{name}, {bits} bits", with_bits(context, way, bits, whole)))
        found += [comparison(two[0][1].kept, *two) for two in pairwise(measured)]
    return beside_dense(context, judge(found))


def with_bits(context: Context, way: Method, bits: int, settings: dict[str, Any]) -> Measured:
    """The loss with every matrix in so many bits a weight."""
    anatomy = context.anatomy
    if way.plan is not None:
        try:
            for matrix in context.matrices:
                way.plan(matrix.shape, matrix.module.weight.element_size(), 1.0, **settings)
        except OutOfReach as reason:
            raise NotApplicable(str(reason)) from None
    statistics, dense = context.statistics, anatomy.matrix_bytes()
    with temporarily(anatomy, context.matrices):
        for matrix in context.matrices:
            replace_matrix(matrix, way, settings, Size(0, {"bits": bits}), statistics)
        return context.evaluate(context.model, anatomy.matrix_bytes() / dense)
