"""Claims of attention with random heads (Fu et al., NeurIPS 2023, arXiv:2307.11353), on made-up functions.

Query and keys are uniform directions in 16 dimensions. Random networks get as many trained weights as the heads have.
Sizes and targets are our choice; the bias of the heads is told with inputs of length 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...parts.catalog.random_feature_attention import (
    attention_features,
    fitted,
    mlp_features,
    random_heads,
    random_units,
)
from ..context import Context
from ..registry import Result, Verdict, claim

SIZE, HEADS, BIAS = 16, 300, 4.0
EXAMPLES, TESTED, SEEDS = 800, 1000, (0, 1)
PAPER = "arXiv:2307.11353"

Target = Callable[[Tensor, Tensor, Tensor], Tensor]  # of query (n x d), keys (n x N x d) and a direction (d): n
_OF_KEYS: dict[str, Target] = {
    "<b, key>²": lambda query, keys, direction: (keys @ direction).square().mean(1),
    "<b, key>⁴": lambda query, keys, direction: ((keys @ direction) ** 4).mean(1),
}
_OF_BOTH: dict[str, Target] = {
    "<query, key>²": lambda query, keys, direction: _products(query, keys).square().mean(1),
    "<query, key>⁴": lambda query, keys, direction: (_products(query, keys) ** 4).mean(1),
}
_BETWEEN_KEYS: dict[str, Target] = {"|mean key|²": lambda query, keys, direction: keys.mean(1).square().sum(-1)}


def _products(query: Tensor, keys: Tensor) -> Tensor:
    return (keys @ query[..., None]).squeeze(-1)


@claim(
    "random-feature-attention/averages-over-keys",
    method="random-feature-attention",
    paper=PAPER,
    statement="With as many trained weights, random attention heads learn averages of a function of each key that a "
    "random network of all inputs does not.",
)
def averages_over_keys(context: Context) -> Result:
    """Errors over what predicting the mean gives, on new examples with 16 keys. A function of two keys at once, which
    is no average over keys, is reported and not judged.
    """
    errors = _errors(16, {**_OF_KEYS, **_BETWEEN_KEYS}, {"heads": 0.0, "network": None})
    rows = [{"target": target, "keys": 16, "examples": EXAMPLES, **found} for target, found in errors.items()]
    failed = [row["target"] for row in rows if row["target"] in _OF_KEYS and row["heads"] >= row["network"]]
    return _result(rows, failed, ("heads", "network"))


@claim(
    "random-feature-attention/number-of-keys",
    method="random-feature-attention",
    paper=PAPER,
    statement="Random attention heads need no more examples to learn an average over many keys than one over few.",
)
def number_of_keys(context: Context) -> Result:
    """From as many examples, the error with 64 keys should be at most a fifth above that with 4; the targets' variance
    is taken out of both.
    """
    rows = []
    for count in (4, 64):
        errors = _errors(count, _OF_KEYS, {"heads": 0.0})
        rows += [{"target": target, "keys": count, "examples": EXAMPLES, **found} for target, found in errors.items()]
    failed = []
    for target in _OF_KEYS:
        few, many = (row["heads"] for row in rows if row["target"] == target)
        failed += [target] if many > 1.2 * few else []
    return _result(rows, failed, ("heads",))


@claim(
    "random-feature-attention/bias",
    method="random-feature-attention",
    paper=PAPER,
    statement="Heads around a multiple of the identity learn functions of how query and key are aligned from fewer "
    "examples than heads around zero.",
)
def bias(context: Context) -> Result:
    """With bias 4 for inputs of length 1. For functions of the keys alone the bias is a loss, which is not judged."""
    ways = {"unbiased": 0.0, "biased": BIAS, "network": None}
    errors = _errors(16, {**_OF_BOTH, **_OF_KEYS}, ways)
    rows = [{"target": target, "keys": 16, "examples": EXAMPLES, **found} for target, found in errors.items()]
    failed = [row["target"] for row in rows if row["target"] in _OF_BOTH and row["biased"] >= row["unbiased"]]
    return _result(rows, failed, ("biased", "unbiased", "network"))


def _errors(count: int, targets: dict[str, Target], ways: dict[str, float | None]) -> dict[str, dict[str, float]]:
    """Target -> way -> squared error over the variance, mean of all seeds. ways: the bias of heads; None: a network."""
    sums = {target: dict.fromkeys(ways, 0.0) for target in targets}
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        x = functional.normalize(torch.randn(EXAMPLES + TESTED, count + 1, SIZE, generator=draw), dim=-1)
        query, keys = x[:, 0], x[:, 1:]
        direction = functional.normalize(torch.randn(SIZE, generator=draw), dim=0)
        y = torch.stack([function(query, keys, direction) for function in targets.values()], dim=1)
        for way, centre in ways.items():
            if centre is None:
                units = random_units((count + 1) * SIZE, HEADS * (SIZE + 1), seed)
                features = mlp_features(query, keys, units.to(x))
            else:
                heads = random_heads(SIZE, HEADS, centre, seed)
                features = attention_features(query, keys, heads.to(x)).flatten(1)
            features = features.double()
            values, mean, _ = fitted(features[:EXAMPLES], y[:EXAMPLES].double())
            left = features[EXAMPLES:] @ values + mean - y[EXAMPLES:]
            for target, error in zip(targets, left.square().mean(0) / y[EXAMPLES:].var(0), strict=True):
                sums[target][way] += float(error) / len(SEEDS)
    return sums


def _result(rows: list[dict[str, Any]], failed: list[str], ways: tuple[str, ...]) -> Result:
    told = "; ".join(
        f"{row['target']} of {row['keys']} keys: " + ", ".join(f"{way} {row[way]:.2f}" for way in ways) for row in rows
    )
    against = f" Not so for {', '.join(failed)}." if failed else ""
    verdict = Verdict.of(not failed)
    return Result(verdict, f"Errors over the variance, from {EXAMPLES} examples: {told}.{against}", rows)
