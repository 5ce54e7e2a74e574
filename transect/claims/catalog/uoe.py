"""Claims about unions of experts (Yang et al. 2025, arXiv:2503.02495)."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...anatomy import Anatomy
from ...conversion import conversion_named
from ...parts import Around, build_model
from ...parts.catalog.softmax import Softmax
from ...parts.catalog.uoe import UnionAttention
from ...parts.experts import SplitMLP, balance, by_expert
from ..context import Context
from ..controls import mean_of
from ..cut_mlps import before_and_after, cut, distilled, of_mlps, pruned
from ..descent import descend
from ..on_text import measured_on_text, text_length, trained_on_text
from ..ordering import beside_dense, comparison, judge
from ..pairs import over_seeds
from ..parts_from_scratch import SIZES
from ..registry import Result, Verdict, claim

PAPER = "arXiv:2503.02495"
EXPERTS, ACTIVE, STEPS, DRAWS = 4, (3, 2, 1), 40, 3
SEEDS, TEXT_STEPS, NEURONS, CHOSEN, BALANCE = (0, 1, 2), 300, 128, 2, 0.01  # of trainings from scratch
COPIED, SYMBOLS, COPY_STEPS, COPY_BATCH, COPY_RATE = 16, 16, 300, 32, 2e-3


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


@claim(
    "uoe/from-scratch",
    method="uoe",
    paper=PAPER,
    statement="Trained from scratch with as many active neurons, a union of experts of which each token chooses two of "
    "four has a lower loss than an ordinary mixture of experts and than a dense MLP.",
)
def from_scratch(context: Context) -> Result:
    """Scaled down: a Llama of width 64 and two blocks, 128 active neurons of 256, 300 steps. The ordinary mixture has
    as many experts of as many neurons, weighs them by their shares in the softmax, which sum to 1, and is trained with
    a balance of the experts (0.01). The dense MLP has 128 neurons."""
    numbers = []
    for seed in SEEDS:
        sizes = SIZES | {"vocabulary": context.anatomy.config.vocab_size, "length": text_length(context)}
        dense = build_model("llama", seed=seed, neurons=NEURONS, **sizes)
        settings = {"uoe": {"experts": EXPERTS, "active": CHOSEN, "hidden": NEURONS * EXPERTS // CHOSEN}}
        union = build_model("llama", parts={"mlp": "uoe"}, settings=settings, seed=seed, neurons=NEURONS, **sizes)
        mixture = build_model("llama", seed=seed, neurons=NEURONS, **sizes)
        mixtures = [_put_mixture(mixture, str(block.slot_path("mlp")), seed) for block in Anatomy(mixture).blocks]
        balances = {"mixture": lambda found=mixtures: BALANCE * torch.stack([one.balance for one in found]).sum()}
        losses = {
            name: measured_on_text(
                context, trained_on_text(context, model, TEXT_STEPS, seed, added=balances.get(name))
            )
            for name, model in (("union", union), ("mixture", mixture), ("dense", dense))
        }  # fmt: skip
        row: dict[str, Any] = {"seed": seed, **{name: one.loss for name, one in losses.items()}}
        for name in ("mixture", "dense"):
            row[f"minus_{name}"], row[f"standard_error_{name}"] = losses["union"].minus(losses[name])
        numbers.append(row)
    mixed, whole = (over_seeds([row[f"minus_{name}"] for row in numbers]) for name in ("mixture", "dense"))
    return Result(
        Verdict.of(mixed.lower and whole.lower),
        f"Union minus mixture: {mixed}; minus dense: {whole} (differences of the losses ± standard error over "
        f"{len(SEEDS)} seeds, after {TEXT_STEPS} steps)",
        numbers,
    )


class Mixture(nn.Module):
    """An ordinary mixture of gated experts, each weighed by its share in the softmax over the chosen ones."""

    balance: Tensor

    def __init__(self, width: int, experts: int, size: int, active: int) -> None:
        super().__init__()
        self.split = SplitMLP(width, experts, size, "silu", True, False)
        self.router, self.active = nn.Linear(width, experts, bias=False), active

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        shares = self.router(flat).softmax(-1)
        weights, chosen = shares.topk(self.active, dim=-1)
        self.balance = balance(shares, chosen)
        sent = by_expert(chosen, weights / weights.sum(-1, keepdim=True), self.split.groups)
        return self.split(flat, sent).view(x.shape)


def _put_mixture(model: Any, path: str, seed: int) -> Mixture:
    """An ordinary mixture in the place of an MLP."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixture = Mixture(SIZES["hidden"], EXPERTS, NEURONS // CHOSEN, CHOSEN)
    model.set_submodule(path, mixture)
    return mixture


