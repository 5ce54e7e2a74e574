"""Claims of contextual decomposition (Hsu et al. 2024, arXiv:2407.00886)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ...data import Specimen
from ...forward import Behind, changed, last_logits, put_out, watch
from ...probes.catalog.cd_t.cd_t import prompts_of
from ...probes.catalog.cd_t.circuits import direction_to, mean_heads, scores_on_logits
from ...probes.catalog.cd_t.decomposition import Decomposition, Node
from ..context import Context
from ..copying import copying_heads, heads_that, repeated
from ..probing import probed
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
    found = probed(context.specimen, "cd-t", prompts=16)
    recovered, random, sizes = found["faithfulness"], found["random"], found["sizes"]
    if not len(recovered):
        raise NotApplicable("there is a single prompt")
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
    specimen.require_contributions()
    ids, answers = prompts_of(specimen, 8, 12)
    if len(ids) < 2:
        raise NotApplicable("there is a single prompt, and so no mean")
    means = mean_heads(specimen, ids)
    rows = []
    for row, answer in zip(ids[:4], answers, strict=False):
        made = Decomposition(specimen, row)
        scores = scores_on_logits(made, made.nodes, direction_to(answer, len(made.logits)), means)
        effects = made.logits[answer].cpu() - _ablated(specimen, row, answer, made.nodes, means)
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
    specimen.require_causal()
    specimen.require_contributions()
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


@torch.no_grad()
def _ablated(
    specimen: Specimen, row: Tensor, answer: int, nodes: Sequence[Node], means: Mapping[int, Tensor]
) -> Tensor:
    """The answer's logit behind a prompt with each node at its mean (nodes), those of a layer in one batch."""
    anatomy, size, found = specimen.anatomy, specimen.anatomy.head_size, []
    ids = row[None].to(specimen.model.device)
    with watch(anatomy, ["residual"]) as seen:
        specimen.model(input_ids=ids, use_cache=False)
    behind = Behind(anatomy, ids, 0, None, seen.residual)
    for layer, some in groupby(nodes, key=lambda node: node[0]):
        places = [(position, head) for _, position, head in some]

        def without(x: Tensor, layer: int = layer, places: list[tuple[int, int]] = places) -> Tensor:
            new = x.clone()
            for number, (position, head) in enumerate(places):
                mine = slice(head * size, (head + 1) * size)
                new[number, position, mine] = means[layer][position, mine]
            return new

        hidden = seen.residual[layer].repeat(len(places), 1, 1)
        with changed(anatomy, {("heads", layer): without}):
            for number in range(layer, specimen.layers):
                hidden = behind.run(number, hidden)
        with put_out(anatomy, hidden[:, -1:]):
            found.append(last_logits(specimen.model, ids[:, -1:].expand(len(places), -1))[:, 0, answer].cpu())
    return torch.cat(found)


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's. What is within rounding of 0 is 0: heads that nothing behind them reads, all of one rank."""
    from scipy.stats import spearmanr  # importing that takes half a second

    one, other = (x.double().cpu().where(x.cpu().abs() > 1e-5 * x.cpu().abs().max(), 0).numpy() for x in (a, b))
    return float(spearmanr(one, other)[0])  # type: ignore[arg-type]
