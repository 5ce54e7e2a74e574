"""Claims of MemoryFormer (Ding et al., NeurIPS 2024, arXiv:2411.12992)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...anatomy import Matrix
from ...data import Batches
from ...forward import at_rest, run_body
from ...parts.catalog.memoryformer import MemoryMatrix, fit_tables
from ..context import Context
from ..on_text import measured_on_text
from ..parts_from_scratch import RATE, trained_from_scratch
from ..registry import NotApplicable, Result, Verdict, claim

PAPER = "arXiv:2411.12992"
STEPS, SEEDS, ROWS = 200, (0, 1), 2000
BITS = (2, 4, 8)


@claim(
    "memoryformer/fitted",
    method="memoryformer",
    paper="Transect's own",
    statement="Tables fitted to a trained matrix follow it on held-out inputs better the more inputs they are fitted "
    "to and the more bits an address has, and better than its mean output does.",
)
def fitted(context: Context) -> Result:
    """The matrix up of the first and the last block; beside it the SVD whose operations are as many."""
    context.require_language_model()
    numbers, held = [], []
    for index in (0, -1):
        matrix = context.anatomy.blocks[index].matrix("up")
        x, other = (inputs_of_matrix(context, matrix, text) for text in (context.calibration, context.evaluation))
        weight = matrix.weight.detach().float().cpu()
        wanted = other @ weight.T
        bits = [number for number in BITS if weight.shape[1] % number == 0]
        if len(bits) < 2:
            raise NotApplicable(f"{weight.shape[1]} inputs cannot be cut into chunks of two sizes of {BITS}")
        mean, rows = (x @ weight.T).mean(0), []
        left, values, right = torch.linalg.svd(weight, full_matrices=False)

        def error(y: Tensor, wanted: Tensor = wanted, mean: Tensor = mean) -> float:
            return float((y - wanted).square().sum() / (mean - wanted).square().sum())

        for number in bits:
            errors = []
            for count in (len(x) // 8, len(x)):
                part = MemoryMatrix(weight.shape[1], weight.shape[0], True, bits=number)
                fit_tables(part, x[:count], x[:count] @ weight.T)
                errors.append(error(part(other).detach()))
            rank = max(1, part.inner.flops // (2 * sum(weight.shape)))  # as many operations
            low = (left[:, :rank] * values[:rank]) @ right[:rank]
            rows.append(
                {"block": matrix.block.index, "bits": number, "few_inputs": errors[0], "error": errors[1],
                 "svd_rank": rank, "svd": error(other @ low.T)}
            )  # fmt: skip
        held += [row["error"] < min(1, row["few_inputs"]) for row in rows]
        held += [longer["error"] < shorter["error"] for shorter, longer in pairwise(rows)]
        numbers += rows
    return Result(
        Verdict.of(all(held)),
        f"{sum(held)} of {len(held)} comparisons are as said; errors are relative to those of the mean output",
        numbers,
    )


@torch.no_grad()
def inputs_of_matrix(context: Context, matrix: Matrix, batches: Batches | None) -> Tensor:
    """What the matrix reads of the text (n x inputs), at most ROWS positions of it."""
    seen: list[Tensor] = []
    hook = matrix.module.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].detach().float().cpu().flatten(0, -2))
    )
    try:
        with at_rest(context.model):
            for batch in batches or ():
                run_body(context.model, batch)
                if sum(map(len, seen)) >= ROWS:
                    break
    finally:
        hook.remove()
    return torch.cat(seen)[:ROWS]


@claim(
    "memoryformer/near-dense",
    method="memoryformer",
    paper=PAPER,
    statement="Trained from scratch at three times the learning rate, a model whose MLPs are tables reaches a loss "
    "within 3 % of the same model with MLPs.",
)
def near_dense(context: Context) -> Result:
    """Scaled down: width 64, two blocks, 200 steps; MLPs of 256 neurons, at the better of both rates, beside 8 bits."""
    numbers = []
    for seed in SEEDS:
        rates = (RATE, 3 * RATE)
        tried = [
            measured_on_text(context, trained_from_scratch(context, STEPS, seed, neurons=256, rate=r)) for r in rates
        ]
        dense = min(tried, key=lambda one: one.loss)
        tables = measured_on_text(
            context,
            trained_from_scratch(context, STEPS, seed, {"mlp": "memoryformer", "norm": "layer"}, rate=3 * RATE),
        )
        difference, standard_error = tables.minus(dense)
        numbers.append({"seed": seed, "tables": tables.loss, "mlp": dense.loss, "difference": difference,
                        "standard_error": standard_error})  # fmt: skip
    held = [row["tables"] <= 1.03 * row["mlp"] for row in numbers]
    return Result(
        Verdict.of(all(held)),
        f"Within 3 % from {sum(held)} of {len(held)} seeds, after {STEPS} steps",
        numbers,
    )