@claim(
    "uoe/copying",
    method="uoe",
    paper=PAPER,
    statement="Trained from scratch to copy with attention that sees all positions, a model whose heads are groups of "
    "which each position runs half has a loss no higher than one whose positions run all heads.",
)
def copying(context: Context) -> Result:
    """Width 64, two blocks and four heads copy 16 symbols to masked positions behind them; the heads are four groups,
    of which each position runs two. It is trained on random symbols, and says nothing of the model."""
    numbers: list[dict[str, Any]] = []
    for seed in SEEDS:
        row: dict[str, Any] = {"seed": seed}
        for name in ("union", "dense"):
            row[name], row[f"{name}_right"] = _copied(name, seed)
        numbers.append(row | {"difference": row["union"] - row["dense"]})
    found = over_seeds([row["difference"] for row in numbers])
    right = {name: fmean(row[f"{name}_right"] for row in numbers) for name in ("union", "dense")}
    return Result(
        Verdict.of(found.mean <= 0),
        f"Union minus dense: {found} (difference of the losses ± standard error over {len(SEEDS)} seeds, after "
        f"{COPY_STEPS} steps); symbols copied {right['union']:.3f} and {right['dense']:.3f}",
        numbers,
    )


class Copier(nn.Module):
    """Blocks whose attention sees all positions, on symbols and masks with learned places: (B x N) -> (B x N x V)."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        width, heads = SIZES["hidden"], SIZES["heads"]
        given = (width, heads, heads, width // heads, False)
        self.symbols, self.places = nn.Embedding(SYMBOLS + 1, width), nn.Embedding(2 * COPIED, width)
        self.mixers = nn.ModuleList(
            UnionAttention(*given, experts=heads, active=heads // 2) if attention == "union" else Softmax(*given)
            for _ in range(SIZES["blocks"])
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NEURONS), nn.GELU(), nn.Linear(NEURONS, width))
            for _ in self.mixers
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.mixers)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, SYMBOLS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.symbols(ids) + self.places.weight
        for norm, mixer, mlp in zip(self.norms, self.mixers, self.mlps, strict=True):
            x = x + mixer(norm(x), Around())
            x = x + mlp(x)
        return self.head(x)


def _copied(attention: str, seed: int) -> tuple[float, float]:
    """The loss on new symbols after training to copy, and the share of them that is right."""
    draws = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Copier(attention)

    def logits(count: int) -> tuple[Tensor, Tensor]:
        symbols = torch.randint(SYMBOLS, (count, COPIED), generator=draws)
        ids = torch.cat([symbols, torch.full_like(symbols, SYMBOLS)], dim=1)
        return model(ids)[:, COPIED:].flatten(0, 1), symbols.flatten()

    descend(model, lambda _: functional.cross_entropy(*logits(COPY_BATCH)), COPY_STEPS, COPY_RATE, weight_decay=0.0)
    with torch.no_grad():
        found, symbols = logits(16 * COPY_BATCH)
        return float(functional.cross_entropy(found, symbols)), float((found.argmax(-1) == symbols).double().mean())
