"""What changed in the weights: how much of each matrix, in how many directions, in which heads and neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from ...anatomy import MLP, Matrix
from ...probes import Drawing, Result
from ...probes import Table as Rows
from ...probes.draw import heatmap, lines
from ...probes.result import Quantity
from ..pair import Pair, standing_for
from ..registry import comparing

_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
_FEW = 0.9  # of the squared change that the first neurons hold


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    names = result.label("role", result["changed"].shape[1])
    drawn: list[Drawing] = [
        heatmap(
            "How much of each matrix changed", "Length of the change over the length of the matrix. A gap: the matrix "
            "is gone, or of another shape that no rows or columns explain.",
            result["changed"], x=names, xlabel="matrix", ylabel="block",
        ),
        heatmap(
            "Directions of the change", "Stable rank of the change: 1 is an edit of one fact, near the matrix's "
            "smaller side is noise, as rounding leaves it.",
            result["rank"], x=names, xlabel="matrix", ylabel="block",
        ),
        lines(
            "Spectra", "Stable rank of the matrices before and after, mean over each block.",
            {"first": _mean(result["stable_before"]), "second": _mean(result["stable_after"])},
            xlabel="block", ylabel="stable rank",
        ),
    ]  # fmt: skip
    if "heads" in result.quantities:
        drawn.append(
            heatmap(
                "Heads", "Length of the change of a head's queries and output over their length.",
                result["heads"], xlabel="head", ylabel="block",
            )
        )  # fmt: skip
    if "neurons" in result.quantities:
        drawn.append(
            lines(
                "Neurons", f"How many neurons hold {_FEW:.0%} of an MLP's squared change, of all.",
                {"neurons": result["neurons"]}, xlabel="block", ylabel="share of the neurons",
            )
        )  # fmt: skip
    others = result.label("other", len(result["others"]))
    drawn.append(
        Rows(
            "Everything else", "Length of the change over the length, of what is no matrix of a block.",
            ("tensor", "changed"), list(zip(others, result["others"].tolist(), strict=True)),
        )
    )  # fmt: skip
    return drawn


def _mean(values: Tensor) -> Tensor:
    return values.nanmean(dim=1)


@comparing("weights", title="What changed in the weights", draw=draw)
def weights(pair: Pair) -> Result:
    """How much of each matrix changed, in how many directions, and in which heads and neurons.

    The change is Δ = W_second - W_first; a matrix that lost rows or columns is compared as one with zeros there, if the
    others are still as they were. Stable rank: |Δ|² over its largest singular value squared.
    """
    count = len(pair.anatomy.blocks)
    shape = (count, len(_ROLES))
    found = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in _NAMES}
    heads, neurons = [], torch.full((count,), torch.nan, dtype=torch.float64)
    gone, cut, same, most = 0, 0, 0, (0.0, "")
    for matrix, other in pair.shown(pair.matrices_of_both(), "weights"):
        at = matrix.block.index, _ROLES.index(matrix.role)
        before = matrix.weight.double()
        after = None if other is None else whole_of(matrix, other)
        found["stable_before"][at] = stable_rank(before)
        if after is None:
            gone += 1
            continue
        cut += other is not None and other.shape != matrix.shape
        change = after.double() - before
        share = float(change.norm() / before.norm().clamp_min(1e-30))
        found["changed"][at], found["stable_after"][at] = share, stable_rank(after.double())
        if share == 0:
            same += 1
            found["rank"][at] = 0
            continue
        found["rank"][at] = stable_rank(change)
        most = max(most, (share, matrix.name))
    for block in pair.anatomy.blocks:
        number = next((mine for mine, origin in pair.blocks.items() if origin == block.index), None)
        if number is None:
            continue
        heads.append(_heads(pair, block.index))
        neurons[block.index] = _neurons(pair, block.index)
    quantities = {name: Quantity(found[name], ("block", "role"), "", about) for name, about in _NAMES.items()}
    if heads and all(row is not None and len(row) == len(heads[0]) for row in heads) and len(heads) == count:  # type: ignore
        quantities["heads"] = Quantity(torch.stack(heads), ("block", "head"), "", "change of a head's q and o")  # type: ignore
    if neurons.isfinite().any():
        quantities["neurons"] = Quantity(neurons, ("block",), "share", f"of the neurons, with {_FEW:.0%} of the change")
    others = _others(pair)
    quantities["others"] = Quantity(torch.tensor(list(others.values())), ("other",), "", "change over length")
    total = sum(1 for _ in pair.matrices_of_both())
    findings = [
        f"{total - same - gone} of {total} matrices changed"
        + (f", {gone} are gone or of other shapes" if gone else "")
        + (f", {cut} lost rows or columns" if cut else "")
        + (f"; the most: {most[1]}, by {most[0]:.3g} of its length." if most[1] else ".")
    ]
    ranks = found["rank"][found["rank"] > 0]
    if len(ranks):
        findings.append(
            f"The changes have stable ranks from {float(ranks.min()):.1f} to {float(ranks.max()):.1f}, in the middle "
            f"{float(ranks.median()):.1f}."
        )
    if len(pair.blocks) < count:
        left = sorted(set(range(count)) - set(pair.blocks.values()))
        findings.append(f"Blocks {', '.join(map(str, left))} of the first are not in the second.")
    if changed := [name for name, share in others.items() if share > 0]:
        findings.append(f"Besides the matrices, {len(changed)} tensors changed, {changed[0]} first.")
    return Result(quantities, findings, labels={"role": _ROLES, "other": list(others)})


_NAMES = {
    "changed": "length of the change over the matrix's", "rank": "stable rank of the change",
    "stable_before": "stable rank of the first's", "stable_after": "stable rank of the second's",
}  # fmt: skip


def whole_of(matrix: Matrix, other: Matrix) -> Tensor | None:
    """The other's matrix in the first's shape, zeros for what was taken out of it; None if it cannot be told."""
    if other.shape == matrix.shape:
        return other.weight
    axis = 1 if matrix.role in ("o", "down") else 0
    return standing_for(matrix.weight, other.weight, axis)


def stable_rank(matrix: Tensor) -> float:
    """|W|² over the square of its largest singular value; 0 for a matrix of zeros."""
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    trace = float(gram.diagonal().sum())
    return trace / float(torch.linalg.eigvalsh(gram)[-1]) if trace > 0 else 0.0


def _heads(pair: Pair, index: int) -> Tensor | None:
    """The change of each query head's rows of q and columns of o; None where heads are not there to be compared."""
    attention = pair.anatomy.blocks[index].attention
    pairs = {m.role: (m, o) for m, o in pair.matrices_of_both() if m.block.index == index and m.role in ("q", "o")}
    if attention is None or len(pairs) < 2 or any(other is None for _, other in pairs.values()):
        return None
    found = []
    for role, (matrix, other) in pairs.items():
        after = whole_of(matrix, other)  # type: ignore[arg-type]
        if after is None:
            return None
        before, change = matrix.weight.double(), after.double() - matrix.weight.double()
        sides = [one if role == "q" else one.T for one in (before, change)]
        found.append([one.unflatten(0, (-1, attention.head_size)).square().sum((1, 2)) for one in sides])
    lengths, changes = (sum(one[part] for one in found) for part in (0, 1))
    return (changes / lengths.clamp_min(1e-30)).sqrt()  # type: ignore[union-attr]


