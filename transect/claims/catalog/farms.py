"""Claims of FARMS (Hu et al., ICML 2025, arXiv:2506.06280)."""

from __future__ import annotations

import copy
import statistics

import torch

from ...adaptation.targets import targets_of
from ...anatomy import Anatomy
from ...anatomy.storage import read_weight
from ...compression import method as registered
from ...compression.allocation import allocation_named
from ...data import Batches
from ...training import Machine, Problem, Run, Schedule, State, layer_rates_named, own_loss, train
from ..context import Context, Measured, Variant
from ..controls import mean_of
from ..ordering import KEEPS, at_budgets, beside_dense, compare, judge
from ..registry import NotApplicable, Result, Verdict, claim
from ..scratch import batches_of, cut, fresh_rows

STEPS, BATCH, LENGTH = 100, 8, 64  # sequences in a step; tokens of a sequence
RATE, SEEDS = 3e-3, (0, 1)
LOOKS = 10  # at the weights, in a training
LARGEST = 10_000_000  # numbers of a model that a claim trains
UNIFORM, FARMS, SHUFFLED = "the same for all", "farms", "farms, of other layers"
_CUT_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)  # below, the block that loses most would have no head left in a small model


@claim(
    "farms/below-uniform",
    method="farms",
    paper=allocation_named("farms").paper,
    statement="Taking more from blocks whose weights have a light-tailed spectrum loses less than equal shares.",
    uses=["svd-llm", "amp"],
)
def below_uniform(context: Context) -> Result:
    """The default epsilon, untuned, with a factorization and with AMP; the paper prunes single weights, more deeply."""
    context.require_language_model()
    pairs = [
        (name, keep) for name, keeps in (("svd-llm", KEEPS), ("amp", _CUT_KEEPS)) for keep in context.budgets(keeps)
    ]
    found = [
        compare(context, Variant(registered(name), "farms"), Variant(registered(name)), keep) for name, keep in pairs
    ]
    return at_budgets(context, beside_dense(context, judge(found)))


@claim(
    "farms/rates",
    method="farms",
    paper=layer_rates_named("farms").paper,
    statement="Trained from scratch with larger steps for layers whose weights have a light-tailed spectrum, a model "
    "comes to a lower loss than with the same rate for all.",
)
def rates(context: Context) -> Result:
    """The configuration under study with random weights, 100 steps of 512 tokens of text, none of which comes twice.

    The factors, 0.5 to 1.5 at ten looks at the weights, are divided by their mean over all numbers of the layers, so
    that the mean rate is the same. A control has the same factors, each on another layer than its own, drawn once for
    a training. Mean over two seeds; errors are over held-out sequences, in pairs, and two seeds say little about how
    much a training varies.
    """
    context.specimen.require_causal()
    numbers = sum(parameter.numel() for parameter in context.model.parameters())
    if numbers > LARGEST:
        raise NotApplicable(f"it trains six models of this size, {numbers:,} numbers: above {LARGEST:,}")
    rows, source = fresh_rows(context, STEPS * BATCH * LENGTH)
    training = batches_of(cut(rows, min(LENGTH, max(map(len, rows))), STEPS * BATCH), BATCH)
    found = {
        way: [_trained(context, training, way, seed) for seed in SEEDS] for way in (UNIFORM, FARMS, SHUFFLED)
    }  # fmt: skip
    plain = mean_of(found[UNIFORM])
    table = []
    for way, runs in found.items():
        measured = mean_of(runs)
        difference, error = measured.minus(plain)
        table.append({
            "rates": way, "loss": measured.loss, "minus the same for all": difference,
            "standard error": error, **{f"seed {seed}": run.loss for seed, run in zip(SEEDS, runs, strict=True)},
        })  # fmt: skip
    told = "; ".join(f"{row['rates']}: {row['loss']:.4f}" for row in table)
    lower = mean_of(found[FARMS]).loss < plain.loss
    return Result(Verdict.of(lower), f"Loss after training on {source}, by rates: {told}.", table)


def _trained(context: Context, training: Batches, way: str, seed: int) -> Measured:
    """The held-out loss after the training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(context.model)(copy.deepcopy(context.model.config)).float().to(context.model.device)
    layers = {path: model.get_submodule(path) for path in targets_of(Anatomy(model), None)}
    order, entry = list(layers), layer_rates_named("farms")
    if way == SHUFFLED:
        order = [order[n] for n in torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).tolist()]

    def renew() -> dict[str, float]:
        weights = {path: read_weight(layer) for path, layer in layers.items()}
        found = entry.function(**entry.settings({})).of(weights)
        mean = statistics.fmean([found[other] for other in order], [weight.numel() for weight in weights.values()])
        return {f"{path}.weight": found[other] / mean for path, other in zip(layers, order, strict=True)}

    problem = Problem(
        way, dict(model.named_parameters()), list(training), lambda batch: own_loss(model, batch), None, model.train,
        renew=None if way == UNIFORM else renew, renew_every=max(1, STEPS // LOOKS),
    )  # fmt: skip
    schedule = Schedule(RATE, epochs=-(-STEPS // len(training)), steps=STEPS, seed=seed)
    train(problem, Run(schedule, Machine(str(context.model.device)), State(None), context.progress), {})
    return context.evaluate(model, 1.0)
