"""K-FAC factors of a small transformer's linear layers: equal to those of curvlinops-for-pytorch, and faster?

Both get the same float32 model, batches and labels, and compute A = E[x xᵀ] and Γ of every linear layer in the blocks,
with the empirical Fisher and without shared-weight reduction ("expand"). curvlinops sums g gᵀ over all positions where
its loss is a sum; Transect divides by the number of positions, so its Γ is multiplied by that number here.

curvlinops is timed twice: as its constructor is by default, and at its fastest, without its check that the model is
deterministic (two more forward and backward passes) and told the sizes of the data. It computes weight gradients and
whole Gram matrices, one input each for q, k, v, gate and up; Transect needs no weight gradients, computes little more
than the upper triangles, and adds up a shared input once. The note below the table has the ratio of the multiply-adds.

Targets: worst relative difference of a factor (Frobenius) at most 1e-4; curvlinops' time at least 2 x Transect's.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from common import alternate, llama, parser, ratio, show, token_batches, verdict
from flops import count
from torch import Tensor, nn

from transect.anatomy import Anatomy
from transect.data import Batches
from transect.statistics import InputCovariance, OutputGradientCovariance, Statistics, collect, key_of

WANTED = (InputCovariance(), OutputGradientCovariance())


class Logits(nn.Module):
    """The model as curvlinops wants it: token ids in, logits (B x classes x T) out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits.transpose(1, 2)


def ours(anatomy: Anatomy, batches: Batches, accumulate: torch.dtype) -> Statistics:
    """Transect's factors of all matrices."""
    return collect(anatomy, batches, WANTED, accumulate=accumulate)


def theirs(model: Any, anatomy: Anatomy, batches: Batches, check: bool) -> Any:
    """curvlinops' operator with its Kronecker factors computed. check: with its defaults; else as fast as it goes."""
    from curvlinops import KFACLinearOperator

    data = []
    for batch in batches:
        ids = batch["input_ids"]
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)  # the last position predicts nothing
        data.append((ids, labels))
    faster: dict[str, Any] = {}
    if not check:
        length = data[0][0].shape[1]
        faster = dict(check_deterministic=False, num_data=batches.examples, num_per_example_loss_terms=length)
    operator = KFACLinearOperator(
        Logits(model), nn.CrossEntropyLoss(reduction="sum"), [m.module.weight for m in anatomy.matrices()], data,
        fisher_type="empirical", kfac_approx="expand", **faster,
    )  # fmt: skip
    if not operator._gradient_covariances:  # the check has computed them already
        operator.compute_kronecker_factors()
    return operator


def worst_difference(anatomy: Anatomy, statistics: Statistics, operator: Any, positions: int) -> tuple[float, str]:
    """The largest ||ours - theirs|| / ||theirs|| over all factors, and where it is."""
    worst, where = 0.0, ""
    for matrix in anatomy.matrices():
        a, gamma = (statistics.value(key_of(matrix, statistic), statistic) for statistic in WANTED)
        pairs = {
            "A": (a, operator._input_covariances[f"model.{matrix.path}"]),
            "Γ": (gamma * positions, operator._gradient_covariances[f"model.{matrix.path}"]),
        }
        for factor, (mine, other) in pairs.items():
            difference = float((mine.double() - other.double()).norm() / other.double().norm())
            if difference > worst or not where:
                worst, where = difference, f"{factor} of {matrix.name}"
    return worst, where


def flop_ratio(anatomy: Anatomy, length: int) -> float:
    """curvlinops' multiply-adds over Transect's."""
    flops = count(anatomy, length)
    both = flops.forward + flops.backward_activations
    whole = both + flops.matrices + flops.full_inputs + flops.full_gradients  # its weight gradients leave out the head
    return whole / (both + flops.inputs + flops.gradients)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Check that the factors are equal, time both, print the table, and return the numbers."""
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, help="default 256")
    options.add_argument("--blocks", type=int, default=4)
    options.add_argument("--length", type=int, help="tokens in a sequence; default 256")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--batches", type=int, help="default 4")
    chosen = options.parse_args(argv)
    quick = chosen.quick
    hidden, length = chosen.hidden or (64 if quick else 256), chosen.length or (32 if quick else 256)
    try:
        import curvlinops  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"curvlinops is missing ({error}); the Makefile says how it is installed") from None

    model = llama(hidden, chosen.blocks)
    anatomy = Anatomy(model)
    batches = token_batches(chosen.batches or (2 if quick else 4), chosen.batch_size, length)
    seconds = alternate(
        {
            "curvlinops, default": lambda: theirs(model, anatomy, batches, check=True),
            "curvlinops, unchecked": lambda: theirs(model, anatomy, batches, check=False),
            "transect, float64 sums": lambda: ours(anatomy, batches, torch.float64),
            "transect, float32 sums": lambda: ours(anatomy, batches, torch.float32),
        },
        chosen.repeats or (1 if quick else 7),
    )
    operator = theirs(model, anatomy, batches, check=False)
    rows: list[list[str]] = [[name, f"{median(seconds[name]):.4g}", *"------"] for name in list(seconds)[:2]]
    results = {}
    for name, dtype in zip(list(seconds)[2:], (torch.float64, torch.float32), strict=True):
        difference, where = worst_difference(anatomy, ours(anatomy, batches, dtype), operator, batches.tokens)
        speedups = [ratio(seconds, f"curvlinops, {which}", name) for which in ("default", "unchecked")]
        cells = [cell for speedup in speedups for cell in (f"{speedup:.2f}", verdict(speedup >= 2))]
        rows.append([name, f"{median(seconds[name]):.4g}", *cells, f"{difference:.1e}", where])
        results[name] = difference
    show(
        f"K-FAC factors of a Llama of {chosen.blocks} blocks, hidden {hidden}, {batches.tokens} positions",
        ["", "seconds", "faster than default", ">= 2", "faster than unchecked", ">= 2", "worst difference", "at"],
        rows,
        [
            f"Multiply-adds of curvlinops, unchecked, over Transect's: {flop_ratio(anatomy, length):.2f}.",
            "Γ: curvlinops' is a sum over positions, Transect's a mean; compared after multiplying by their number.",
        ],
    )
    return results


if __name__ == "__main__":
    main()
