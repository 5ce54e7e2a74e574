"""Does causal tracing say which layer to edit? (Hase et al., NeurIPS 2023, arXiv:2301.04213)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...data.batches import evenly_spaced
from ...probes.tracing import embedding_deviation, trace
from ..context import Context
from ..fact_editing import Bench
from ..registry import NotApplicable, Result, Verdict, claim

_FACTS = 24
_LAYERS = 8  # at most: a fact takes two edits in each
_GAIN = 0.05  # the largest gain of R² in the paper is 0.032
_WINDOW = 5 / 28  # of the layers: the paper restores 5 of GPT-J's 28 at once


@claim(
    "localization/informs-editing",
    method="localization",
    paper="arXiv:2301.04213",
    statement="Where tracing locates a fact says next to nothing about which layer is best to edit: added to the layer "
    "itself, it explains less than 0.05 more of the variance of how well an injection succeeds.",
)
def informs_editing(context: Context) -> Result:
    """R² of rewrite scores over facts and layers: by layer, by tracing effect, and by both with their interaction.

    Every fact is injected alone in every layer (but the last, where prompts go on behind the subject; of a deeper model
    in eight at even distances), by ROME and by constrained fine-tuning. Its tracing effect at a layer is the largest
    share of the lost probability that restoring MLP outputs around that layer brings back, over the tokens from the
    subject on; the noise is three deviations of the embeddings. The claim is about ROME and fine-tuning alike; both
    have to come out.
    """
    bench = Bench.of(context, _FACTS)
    specimen = bench.specimen
    layers = specimen.layers
    # What the last layer writes at the subject reaches no later token.
    last = all(fact.prompt.endswith("{}") for fact in bench.facts)
    editable = evenly_spaced(list(range(layers if last else layers - 1)), _LAYERS)
    if len(editable) < 2:
        raise NotApplicable("facts can be edited in a single layer of the model at most, so there is nothing to choose")
    window, scale = max(1, round(_WINDOW * layers)), embedding_deviation(specimen)
    traces = [
        trace(specimen, fact, kind="mlp", window=window, seed=specimen.seed, scale=scale).by_layer
        for fact in bench.facts
    ]
    effects = torch.stack(traces).double()[:, editable]  # facts x layers
    bench.moments(editable)
    rows: list[dict[str, Any]] = []
    gains, parts = [], []
    for name, place in (("rome", "layer"), ("constrained-ft", "layers")):
        columns = []
        for layer in editable:
            given = {place: layer if place == "layer" else str(layer)}
            shown = specimen.shown(bench.facts, f"{name} in layer {layer}")
            found = [bench.scored(name, [fact], **given)["rewrite score"] for fact in shown]
            columns.append(torch.tensor(found, dtype=torch.float64))
        scores = torch.stack(columns, 1)
        for layer, score, effect in zip(editable, scores.T, effects.T, strict=True):
            rows.append(
                {
                    "edit": name, "layer": layer, "rewrite score": float(score.mean()),
                    "tracing effect": float(effect.mean()), "correlation": correlation(score, effect),
                }
            )  # fmt: skip
        by_layer, by_effect, by_both, statistic, chance = explained(scores, effects)
        rows.append(
            {
                "edit": name, "R² by layer": by_layer, "R² by tracing": by_effect, "R² by both": by_both,
                "gain": by_both - by_layer, "F": statistic, "p": chance,
            }
        )  # fmt: skip
        gains.append(by_both - by_layer)
        best, peak = (editable[int(one.mean(0).argmax())] for one in (scores, effects))
        parts.append(
            f"{name}: R² {by_layer:.3f} by layer, {by_effect:.3f} by tracing effect, {by_both:.3f} by both "
            f"(gain {by_both - by_layer:.3f}, F {statistic:.2f}, p {chance:.2g}); best layer to edit {best}, "
            f"tracing peak {peak}"
        )
    told = f"{len(bench.facts)} facts in {len(editable)} of {layers} layers, window {window}. {'. '.join(parts)}."
    return Result(Verdict.of(max(gains) < _GAIN), told, rows)


def explained(scores: Tensor, effects: Tensor) -> tuple[float, float, float, float, float]:
    """R² by layer, by effect, and by layer, effect and their interaction; F and its p for the last against the first.

    scores, effects: facts x layers, float64. Scores that are all the same are explained entirely.
    """
    from scipy.stats import f

    facts, layers = scores.shape
    layer = torch.eye(layers, dtype=torch.float64).repeat(facts, 1)
    effect = effects.reshape(-1, 1)
    both = torch.cat([layer, layer * effect], 1)
    total = (scores - scores.mean()).square().sum()
    if total == 0:
        return 1.0, 1.0, 1.0, float("nan"), float("nan")
    left, ranks = [], []
    for design in (layer, torch.cat([torch.ones_like(effect), effect], 1), both):
        solved = torch.linalg.lstsq(design, scores.reshape(-1, 1), driver="gelsd").solution
        left.append(float((scores.reshape(-1, 1) - design @ solved).square().sum()))
        ranks.append(int(torch.linalg.matrix_rank(design)))
    more, rest = ranks[2] - ranks[0], facts * layers - ranks[2]
    statistic = chance = float("nan")
    if more > 0 and rest > 0 and left[2] > 0:
        statistic = (left[0] - left[2]) / more / (left[2] / rest)
        chance = float(f.sf(statistic, more, rest))
    by_layer, by_effect, by_both = (1 - one / float(total) for one in left)
    return by_layer, by_effect, by_both, statistic, chance


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's; NaN where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = x.norm() * y.norm()
    return float(x @ y / size) if size > 0 else float("nan")
