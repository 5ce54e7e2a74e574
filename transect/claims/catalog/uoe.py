"""Claims about unions of experts (Yang et al. 2025, arXiv:2503.02495)."""

from __future__ import annotations

from itertools import pairwise

from ...conversion import conversion_named
from ..context import Context
from ..controls import mean_of
from ..cut_mlps import before_and_after, cut, distilled, of_mlps, pruned
from ..ordering import beside_dense, comparison, judge
from ..registry import Result, Verdict, claim

EXPERTS, ACTIVE, STEPS, DRAWS = 4, (3, 2, 1), 40, 3


@claim(
    "uoe/against-pruning",
    method="uoe",
    paper="Transect's own",
    statement="At 75, 50 and 25 % of the MLPs' neurons for a token, experts of which each token chooses lose less than "
    "MLPs pruned to so many neurons, before and after the same training.",
)
def against_pruning(context: Context) -> Result:
    """Neurons are pruned by Taylor scores. Both then follow the dense model's predictions, with the numbers of the MLPs
    alone. With all experts it is the dense model."""
    context.require_language_model()
    (stage,) = conversion_named("uoe").training({})
    found = []
    for active in ACTIVE:
        share = active / EXPERTS
        ours, theirs = cut(context, "uoe", experts=EXPERTS, active=active), pruned(context, share)
        found += before_and_after(
            context, share, ("experts", ours, distilled(stage, r"\.(split\.|router\.|out_bias)")),
            ("pruned", theirs, distilled(stage, of_mlps(theirs))), STEPS,
        )  # fmt: skip
    return beside_dense(context, judge(found))


@claim(
    "uoe/fewer-active",
    method="uoe",
    paper="Transect's own",
    statement="Cut in order or at random, the loss rises with every expert that a token does not run, from that of the "
    "dense model at all of them.",
)
def fewer_active(context: Context) -> Result:
    """Untrained, with gates that only rank, so that all experts are the dense model."""
    context.require_language_model()
    numbers, held = [], []
    for partition in ("order", "random"):
        losses = [
            context.evaluate(
                cut(context, "uoe", experts=EXPERTS, active=active, partition=partition, gates="rank").model, 1.0
            ).loss
            for active in (EXPERTS, *ACTIVE)
        ]
        numbers += [
            {"partition": partition, "active": active / EXPERTS, "loss": loss}
            for active, loss in zip((EXPERTS, *ACTIVE), losses, strict=True)
        ]
        held.append(abs(losses[0] - context.dense.loss) < 1e-3 * context.dense.loss)
        held += [more < fewer for more, fewer in pairwise(losses)]
    return Result(
        Verdict.of(all(held)),
        f"{sum(held)} of {len(held)} comparisons are as said. Dense loss {context.dense.loss:.4f}.",
        numbers,
    )


@claim(
    "uoe/co-activation",
    method="uoe",
    paper="Transect's own",
    statement="Experts of neurons that are active together lose less than experts of random neurons, at as many active "
    "neurons, untrained.",
)
def co_activation(context: Context) -> Result:
    """Both with fitted gates. The random ones are the mean of three draws."""
    context.require_language_model()
    found = []
    for active in ACTIVE:
        ours = cut(context, "uoe", experts=EXPERTS, active=active)
        draws = [context.evaluate(_random(context, active, draw), active / EXPERTS) for draw in range(DRAWS)]
        named = "co-activation", context.evaluate(ours.model, active / EXPERTS)
        found.append(comparison(active / EXPERTS, named, ("random", mean_of(draws))))
    return beside_dense(context, judge(found))


def _random(context: Context, active: int, seed: int) -> object:
    return cut(context, "uoe", seed=seed, experts=EXPERTS, active=active, partition="random").model


@claim(
    "uoe/gates-that-learn",
    method="uoe",
    paper="Transect's own",
    statement="After the same training, gates whose values are used lose less than the published, which only rank.",
)
def gates_that_learn(context: Context) -> Result:
    """At three and at two of four experts: with one, both have no gradient."""
    context.require_language_model()
    (stage,) = conversion_named("uoe").training({})
    found = []
    for active in (one for one in ACTIVE if one > 1):
        share = active / EXPERTS
        ours, theirs = (cut(context, "uoe", experts=EXPERTS, active=active, gates=g) for g in ("scaled", "rank"))
        found += before_and_after(
            context, share, ("scaled", ours, [stage]), ("rank", theirs, [stage]), STEPS, untrained=False
        )
    return beside_dense(context, judge(found))
