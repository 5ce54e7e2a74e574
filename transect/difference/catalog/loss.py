"""What each block's change costs: predicted from the curvature of the first model, and measured by exchanging it."""

from __future__ import annotations

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ...errors import NotApplicable
from ...evaluation import evaluate_loss
from ...probes import Drawing, Result
from ...probes.curvature import factors
from ...probes.draw import bars, scatter
from ...probes.result import Quantity
from ...statistics import InputCovariance, OutputGradientCovariance, key_of
from ..pair import Pair
from ..registry import comparing
from .weights import whole_of

_INPUT, _OUTPUT = InputCovariance(), OutputGradientCovariance()


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    predicted, measured = result["predicted"], result["measured"]
    return [
        bars(
            "Loss by block", "What the loss rises by if this block alone is the second's: as measured, and as "
            "predicted from the curvature.",
            {"measured": measured, "predicted": predicted}, xlabel="block", ylabel="nats",
        ),
        scatter(
            "Predicted and measured", "A block a point.", {"blocks": (predicted, measured)},
            xlabel="predicted, nats", ylabel="measured, nats", texts={"blocks": [str(n) for n in range(len(measured))]},
        ),
    ]  # fmt: skip


@comparing("loss", title="What each block's change costs", draw=draw)
def loss(pair: Pair) -> Result:
    """The loss increase predicted for each block from the two-sided metric, beside the measured one.

    Predicted: ½ Σ tr(G Δ A Δᵀ) over the block's matrices, A = E[x xᵀ] and G = E[g gᵀ] of the first model on the text
    (with labels that it draws itself), which is the increase to second order if inputs and gradients are independent.
    Measured: the loss on the text with this block alone taken from the second model. Rank correlation: Spearman's.
    """
    pair.require_causal()
    blocks, count = pair.anatomy.block_list, len(pair.anatomy.blocks)
    matched = [(m, o) for m, o in pair.matrices_of_both() if o is not None]
    changes: list[tuple[object, Tensor]] = []
    unknown: set[int] = set()
    for matrix, other in matched:
        after = whole_of(matrix, other)
        if after is None:
            unknown.add(matrix.block.index)
            continue
        change = after.double() - matrix.weight.double()
        if change.any():
            changes.append((matrix, change))
    statistics = factors(pair, [matrix for matrix, _ in changes], list(pair.text)) if changes else None  # type: ignore
    predicted = torch.zeros(count, dtype=torch.float64)
    for matrix, change in changes:
        a = statistics.value(key_of(matrix, _INPUT), _INPUT).double()  # type: ignore
        g = statistics.value(matrix.name, _OUTPUT).double()  # type: ignore
        predicted[matrix.block.index] += 0.5 * float(((g @ change @ a) * change).sum())  # type: ignore
    predicted[list(unknown)] = torch.nan
    theirs = {origin: number for number, origin in pair.blocks.items()}
    dense = evaluate_loss(pair.model, pair.text).loss
    measured = torch.full((count,), torch.nan, dtype=torch.float64)
    for index in pair.shown(range(count), "blocks exchanged"):
        number = theirs.get(index)
        if number is None:
            continue
        own = blocks[index]
        blocks[index] = pair.other.anatomy.block_list[number]
        try:
            measured[index] = evaluate_loss(pair.model, pair.text).loss - dense
        finally:
            blocks[index] = own
    whole = evaluate_loss(pair.other.model, pair.text).loss - dense
    both = predicted.isfinite() & measured.isfinite()
    findings = [
        f"Alone, the blocks' changes cost {float(measured[both].nansum()):+.4f} nats in sum, all together "
        f"{whole:+.4f}; predicted {float(predicted[both].sum()):+.4f}."
    ]
    if int(both.sum()) < 3:
        raise NotApplicable("fewer than three blocks can be compared")
    moved = both & (measured != 0)
    quantities = {
        "predicted": Quantity(predicted, ("block",), "nats", "loss increase to second order"),
        "measured": Quantity(measured, ("block",), "nats", "loss increase with this block alone from the second"),
    }
    if int(moved.sum()) >= 3:
        correlation = float(spearmanr(predicted[moved].numpy(), measured[moved].numpy())[0])  # type: ignore
        quantities["correlation"] = Quantity(torch.tensor(correlation), (), "", "Spearman's, of both over blocks")
        findings.append(
            f"Predicted and measured have a rank correlation of {correlation:.2f} over {int(moved.sum())} blocks."
        )
    caveats = ["To second order: large changes cost other than predicted, and so do changes that help on this text."]
    if unknown:
        caveats.append(f"Of blocks {sorted(unknown)} the change cannot be told, since shapes differ.")
    return Result(quantities, findings, caveats)
