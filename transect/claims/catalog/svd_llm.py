"""Claims of SVD-LLM (Wang et al., ICLR 2025, arXiv:2403.07378)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...anatomy import Matrix
from ...compression import method as registered
from ...compression.allocation.table import uniform_rank
from ...forward import run_body
from ..context import Context, Variant
from ..ordering import claim_order
from ..registry import Result, Verdict, claim

SVD, FWSVD, SVD_LLM = registered("svd"), registered("fwsvd"), registered("svd-llm")
PAPER = SVD_LLM.paper
_KEEP = 0.6
_TOLERANCE = 1e-4


# The paper's headline, for its training-free first stage.
claim_order(
    "svd-llm/below-svd", (Variant(SVD_LLM), Variant(SVD)), (Variant(SVD_LLM), Variant(FWSVD, "uniform")),
    paper=PAPER,
    statement="At the same size, SVD-LLM loses less than plain SVD and FWSVD.",
)  # fmt: skip


# The closed-form update, on all of the calibration data.
claim_order(
    "svd-llm/refit", (Variant(SVD_LLM, refit=True), Variant(SVD_LLM)),
    paper=PAPER,
    statement="Refitting the left factors on the compressed model's activations lowers the loss.",
)  # fmt: skip


@claim(
    "svd-llm/output-error",
    method="svd-llm",
    paper=PAPER,
    statement="The squared singular values dropped are the squared output error on the calibration data.",
    uses=["svd-llm"],
)
def output_error(context: Context) -> Result:
    """Measured matrix by matrix on the dense model's own activations, at one budget."""
    context.require_keep(_KEEP)
    factors = context.factors(SVD_LLM)
    deltas, dropped = {}, {}
    for matrix in context.matrices:
        made, rank = factors[matrix.name], uniform_rank(matrix.shape, _KEEP)
        left, right = made.truncate(rank)
        deltas[matrix.name] = matrix.weight.double() - left.double() @ right.double()
        dropped[matrix.name] = float(made.losses()[rank])
    measured = mean_squared_outputs(context, deltas)
    relative = {name: abs(measured[name] / dropped[name] - 1) for name in deltas}
    numbers = []
    for role in dict.fromkeys(matrix.role for matrix in context.matrices):
        names = [matrix.name for matrix in context.matrices if matrix.role == role]
        numbers.append({
            "role": role, "matrices": len(names), "dropped": sum(dropped[name] for name in names),
            "measured": sum(measured[name] for name in names), "worst_relative": max(relative[name] for name in names),
        })  # fmt: skip
    worst = max(relative, key=lambda name: relative[name])
    close = sum(value <= _TOLERANCE for value in relative.values())
    told = (
        f"Equal to {_TOLERANCE:g} in {close} of {len(relative)} matrices at {_KEEP:g}; the worst is off by "
        f"{relative[worst]:.2g} ({worst}). Part of what is dropped is the method's shrinkage."
    )
    return Result(Verdict.of(close == len(relative)), told, numbers)


@torch.no_grad()
def mean_squared_outputs(context: Context, maps: dict[str, Tensor]) -> dict[str, float]:
    """E||D x||² over the calibration inputs x of each matrix in the dense model, for a map D (d_out x d_in) each."""
    totals, positions = dict.fromkeys(maps, 0.0), dict.fromkeys(maps, 0)
    mask: Tensor | None = None

    def listen(matrix: Matrix) -> Any:
        weight = maps[matrix.name].float()  # also for a model in half precision

        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            x = x if mask is None else x[mask]
            totals[matrix.name] += float((x @ weight.T).square().sum(dtype=torch.float64))
            positions[matrix.name] += len(x)

        return matrix.module.register_forward_pre_hook(hook)

    handles = [listen(matrix) for matrix in context.matrices]
    try:
        for batch in context.calibration:
            counted = batch.get("attention_mask")
            mask = None if counted is None else counted.flatten().bool().to(context.model.device)
            run_body(context.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / positions[name] for name, total in totals.items()}
