"""What the changes between two models cost the first one, to second order, from one kind of backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import ExpertMatrix, Matrix
from ..errors import NotApplicable, TransectError
from ..forward import at_rest, backpropagate, computing_wide, to_device
from ..forward.objective import IGNORED, targets_of
from ..statistics.collect import gradients_from, loss_for_gradients, parts_for_gradients
from .pair import Pair

DRAWS = 128  # sequences with drawn labels: the mean of so many squares has a standard error of an eighth


def increase_to_second_order(pair: Pair, changes: Sequence[tuple[Matrix, Tensor]]) -> Tensor:
    """½ E[(Σ_t Σ gᵀ Δ x)²] a prediction, by block (float64): what its change adds to the loss, and to the divergence.

    Over the block's matrices and a sequence's positions t, with inputs x and gradients g of the first model, on the
    pair's text, and labels that it draws itself: the Fisher metric. It is two-sided as that of K-FAC, without supposing
    that inputs and gradients are independent. (They are not: where activations are massive gradients are small, and
    tr(G Δ A Δᵀ) was three times what is measured on SmolLM2-135M in 4 bits.) One backward pass serves all blocks;
    labels are drawn until `DRAWS` sequences have some, since the sum is squared sequence by sequence.
    changes: Δ (d_out x d_in) of every matrix that has one.
    Raises NotApplicable for mixtures of experts, and TransectError for gradients that are not finite.
    """
    anatomy, model = pair.anatomy, pair.model
    if any(isinstance(matrix, ExpertMatrix) for matrix, _ in changes):
        raise NotApplicable(
            f"the MLPs of {type(model).__name__} are mixtures of experts, of which nothing is predicted"
        )
    batches = list(pair.text)
    found, count = torch.zeros(len(anatomy.blocks), dtype=torch.float64), 0
    if not changes:
        return found
    sums: dict[int, Tensor] = {}  # by block, of each sequence Σ_t Σ gᵀ Δ x
    sequences = 0

    def listen(matrix: Matrix, change: Tensor) -> Any:
        """Adds what the matrix's change does to each sequence of a pass to its block's sums."""
        rows = matrix.rows()

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            """Keeps Δ x until the output's gradient arrives."""
            moved = args[0].detach().float() @ change.T

            def on_gradient(gradient: Tensor) -> None:
                part = gradient if rows is None else gradient[..., rows]
                each = (part.float() * moved).reshape(sequences, -1).sum(-1)
                sums[matrix.block.index] = sums.get(matrix.block.index, 0) + each

            output.register_hook(on_gradient)

        return matrix.module.register_forward_hook(hook)

    loss = loss_for_gradients(model, "sampled", pair.seed)
    draws = -(-DRAWS // sum(len(batch["input_ids"]) for batch in batches))
    handles = [listen(matrix, change.to(model.device)) for matrix, change in changes]
    try:
        with at_rest(model, frozen=True), computing_wide(model):
            for batch in pair.shown(batches * draws, "curvature"):
                for part in parts_for_gradients(anatomy, batch):
                    sequences = len(part["input_ids"])
                    count += int((targets_of(model, to_device(part, model.device)) != IGNORED).sum())
                    with gradients_from(anatomy.embedding):
                        backpropagate(model, part, loss)
                    for index, each in sums.items():
                        found[index] += 0.5 * float(each.double().square().sum())
                    sums.clear()
    finally:
        for handle in handles:
            handle.remove()
    if not found.isfinite().all():
        raise TransectError("the gradients of the first model are not finite: repair its weights, or use float32")
    return found / count