def _neurons(pair: Pair, index: int) -> float:
    """The share of an MLP's neurons that hold most of the squared change of its up and down; NaN if nothing changed."""
    pairs = {m.role: (m, o) for m, o in pair.matrices_of_both() if m.block.index == index and m.role in ("up", "down")}
    if not isinstance(pair.anatomy.blocks[index].mlp, MLP) or len(pairs) < 2:
        return float("nan")
    total: Tensor | None = None
    for role, (matrix, other) in pairs.items():
        after = None if other is None else whole_of(matrix, other)
        if after is None:
            return float("nan")
        change = (after.double() - matrix.weight.double()).square()
        each = change.sum(1 if role == "up" else 0)
        total = each if total is None else total + each
    assert total is not None
    if not float(total.sum()):
        return float("nan")
    ordered = total.sort(descending=True).values.cumsum(0)
    return (int((ordered < _FEW * ordered[-1]).sum()) + 1) / len(total)


def _others(pair: Pair) -> dict[str, float]:
    """Change over length of the parameters outside the blocks' matrices that both have, by the first's name."""
    theirs = dict(pair.other.model.named_parameters())
    inside = {id(parameter) for matrix in pair.anatomy.matrices() for parameter in matrix.module.parameters()}
    found = {}
    for name, parameter in pair.model.named_parameters():
        other = theirs.get(name)
        if id(parameter) not in inside and other is not None and other.shape == parameter.shape:
            change = (other.detach().double() - parameter.detach().double()).norm()
            found[name] = float(change / parameter.detach().double().norm().clamp_min(1e-30))
    return dict(sorted(found.items(), key=lambda entry: -entry[1])[:20])
