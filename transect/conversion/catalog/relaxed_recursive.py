"""Relaxed Recursive Transformers (Bae et al., ICLR 2025, arXiv:2410.20672): a few blocks in loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...anatomy import Anatomy, Matrix
from ...anatomy.arrangement import alike
from ...anatomy.storage import dense, is_dense
from ...anatomy.ties import hold
from ...compression.weighted_svd import weighted_svd
from ...errors import TransectError
from ...forward.early import early_predictions
from ...forward.lens import Lens
from ...forward.objective import summed_loss
from ...operators import LowRank
from ...operators.relaxed import Relaxed
from ..registry import Calibration, Range, conversion
from ..stage import Loss, Stage

Init = Literal["stepwise", "average", "lower"]


def groups(count: int, loops: int) -> list[list[int]]:
    """Which blocks become one: block l of `count` is block l mod (count / loops) of every loop (CYCLE, Section 2.2)."""
    unique = count // loops
    return [list(range(first, count, unique)) for first in range(unique)]


def source(first: int, count: int, loops: int, init: Init) -> int:
    """The block that the shared one begins as: evenly spread with both ends, or one of the lower ones.

    The paper shows the even spread by examples alone; the rounding down between them is ours.
    """
    unique = count // loops
    return first if init == "lower" or unique == 1 else first * (count - 1) // (unique - 1)


def shared_value(values: Sequence[Tensor], chosen: int | None) -> Tensor:
    """One tensor for all: that of the chosen one, or their mean, in their dtype."""
    if chosen is not None:
        return values[chosen].detach()
    return torch.stack([value.detach().double() for value in values]).mean(0).to(values[0].dtype)


def correction(residual: Tensor, rank: int, start: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Left (d_out x r) and right (r x d_in) factors of what a place's matrix differs from the shared one by.

    The truncated SVD U_r S_r and V_rᵀ (Section 2.3). Of a residual of zero, and where `start` is `zero`, the right one
    is Gaussian (with variance 1 / d_in, ours) and the left one zero, as LoRA begins.
    """
    rank = min(rank, *residual.shape)
    if start == "zero" or not residual.any():
        drawn = torch.randn(rank, residual.shape[1], generator=generator) / residual.shape[1] ** 0.5
        return residual.new_zeros(len(residual), rank), drawn.to(residual)
    found = weighted_svd(residual)
    (left, right), roots = found.truncate(rank), found.singular_values[:rank].sqrt()  # which both factors have
    return left * roots, torch.where(roots > 0, 1 / roots, 0.0)[:, None] * right


