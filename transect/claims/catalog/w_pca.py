"""Claim of W-PCA (Wang, ICLR 2025, arXiv:2504.15983)."""

from __future__ import annotations

from typing import Any

from ...contest import train_architectures
from ...probes.catalog.w_pca import agreement, drawn_architectures, rank_architectures
from ...probes.catalog.w_pca.w_pca import Where
from ...training import Schedule
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim
from ..scratch import batches_of, cut, fresh_rows

ARCHITECTURES = 24
STEPS, BATCH, LENGTH, RATE = 150, 16, 64, 3e-3  # sequences in a step; tokens of a sequence
SEEDS = (0, 1, 2)  # of the untrained weights that are scored
SCORED, JUDGED = 64, 128  # sequences that the score sees; that the trained models are judged by
LARGEST = 100_000  # tokens in the vocabulary of a model for which a claim trains others
_PLACES: dict[Where, str] = {"pre": "before the activation", "post": "behind it"}


@claim(
    "w-pca/ranking",
    method="w-pca",
    paper="arXiv:2504.15983",
    statement="The W-PCA scores of untrained architectures order them as their losses after training do (Kendall's tau "
    "above 0), and better than their numbers of parameters do.",
)
def ranking(context: Context) -> Result:
    """Small models of the kind of the one under study, with 2 to 6 blocks, 32 to 96 wide, MLPs of 1 to 8 times that.

    24 architectures are drawn once for all. Each is trained from scratch for 150 steps of 1024 tokens at one rate, all
    on the same batches in the same order, none of which comes twice where there is text enough. The order by minus the
    loss on held-out text is compared with the orders by parameters, PCA dimension and W-PCA (share 0.99, mean over
    three draws of the weights), measured before the activation, as the released code has it and as the claim is
    judged, and behind it; and, as a control, with the order by the stream's width alone, above which the dimension
    before the activation cannot be. The partial correlations are at a fixed number of parameters: what a score knows
    beyond it.
    """
    context.specimen.require_causal()
    vocabulary = context.model.get_input_embeddings().weight.shape[0]
    if vocabulary > LARGEST:
        raise NotApplicable(f"the vocabulary has {vocabulary:,} tokens, and would outweigh models this small")
    configs = drawn_architectures(context.anatomy, ARCHITECTURES)
    rows, source = fresh_rows(context, STEPS * BATCH * LENGTH)
    length = min(LENGTH, max(map(len, rows)))
    pieces = cut(rows, length, STEPS * BATCH)
    judged = batches_of(cut(list(context.evaluation.texts()), length, JUDGED), BATCH)
    training = batches_of(pieces, BATCH)
    schedule = Schedule(RATE, epochs=-(-STEPS // len(training)), steps=STEPS)
    device = str(context.model.device)
    trained = train_architectures(configs, training, judged, schedule, device=device, progress=context.progress)
    scores = {name: -result["loss"] for name, result in trained.items()}
    text = [batch["input_ids"] for batch in batches_of(pieces[:SCORED], BATCH)]
    tables = {
        where: rank_architectures(configs, [{"input_ids": ids} for ids in text], where=where, seeds=SEEDS).table
        for where in _PLACES
    }
    widths = [
        getattr(config.get_text_config(), context.anatomy.architecture.config["hidden"]) for config in configs.values()
    ]
    return _judged(
        trained, scores, widths, {where: table.set_index("architecture") for where, table in tables.items()}, source
    )


def _judged(trained: Any, scores: Any, widths: list[int], tables: Any, source: str) -> Result:
    names = list(scores)
    parameters = [int(tables["pre"].loc[name, "parameters"]) for name in names]
    proxies: dict[str, list[Any]] = {"parameters": parameters, "width": widths}
    for where, place in _PLACES.items():
        proxies |= {
            f"{said}, {place}": [float(tables[where].loc[name, column]) for name in names]
            for said, column in (("PCA dimension", "dimension"), ("W-PCA", "score"))
        }
    table = agreement(proxies, [scores[name] for name in names], parameters)
    numbers: list[dict[str, Any]] = [{"order by": name, **row} for name, row in table.iterrows()]
    numbers += [
        {"architecture": name, "parameters": parameters[place], "loss": trained[name]["loss"],
         **{key: proxies[key][place] for key in list(proxies)[1:]}}
        for place, name in sorted(enumerate(names), key=lambda one: -scores[one[1]])
    ]  # fmt: skip
    ours, plain = (float(table.loc[key, "tau"]) for key in (f"W-PCA, {_PLACES['pre']}", "parameters"))
    behind = table.loc[f"W-PCA, {_PLACES['post']}"]
    partial = float(table.loc[f"W-PCA, {_PLACES['pre']}", "partial_tau"])
    return Result(
        Verdict.of(ours > 0 and ours > plain),
        f"{len(names)} architectures, on {source}: Kendall's tau with the losses {ours:+.3f} for W-PCA before the "
        f"activation, {float(behind['tau']):+.3f} behind it, {plain:+.3f} for parameters alone, "
        f"{float(table.loc['width', 'tau']):+.3f} for the width alone; at a fixed number of "
        f"parameters {partial:+.3f} and {float(behind['partial_tau']):+.3f}.",
        numbers,
    )
