"""Dense2MoE (Zheng et al., ICCV 2025, arXiv:2510.09094): each MLP becomes a shared expert and many small ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ....anatomy import MLP, Anatomy, Matrix
from ....errors import TransectError
from ....forward import Batch, backpropagate, summed_loss
from ....parameters import block_numbers
from ....parts.experts import ExpertsPart, neurons_by_groups
from ...experts import cuttable_mlp, put_experts
from ...registry import Calibration, Range, conversion
from ...stage import Stage
from .blocks import dense2moe_blocks as dense2moe_blocks
from .follow import follow


def neuron_importance(anatomy: Anatomy, layers: Sequence[int], batches: Iterable[Batch]) -> dict[int, Tensor]:
    """Σ |g w| over the weights of each neuron, its rows of up and gate and its column of down (neurons), by block.

    g: the gradient of the loss of all batches together with respect to the weight, so that what one batch asks for may
    be undone by another (the paper leaves open whether absolute values come before; ours). The gradients of all these
    MLPs are in memory at once.
    """
    model = anatomy.model
    mlps: dict[int, MLP] = {number: anatomy.blocks[number].mlp for number in layers}  # type: ignore[misc]
    matrices = {
        number: [matrix for matrix in (mlp.up, mlp.gate, mlp.down) if matrix is not None]
        for number, mlp in mlps.items()
    }
    asked = {id(m.module.weight) for found in matrices.values() for m in found}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in asked)
            parameter.grad = None
        for batch in batches:
            with torch.enable_grad():
                backpropagate(model, batch, summed_loss)
        return {number: _of_neurons(found) for number, found in matrices.items()}
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def _of_neurons(matrices: Sequence[Matrix]) -> Tensor:
    """The sums of one MLP's neurons."""
    sums = []
    for matrix in matrices:
        gradient, rows = matrix.module.weight.grad, matrix.rows()
        gradient = gradient.T if isinstance(matrix.module, Conv1D) else gradient
        product = ((gradient if rows is None else gradient[rows]) * matrix.weight).float().abs()
        sums.append(product.sum(0 if matrix.role == "down" else 1))
    return torch.stack(sums).sum(0)


def _shared_neurons(neurons: int, share: float) -> int:
    return max(1, round(share * neurons))


def _check(anatomy: Anatomy, experts: int, active: int, shared: float, layers: str, **_: object) -> None:
    for number in block_numbers(layers, anatomy.blocks):
        neurons = cuttable_mlp(anatomy.blocks[number]).neurons
        kept = _shared_neurons(neurons, shared)
        if kept >= neurons:
            raise TransectError(f"shared={shared:g} of {neurons} neurons leaves none to the experts: choose less")
        neurons_by_groups(neurons - kept, 0, experts, active, f"of {neurons} neurons, less {kept} shared,")


def _run(count: int | None) -> Any:
    """What lets each position run so many experts from now on; None: as many as it is described by."""

    def let(anatomy: Anatomy) -> None:
        for module in anatomy.model.modules():
            if isinstance(module, ExpertsPart):
                module.active = module.made_with["active"] if count is None else count

    return let


def _stages(active: int, **_: object) -> list[Stage]:
    """The shared expert alone, and then, if they run at all, the others."""
    learning: dict[str, Any] = {"train": "new", "lr": 1e-4, "loss": follow, "teacher": True}
    shared = Stage("shared", new=r"\.shared\.(up|gate|down)", begin=_run(0), end=_run(None), **learning)
    if not active:
        return [shared]
    others = r"\.(split\.(up|gate|down)|router\.weight)"
    return [replace(shared, share=0.5), Stage("experts", new=others, auxiliary=1e-2, share=0.5, **learning)]


@conversion(
    "dense2moe",
    paper="arXiv:2510.09094",
    group="experts",
    exact="with all experts active and gates of one it is the model as it was",
    check=_check,
    stages=_stages,
    causal=False,
)
def dense2moe(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    experts: Annotated[int, Range(1, 2**16)] = 12,
    active: Annotated[int, Range(0, 2**16)] = 2,
    shared: Annotated[float, Range(0, 1, above=True)] = 0.25,
    importance: Literal["taylor", "random"] = "taylor",
    gates: Literal["scaled", "softmax", "one"] = "scaled",
    layers: str = "",
) -> None:
    """The neurons that matter most run for every position; the others are shared out among experts, of which few do.

    Trained in two stages, each half of the steps: the shared expert alone follows the model as it was; then it stays as
    it is, and the other experts and their gate learn what is missing, with a balance of the experts. Both lower the
    distance of the predictions and of the stream behind each block. The defaults run 37.5 % of the neurons, as the
    paper's for FLUX.1 do. How many run can be changed afterwards, see `transect.parts.experts.set_active`.

    experts: n, without the shared one; they get equally many neurons, dealt out from the most to the least important.
    active: k, how many of them each position runs; 0 runs the shared one alone.
    shared: part of the neurons that runs for every position.
    importance: by which neurons are shared: taylor is |gradient times weight| of the model's own loss on the text;
        random is for comparison.
    gates: by what an expert is multiplied: softmax is its share in the softmax over all n; scaled is n times that, so
        that the experts begin at about their own size (ours); one is 1.
    layers: only these blocks, such as 0-5,7; default all.
    """
    chosen = block_numbers(layers, anatomy.blocks)
    scores = neuron_importance(anatomy, chosen, calibration.batches) if importance == "taylor" else {}
    for number in chosen:
        mlp = cuttable_mlp(anatomy.blocks[number])
        draws = torch.Generator().manual_seed(calibration.seed + number)
        kept = _shared_neurons(mlp.neurons, shared)
        order = (
            scores[number].argsort(descending=True, stable=True)
            if importance == "taylor"
            else torch.randperm(mlp.neurons, generator=draws).to(mlp.up.device)
        )
        settings = {"experts": experts, "active": active, "shared": kept, "gates": gates}
        part = put_experts(anatomy, number, "dense2moe", mlp, settings, calibration.seed + number)
        mlp.put(part.shared, order[:kept])
        mlp.put(part.split, order[kept:].view(-1, experts).T.flatten())  # dealt out, expert after expert