def exit_loss(loops: int, weight: float) -> Loss:
    """The model's own loss, and `weight` times how far each loop but the last is from what the last one says.

    The sum of KL(p_last || p_loop) with p_last detached, every loop read by the final norm and the head (Section 3.5).
    """

    def loss(model: Any, teacher: Any, batch: Any) -> tuple[Tensor, float]:
        anatomy = Anatomy(model, weights=False)
        count = len(anatomy.block_list)
        ends = [count // loops * loop - 1 for loop in range(1, loops)]
        early, final, labels = early_predictions(anatomy, batch, ends)
        target = final.detach().float().log_softmax(-1)
        behind = [
            functional.kl_div(one.float().log_softmax(-1), target, reduction="sum", log_target=True) for one in early
        ]
        return summed_loss(final, labels) + weight * torch.stack(behind).sum(), labels.numel()

    return loss


def _check(anatomy: Anatomy, loops: int, early_exit: float, **_: Any) -> None:
    count = len(anatomy.blocks)
    if early_exit:
        Lens(anatomy)  # which says what is missing
    if count % loops:
        divisors = [str(number) for number in range(1, count + 1) if count % number == 0]
        raise TransectError(
            f"relaxed-recursive: {count} blocks are not {loops} equal loops; loops can be {', '.join(divisors)}"
        )
    if loops == 1:
        return
    if anatomy.record.tied:
        raise TransectError("relaxed-recursive: some places share parameters already: take the model as it was before")
    for block in anatomy.blocks:
        if block.has_experts:
            raise TransectError(
                f"relaxed-recursive: block {block.index} is a mixture of experts, and experts of two blocks have no "
                "order in common by which they could be shared"
            )
        for matrix in block.matrices():
            if not is_dense(matrix.module):
                raise TransectError(
                    f"{matrix.name} is stored as {type(matrix.module).__name__}: convert first, and compress what "
                    "comes out"
                )
    for numbers in groups(count, loops):
        alike(anatomy, numbers)


def _stages(**settings: Any) -> list[Stage]:
    loops, weight = settings["loops"], settings["early_exit"]
    if loops == 1:
        return []
    stage = Stage("uptraining", train="full", lr=2e-4, lowers="distill", share=0.5 if weight else 1.0)
    if not weight:
        return [stage]
    loss = exit_loss(loops, weight)  # also what the best state is chosen by: the model's own knows of no exits
    return [stage, replace(stage, name="early-exit", loss=loss, judged=loss)]


@conversion(
    "relaxed-recursive",
    paper="arXiv:2410.20672",
    group="loops and shared blocks",
    exact="with a rank of all a matrix has, and norms of each place's own, it is the model as it was",
    check=_check,
    stages=_stages,
    causal=False,
)
@torch.no_grad()
def relaxed_recursive(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    loops: Annotated[int, Range(1, 2**10)] = 2,
    init: Init = "average",
    rank: Annotated[int, Range(0, 2**16)] = 64,
    norms: Literal["own", "shared"] = "own",
    start: Literal["svd", "zero"] = "svd",
    early_exit: Annotated[float, Range(0, 100)] = 0.0,
) -> None:
    """The blocks become a few that are gone through in loops, with a low-rank correction for each depth.

    Every place keeps its own entry in the cache; what is shared is stored once. Afterwards all of it is trained towards
    the predictions of the model as it was (distillation: Section 3.4). The model's final norm, embedding and head stay.

    loops: how often the blocks are gone through; divides their number. 1 changes nothing.
    init: what a shared block begins as: `average` of those that it stands for (the paper's best with corrections),
        `stepwise`, the block at an even step through the model (its best without), or `lower`, the first ones.
    rank: of each depth's correction of each matrix; no more than its smaller side. 0 shares everything, purely;
        it saves memory below (loops - 1) / loops · d_in d_out / (d_in + d_out).
    norms: whether norms and biases are each depth's own, which is little (ours), or shared, too, as in the paper. Where
        the norms of a trained model differ from depth to depth, sharing them costs several nats that no rank of the
        corrections gives back.
    early_exit: weight of what the end of each loop says already (see `forward.early`), in a second half of the training
        that lowers the model's own loss besides; the paper's is 0.1. 0 leaves that out.
    start: corrections begin as the `svd` of what each depth has lost, or from `zero`, as LoRA does.
    """
    count = len(anatomy.blocks)
    if loops == 1:
        return
    before = [_held(anatomy, number) for number in range(count)]  # nothing below is written in place
    draw = calibration.generator
    for first, numbers in enumerate(groups(count, loops)):
        chosen = None if init == "average" else source(first, count, loops, init)
        among = numbers if chosen is None else [chosen]

        def value(kind: str, name: str, among: list[int] = among, chosen: int | None = chosen) -> Tensor:
            return shared_value([before[number][kind][name] for number in among], None if chosen is None else 0)

        leader = anatomy.blocks[numbers[0]]
        matrices = [{matrix.role: matrix for matrix in anatomy.blocks[number].matrices()} for number in numbers]
        stored = {matrix.path.removeprefix(f"{leader.path}.") for matrix in matrices[0].values()}
        for name, old in before[numbers[0]]["parameters"].items():
            path, _, leaf = name.rpartition(".")
            a_matrix = path in stored
            if (rank and a_matrix) or (norms == "own" and not (a_matrix and leaf == "weight")):
                continue
            new = nn.Parameter(value("parameters", name).clone(), getattr(old, "requires_grad", True))
            hold(anatomy.model, f"{leader.path}.{name}", new)
        for number, of_block in zip(numbers, matrices, strict=True) if rank else ():
            for role, matrix in of_block.items():
                bias = value("biases", role) if norms == "shared" and matrix.bias is not None else matrix.bias
                own = before[number]["weights"][role]
                factors = correction(own.double() - value("weights", role).double(), rank, start, draw)
                _relax(matrix, value("weights", role), bias, factors)

        def shared(name: str, stored: set[str] = stored) -> bool:
            path, _, leaf = name.rpartition(".")
            is_weight = leaf == "weight" and (path in stored or path.endswith(".matrix"))
            return ".correction." not in name and (norms == "shared" or is_weight)

        anatomy.tie(numbers, shared)


def _held(anatomy: Anatomy, number: int) -> dict[str, dict[str, Any]]:
    """What a block holds now: its parameters by their names, its matrices' weights and biases by their roles."""
    block = anatomy.blocks[number]
    matrices = {matrix.role: matrix for matrix in block.matrices()}
    return {
        "parameters": dict(block.module.named_parameters(remove_duplicate=False)),
        "weights": {role: matrix.weight for role, matrix in matrices.items()},
        "biases": {role: matrix.bias for role, matrix in matrices.items()},
    }


def _relax(matrix: Matrix, weight: Tensor, bias: Tensor | None, factors: tuple[Tensor, Tensor]) -> None:
    """Put the shared weight with this depth's correction in a matrix's place."""
    left, right = (factor.to(weight) for factor in factors)
    layer: Any = dense(weight, bias)
    matrix.replace(Relaxed(layer, LowRank.from_factors(left, right)))
