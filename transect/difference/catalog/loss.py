"""What each block's change costs: predicted from the curvature of the first model, and measured by exchanging it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ...anatomy import Matrix
from ...errors import NotApplicable
from ...evaluation import evaluate_loss
from ...forward import Batch, at_rest, computing_wide, scored
from ...probes import Drawing, Result
from ...probes.draw import bars, scatter
from ...probes.result import Quantity
from ..pair import Pair
from ..registry import comparing
from ..second_order import increase_to_second_order
from .weights import whole_of


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    predicted, measured, divergence = (result[name] for name in ("predicted", "measured", "divergence"))
    points = {"loss": (predicted, measured), "divergence": (predicted, divergence)}
    numbers = [str(n) for n in range(len(measured))]
    return [
        bars(
            "Loss by block", "What the loss rises by if this block alone is the second's: as measured, and as "
            "predicted from the curvature; and how far the predictions move.",
            {"measured": measured, "predicted": predicted, "divergence": divergence}, xlabel="block", ylabel="nats",
        ),
        scatter(
            "Predicted and measured", "A block a point.", points, xlabel="predicted, nats", ylabel="measured, nats",
            texts={name: numbers for name in points},
        ),
    ]  # fmt: skip


@comparing("loss", title="What each block's change costs", draw=draw)
def loss(pair: Pair) -> Result:
    """The loss increase predicted for each block from its change, beside the measured one.

    Predicted: the increase to second order, see `increase_to_second_order`.
    Measured: the loss on the text with this block alone taken from the second model, over the first's. A small change
    moves that by its first order on this text, too, either way; what is predicted is the divergence, which has none:
    the mean KL(first || with this block), measured beside it. Rank correlations: Spearman's.
    """
    pair.require_causal()
    matched = [(m, o) for m, o in pair.matrices_of_both() if o is not None]
    changes: list[tuple[Matrix, Tensor]] = []
    unknown: set[int] = set()
    for matrix, other in matched:
        after = whole_of(matrix, other)
        if after is None:
            unknown.add(matrix.block.index)
            continue
        change = after.float() - matrix.weight.float()
        if change.any():
            changes.append((matrix, change))
    predicted = increase_to_second_order(pair, changes)
    predicted[list(unknown)] = torch.nan
    theirs = {origin: number for number, origin in pair.blocks.items()}
    dense = evaluate_loss(pair.model, pair.text).loss
    measured, divergence = _exchanged(pair, theirs)
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
        "divergence": Quantity(divergence, ("block",), "nats", "mean KL from the first model to that with this block"),
    }
    if int(moved.sum()) >= 3:
        found = {"correlation": measured, "correlation of divergence": divergence}
        for name, seen in found.items():
            value = float(spearmanr(predicted[moved].numpy(), seen[moved].numpy())[0])  # type: ignore
            quantities[name] = Quantity(torch.tensor(value), (), "", f"Spearman's over blocks, {name.split()[-1]}")
        findings.append(
            f"Over {int(moved.sum())} blocks what is predicted has a rank correlation of "
            f"{float(quantities['correlation'].values):.2f} with the measured loss and of "
            f"{float(quantities['correlation of divergence'].values):.2f} with the measured divergence."
        )
    caveats = ["To second order: large changes cost other than predicted, and so do changes that help on this text."]
    if unknown:
        caveats.append(f"Of blocks {sorted(unknown)} the change cannot be told, since shapes differ.")
    return Result(quantities, findings, caveats)


@torch.no_grad()
def _exchanged(pair: Pair, theirs: Mapping[int, int]) -> tuple[Tensor, Tensor]:
    """With each block alone from the second model: the loss over the first's, and KL(first || that), by block.

    theirs: the number in the second model of each block that is there; others are NaN. One sequence at a time, of which
    the first model's log-probabilities (T x V) are in memory.
    """
    blocks, model, others = pair.anatomy.block_list, pair.model, pair.other.anatomy.block_list
    sums, count = torch.zeros(2, len(pair.anatomy.blocks), dtype=torch.float64), 0
    with at_rest(model, pair.other.model), computing_wide(model, pair.other.model):
        for batch in pair.shown(list(_one_by_one(pair.text)), "blocks exchanged"):
            dense = [(logits.float().log_softmax(-1), labels[:, None]) for logits, labels, _ in scored(model, batch)]
            count += sum(len(labels) for _, labels in dense)
            for index, number in theirs.items():
                own = blocks[index]
                blocks[index] = others[number]
                try:
                    for (before, labels), (logits, _, _) in zip(dense, scored(model, batch), strict=True):
                        change = before - logits.float().log_softmax(-1)
                        sums[0, index] += float(change.gather(-1, labels).double().sum())
                        sums[1, index] += float((before.exp() * change).double().sum())
                finally:
                    blocks[index] = own
    sums[:, [index for index in range(len(blocks)) if index not in theirs]] = torch.nan
    return sums[0] / count, sums[1] / count


def _one_by_one(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each sequence as a batch."""
    for batch in batches:
        for number in range(len(next(iter(batch.values())))):
            yield {name: tensor[number : number + 1] for name, tensor in batch.items()}
