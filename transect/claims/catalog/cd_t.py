"""Claims of contextual decomposition (Hsu et al. 2024, arXiv:2407.00886)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...probes import probe
from ...probes.catalog.cd_t.cd_t import prompts_of
from ...probes.catalog.cd_t.circuits import (
    Alone,
    direction_to,
    mean_heads,
    require_heads,
    scores_on_everything,
    scores_on_logits,
)
from ...probes.catalog.cd_t.decomposition import Decomposition
from ...probes.catalog.cd_t.faithfulness import faithfulness
from ..context import Context
from ..copying import copying_heads, heads_that, repeated
from ..registry import NotApplicable, Result, Verdict, claim

_PAPER = "arXiv:2407.00886"


@claim(
    "cd-t/circuit",
    method="cd-t",
    paper=_PAPER,
    statement="The heads that contextual decomposition selects do the task alone better than random sets of as many.",
)
def circuit(context: Context) -> Result:
    """Share of the answer's logit that is left with all other heads at their mean, on prompts not used to select."""
    specimen = context.specimen
    require_heads(specimen)
    settings = probe("cd-t").settings({"prompts": 16})
    ids, answers = prompts_of(specimen, settings["prompts"], settings["length"])
    if len(ids) < 2:
        raise NotApplicable("there is a single prompt")
    means, made = mean_heads(specimen, ids), Decomposition(specimen, ids[0], settings["pattern"])
    scores, shares = scores_on_everything(made, direction_to(answers[0], len(made.logits)), means)
    search = {name: settings[name] for name in ("most", "threshold", "pruned")}
    recovered, random, sizes = faithfulness(specimen, made.nodes, scores, shares, ids, answers, means, **search)
    rows = [
        {"heads, by position": int(size), "circuit": float(ours), "random": float(other)}
        for size, ours, other in zip(sizes, recovered, random, strict=True)
    ]
    holds = bool((recovered > random).all())
    return Result(
        Verdict.of(holds),
        f"{int(sizes[-1])} heads recover {float(recovered[-1]):.0%} of the answer's logit, random sets of as many "
        f"{float(random[-1]):.0%}; the circuit is better at {int((recovered > random).sum())} of {len(rows)} sizes.",
        rows,
    )


@claim(
    "cd-t/ablation",
    method="cd-t",
    paper=_PAPER,
    statement="A head's score agrees with what setting it to its mean does to the answer.",
)
def ablation(context: Context) -> Result:
    """Rank correlation over all heads and positions, on one prompt after the other; it should be above 0.5 (ours)."""
    specimen = context.specimen
    require_heads(specimen)
    ids, answers = prompts_of(specimen, 8, 12)
    if len(ids) < 2:
        raise NotApplicable("there is a single prompt, and so no mean")
    means = mean_heads(specimen, ids)
    rows = []
    for row, answer in zip(ids[:4], answers, strict=False):
        made = Decomposition(specimen, row)
        scores = scores_on_logits(made, made.nodes, direction_to(answer, len(made.logits)), means)
        ablated = Alone(specimen, row[None], means).without(made.nodes, made.nodes)  # layer by layer, as nodes are
        effects = made.logits[answer].cpu() - torch.cat([logits[:, 0, answer].cpu() for _, logits in ablated])
        rows.append({"prompt": specimen.decode(row), "rank correlation": _rank_correlation(scores, effects)})
    mean = sum(row["rank correlation"] for row in rows) / len(rows)
    return Result(
        Verdict.of(mean > 0.5),
        f"Over {len(made.nodes)} heads by position the rank correlation of score and effect is {mean:.2f}, the "
        f"mean of {len(rows)} prompts.",
        rows,
    )


@claim(
    "cd-t/copying-heads",
    method="cd-t",
    paper=_PAPER,
    statement="Where a model copies what was said before, the heads that are known to copy are among the first by "
    "their score.",
)
def copying(context: Context) -> Result:
    """On random tokens that are said twice; the answer is the last of them.

    Known are the heads that attend to what came behind a token's earlier occurrence. A head's score is its largest part
    of the answer over positions, with its sign, the mean of four prompts. One of them should be among the first three
    (ours).
    """
    specimen = context.specimen
    require_heads(specimen)
    known = heads_that(copying_heads(specimen)[1], "attends to what came behind a token's earlier occurrence")
    ids = repeated(specimen, 16)
    prompts, answers = ids[:, :-1], ids[:, -1].tolist()
    means = mean_heads(specimen, prompts)
    scores: dict[tuple[int, int | None], float] = {}
    for row, answer in zip(prompts[:4], answers, strict=False):
        made = Decomposition(specimen, row)
        found = scores_on_logits(made, made.nodes, direction_to(answer, len(made.logits)), means).tolist()
        best: dict[tuple[int, int | None], float] = {}
        for (layer, _, head), score in zip(made.nodes, found, strict=True):
            best[layer, head] = max(score, best.get((layer, head), float("-inf")))
        for place, score in best.items():
            scores[place] = scores.get(place, 0.0) + score / 4
    order = sorted(scores, key=lambda place: -scores[place])
    rows = [
        {"head": f"{layer}.{head}", "score, logits": scores[layer, head], "copies": (layer, head) in known}
        for layer, head in order
    ]
    places = [1 + order.index(place) for place in known]
    return Result(
        Verdict.of(min(places) <= 3),
        f"Of {len(order)} heads, those that copy are at place "
        + ", ".join(f"{place} ({layer}.{head})" for place, (layer, head) in zip(places, known, strict=True))
        + " by score.",
        rows,
    )


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's. What is within rounding of 0 is 0: heads that nothing behind them reads, all of one rank."""
    from scipy.stats import spearmanr  # importing that takes half a second

    one, other = (x.double().cpu().where(x.cpu().abs() > 1e-5 * x.cpu().abs().max(), 0).numpy() for x in (a, b))
    return float(spearmanr(one, other)[0])  # type: ignore[arg-type]
