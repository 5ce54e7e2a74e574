"""Claims of TangleNAS (Sukthanker et al., 2024, arXiv:2312.10440)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import product
from math import comb
from statistics import mean
from typing import Any

import torch

from ...anatomy import Anatomy
from ...data.split import split
from ...evaluation import evaluate_loss
from ...forward import Batch
from ...sizing import Settings, search_anatomy, space_of
from ...training import own_loss
from ..context import Context
from ..descent import descend
from ..registry import NotApplicable, Result, Verdict, claim

HEADS, HEAD_SIZE = 4, 16
SPACE = {"hidden": (32, 48, 64), "neurons": (64, 128, 256), "depth": (2, 3, 4)}
SEARCH, ALONE = 120, 40  # steps of a search, and of each network of the table
RATE = 3e-3
BATCH = 4  # sequences in a step
SEEDS = (0, 1, 2)
_TOP = 1 / 3  # of the table
_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "drnas": ("tanglenas", {"sampler": "drnas"}), "gdas": ("tanglenas", {"sampler": "gdas"}),
    "darts": ("tanglenas", {"sampler": "darts"}), "spos": ("spos", {"select": "random", "candidates": 20}),
}  # fmt: skip


@claim(
    "tanglenas/toy",
    method="tanglenas",
    paper="arXiv:2312.10440",
    statement="Sizes found by gradient in one entangled super-network are in the best third of an exhaustive table of "
    "the space and cost less than the best of as many random ones as the same passes would train; its slices, "
    "before any further training, lose less than new weights.",
)
def toy(context: Context) -> Result:
    """Three widths, three MLPs, three depths of the model's class from new weights: 27 networks, all trained.

    A network costs its held-out loss after its training plus a price for its size, at which the smallest and the
    largest cost the same, so that neither wins for its size alone. Every search trains a super-network of its own;
    drnas is judged, over three seeds; the other samplers and SPOS with random selection stand beside it. A search
    passes through the model twice a step, so it is compared with what is expected of the best of as many random
    networks as twice its steps train.
    """
    context.require_language_model()
    config = _config(context.anatomy)
    training, held_out = split(context.calibration, 0.2, BATCH, 0)
    table = _table(context, config, list(training), list(held_out))
    (worst, small), (best, large) = table[min(table)], table[max(table)]  # the smallest and the largest
    price = max(0.0, (worst - best) / (1 - small / large))
    costs = {picked: loss + price * size / large for picked, (loss, size) in table.items()}
    ranked = sorted(costs.values())
    draws = min(len(ranked), max(1, 2 * SEARCH // ALONE))
    chance = _best_of(ranked, draws)
    rows = []
    for way in _WAYS:
        for seed in SEEDS:
            picked, inherited, new = _searched(context, config, way, seed, price)
            rows.append({
                "way": way, "seed": seed, "sizes": [sizes[i] for sizes, i in zip(SPACE.values(), picked, strict=True)],
                "cost": costs[picked], "rank": ranked.index(costs[picked]) + 1, "inherited": inherited, "new": new,
            })  # fmt: skip
    judged = [row for row in rows if row["way"] == "drnas"]
    rank, cost = mean(row["rank"] for row in judged), mean(row["cost"] for row in judged)
    failed = [] if rank <= _TOP * len(table) else ["not in the best third"]
    failed += [] if cost < chance else [f"no better than the best of {draws} random ones"]
    failed += [] if all(row["inherited"] < row["new"] for row in rows) else ["slices lose more than new weights"]
    means = {way: [row for row in rows if row["way"] == way] for way in _WAYS}
    told = ", ".join(
        f"{way} {mean(r['cost'] for r in found):.4f} (rank {mean(r['rank'] for r in found):.1f})"
        for way, found in means.items()
    )
    rows.append({
        "way": "table", "price": price, "best": ranked[0], "mean": mean(ranked), "worst": ranked[-1],
        f"best of {draws} random": chance, "smallest's loss": worst, "largest's loss": best,
    })  # fmt: skip
    return Result(
        Verdict.DOES_NOT_HOLD if failed else Verdict.HOLDS,
        f"Mean cost in nats of {len(table)} networks: {told}; best of all {ranked[0]:.4f}, mean {mean(ranked):.4f}, "
        f"best of {draws} random {chance:.4f}." + (f" drnas is {' and '.join(failed)}." if failed else ""),
        rows,
    )


def _config(anatomy: Anatomy) -> Any:
    """The model's config with the largest sizes of the space."""
    architecture, keys = anatomy.architecture, anatomy.architecture.config
    if not architecture.head_size_is_configurable or not anatomy.can_drop_blocks or "neurons" not in keys:
        raise NotApplicable("the class's config has no head size, depth or number of neurons of its own")
    config = copy.deepcopy(anatomy.model.config)
    wanted = {
        "hidden": max(SPACE["hidden"]), "neurons": max(SPACE["neurons"]), "blocks": max(SPACE["depth"]),
        "heads": HEADS, "key_value_heads": HEADS, "head_size": HEAD_SIZE,
    }  # fmt: skip
    for name, value in wanted.items():
        if name in keys:
            setattr(config, keys[name], value)
    for name in architecture.per_block:
        if (values := getattr(config, name, None)) is not None:
            setattr(config, name, [values[i % len(values)] for i in range(wanted["blocks"])])
    return config


