"""Claims of AMP (Mugnaini et al., IJCNN 2025, arXiv:2504.21174)."""

from __future__ import annotations

from torch import Tensor

from ...compression import method as registered
from ...data import Batches
from ...statistics import HeadContribution, SequenceMagnitude, collect, key_of
from ..context import Context, Variant
from ..controls import mean_of
from ..ordering import at_budgets, beside_dense, claim_order, comparison, judge
from ..registry import NotApplicable, Result, Verdict, claim

AMP = registered("amp")
_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
_DRAWS = 3
_PROMPTS = 50


@claim(
    "amp/order",
    method="amp",
    paper=AMP.paper,
    statement="Cutting the lowest scores loses less than cutting random heads and neurons, and that less than cutting "
    "the highest.",
    uses=["amp"],
)
def order(context: Context) -> Result:
    """Without repair. The random ones are the mean of three draws."""
    context.require_language_model()
    found = []
    for keep in context.budgets(_KEEPS):
        lowest = context.compressed(Variant(AMP), keep)
        highest = context.compressed(Variant(AMP, settings=(("order", "reversed"),)), keep)
        draws = [
            context.compressed(Variant(AMP, settings=(("order", "random"), ("draw", draw))), keep)
            for draw in range(_DRAWS)
        ]
        named = ("amp", lowest), ("amp random", mean_of(draws)), ("amp reversed", highest)
        found += [comparison(keep, *named[:2]), comparison(keep, *named[1:])]
    return at_budgets(context, beside_dense(context, judge(found)))


# E|x_m| ||W_down[:, m]||_1 against the paper's E|x_m|.
claim_order(
    "amp/weighed-neurons", (Variant(AMP, settings=(("neuron_score", "output"),)), Variant(AMP)),
    paper="Transect's own",
    statement="Choosing neurons by what they add to the residual stream, as heads are, loses less than by activity.",
)  # fmt: skip


@claim(
    "amp/stable-scores",
    method="amp",
    paper=AMP.paper,
    statement="Two disjoint sets of 50 sequences give almost the same order of heads and of neurons (Spearman > 0.9).",
    uses=["amp"],
)
def stable_scores(context: Context) -> Result:
    """Rank correlations within each block, averaged over blocks. With less than 100 sequences, of their halves."""
    from scipy.stats import spearmanr  # importing that takes half a second

    context.require_language_model()
    rows = [
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in context.calibration
        for row in range(len(next(iter(batch.values()))))
    ]
    count = min(_PROMPTS, len(rows) // 2)
    if count < 1:
        raise NotApplicable("there are fewer than two calibration sequences")
    halves = [scores(context, rows[start : start + count]) for start in (0, count)]
    numbers = []
    for block, (one, other) in enumerate(zip(*halves, strict=True)):
        found = {
            kind: float(spearmanr(one[kind].numpy(), other[kind].numpy())[0])  # type: ignore[arg-type]
            for kind in one
            if len(one[kind]) > 1  # a single head has no rank
        }
        numbers.append({"block": block, "sequences": count, **found})
    means = {
        kind: sum(values) / len(values)
        for kind in ("heads", "neurons")
        if (values := [row[kind] for row in numbers if kind in row])
    }
    told = "; ".join(f"mean rank correlation of {kind} {value:.3f}" for kind, value in means.items())
    verdict = Verdict.of(all(value > 0.9 for value in means.values()))
    return Result(verdict, f"{count} sequences each; {told}", numbers)


def scores(context: Context, rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Each block's scores of query heads and of neurons, on these sequences."""
    heads, neurons = HeadContribution(), SequenceMagnitude()
    matrices = [matrix for matrix in context.matrices if matrix.role in ("o", "down")]
    store = collect(context.anatomy, Batches(rows), [heads, neurons], matrices)
    found: list[dict[str, Tensor]] = [{} for _ in context.anatomy.blocks]
    for matrix in matrices:
        if matrix.role == "o":
            values = store.value(key_of(matrix, heads), heads)[:: matrix.block.head_size]
        else:
            values = store.value(key_of(matrix, neurons), neurons)
        found[matrix.block.index]["heads" if matrix.role == "o" else "neurons"] = values.cpu()
    return found