def _new(context: Context, config: Any, seed: int) -> Any:
    """A model of this config with new weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(context.model)(copy.deepcopy(config))


def _sized(context: Context, config: Any, picked: Sequence[int]) -> Any:
    """A model of the picked sizes with new weights."""
    keys, changed = context.anatomy.architecture.config, copy.deepcopy(config)
    for (name, sizes), index in zip(SPACE.items(), picked, strict=True):
        setattr(changed, keys["blocks" if name == "depth" else name], sizes[index])
    for name in context.anatomy.architecture.per_block:
        if (values := getattr(changed, name, None)) is not None:
            setattr(changed, name, values[: SPACE["depth"][picked[2]]])
    return _new(context, changed, 0)


def _table(
    context: Context, config: Any, training: list[Batch], held_out: list[Batch]
) -> dict[tuple[int, ...], tuple[float, int]]:
    """Of each network its held-out loss after its training, and its numbers."""
    space = space_of(Anatomy(_new(context, config, 0), context.anatomy.architecture), SPACE, shared=True)
    found = {}
    for picked in product(*(range(len(sizes)) for sizes in SPACE.values())):
        size = space.size(dict(zip(SPACE, picked, strict=True)))
        found[picked] = (_alone(context, config, picked, training, held_out), size)
    return found


def _alone(context: Context, config: Any, picked: Sequence[int], training: list[Batch], held_out: list[Batch]) -> float:
    """The held-out loss of a network that is trained by itself."""
    model = _sized(context, config, picked)

    def loss(step: int) -> torch.Tensor:
        summed, count = own_loss(model, training[step % len(training)])
        return summed / count

    descend(model, loss, ALONE, RATE, weight_decay=0.0)
    return evaluate_loss(model, held_out).loss


def _searched(context: Context, config: Any, way: str, seed: int, price: float) -> tuple[tuple[int, ...], float, float]:
    """What a search picks, and the losses of its slice and of the same network with new weights."""
    method, options = _WAYS[way]
    settings = Settings(
        method, options, SPACE, shared=True, penalty=price, lr=RATE, epochs=SEARCH, steps=SEARCH, batch_size=BATCH,
        held_out=0.2, every=SEARCH, seed=seed,
    )  # fmt: skip
    anatomy = Anatomy(_new(context, config, seed), context.anatomy.architecture)
    _, outcome = search_anatomy(anatomy, settings, context.calibration)
    picked = tuple(sizes.index(outcome["sizes"][name]) for name, sizes in SPACE.items())
    new = evaluate_loss(_sized(context, config, picked), split(context.calibration, 0.2, BATCH, 0)[1]).loss
    return picked, outcome["loss_after"], new


def _best_of(ranked: Sequence[float], draws: int) -> float:
    """What is expected of the best of so many different networks drawn at random. ranked: all costs, rising."""
    count = len(ranked)
    ways = [comb(count - 1 - i, draws - 1) for i in range(count)]  # in which the best is number i
    return sum(cost * way for cost, way in zip(ranked, ways, strict=True)) / comb(count, draws)
