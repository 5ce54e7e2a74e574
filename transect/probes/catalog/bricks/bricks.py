"""Bricks: which MLP neurons serve which kind of input, how few are needed, and what breaks without a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ....anatomy import Block
from ....data import Specimen
from ....data.batches import evenly_spaced
from ....errors import BadData, NotApplicable
from ....parameters import Range
from ...draw import Drawing, Table, heatmap, lines
from ...registry import Looking, probing
from ...result import Quantity, Result
from .bricks_findings import about_functions, about_sparsity
from .experts import TOP, by_chance, enrichment, groups_of
from .functions import Instance, load_functions
from .pruning import Fill, Rank, chosen, losses_by_kind, overlaps, pruned_losses, ranked
from .scores import Texts, average_precisions, mean_sizes, tokenised
from .sparsity import INDICATORS, LEVELS, MASKED, RANDOM, Sizes, masked_losses

LEAST = 20  # texts of a kind in each half


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    layers = result.labels["layer"]
    ways = result.labels["decides"]
    drawings: list[Drawing] = [
        lines(
            "How small most activations are", "Share of the neurons whose indicator is at most so large, as a share of "
            "the largest in that token and layer; mean over layers and tokens.",
            {name: result["distribution"][number].mean(0) for number, name in enumerate(INDICATORS)},
            x=[f"{level:.2f}" for level in LEVELS.tolist()], xlabel="indicator over its largest", ylabel="share",
        ),
        lines(
            "What zeroing the smallest neurons of every token costs", "Loss when this share of every layer's neurons "
            "is at zero: those with the smallest activation, with the smallest output, or random ones.",
            {name: result["masked loss"][number] for number, name in enumerate(ways)},
            x=[f"{share:.0%}" for share in MASKED], xlabel="neurons at zero", ylabel="nats",
        ),
    ]  # fmt: skip
    if "best" not in result.quantities:
        return drawings
    names = result.labels["function"]
    best = {name: result["best"][number] for number, name in enumerate(names)}
    rows = [
        [name, float(result["base"][c]), float(result["best"][c].max()), float(result["best by chance"][c].max()),
         float(result["mean"][c].mean()), float(result["experts"][c].nanmean()),
         float(result["experts by chance"].nanmean())]
        for c, name in enumerate(names)
    ]  # fmt: skip
    return [
        *drawings,
        Table(
            "Kinds of input", "Score: average precision of a neuron's activation in ranking the texts of this kind "
            "before all others; base: of an activation that says nothing. By chance: the best of as many neurons where "
            "the labels are shuffled. Experts: share of the groups of neurons with more of the best hundredth than "
            "chance gives in one of 1000 cases.",
            ["kind", "base", "best", "best by chance", "mean", "experts", "by chance"], rows,
        ),
        lines(
            "The best neuron of each layer", "Its score for each kind; by chance: the largest where the labels are "
            "shuffled.", best | {"by chance": result["best by chance"].amax(0)}, x=layers, xlabel="layer",
            ylabel="average precision",
        ),
        heatmap(
            "What breaks without the neurons of a kind", "Relative rise of the perplexity, on texts that the neurons "
            "were not chosen by. A row: whose neurons are at rest.",
            torch.cat([result["rise"], result["random rise"][None]]), y=[*names, RANDOM], x=names,
            xlabel="texts of", ylabel="without the neurons of", unit="share",
        ),
        heatmap(
            "How far kinds share neurons", f"Overlap of their sets; random ones share {float(result['share']):.0%}.",
            result["overlap"], y=names, x=names, xlabel="", ylabel="", unit="share",
        ),
    ]  # fmt: skip


CAVEATS = (
    "What no information scores depends on the number of texts of a kind: compare with base rate and shuffled labels.",
    "Texts of different kinds differ in form too. A neuron for digits or indents ranks sums or code well.",
    "Neurons that are large on everything enter every kind's set, and hurt all kinds: rank=margin leaves them out.",
    "Zeroed neurons take the model where it never was; fill=mean is milder.",
    "With few neurons in a layer its best hundredth is so few that no group can hold more of them than chance.",
)


@dataclass(frozen=True)
class Chosen:
    """How neurons are chosen and put at rest, see `bricks`."""

    share: float
    per_layer: bool
    rank: Rank
    fill: Fill


@probing("bricks", title="What MLP neurons are for", paper="arXiv:2409.02877", watches=["neurons"], draw=draw)
def bricks(
    specimen: Specimen,
    *,
    functions: str = "",
    instances: Annotated[int, Range(2 * LEAST, 100_000)] = 100,
    length: Annotated[int, Range(2, 100_000)] = 128,
    share: Annotated[float, Range(0, 1, above=True, below=True)] = 0.05,
    per_layer: bool = False,
    rank: Rank = "score",
    fill: Fill = "zero",
    sequences: Annotated[int, Range(1)] = 4,
) -> Looking:
    """Score MLP neurons by the kind of input they serve, find how few each token needs, and take groups out.

    Xiao et al. 2024. A neuron is an entry a_i of what down reads (of the product, where there is a gate).
    Score of neuron i for kind c: the average precision of ranking the texts by their mean |a_i| over tokens, special
    ones left out, against whether they are of the kind. Scores are those of every other text of a kind; what neurons at
    rest cost is measured on the other texts. Sets are the top share of all neurons of the model (the paper does not say
    whether of the model or of each layer). Sparsity is that of the running text, by |a_i| and by the length of what the
    neuron writes, |a_i| ||down_:,i||. Functional experts are those of Zhang et al. 2023 (arXiv:2305.18390), over groups
    of about 32 neurons from balanced k-means. Shuffled labels, random sets, and margins are our controls and option.

    Costs a pass over the text, 20 over its first sequences, and with labelled texts 3 + kinds over half of these. It
    holds a number for each text and neuron.

    functions: a JSON file of texts with their kinds, {"text": ..., "label": ...} each; `organism` for the kinds of
        documents of the bundled model's world; `python` for documentation, code, sums and names of characters, which
        every machine has. Without, only how few neurons a token needs is shown.
    instances: texts of a kind at most, evenly spaced.
    length: tokens of a text at most.
    share: of the neurons that make a kind's set.
    per_layer: choose that share in each layer.
    rank: by the score itself, or by its margin over the best score for another kind.
    fill: hold the neurons of a set at zero, or at their mean over the labelled texts.
    sequences: of the running text, on which the loss with the smallest neurons at zero is measured.
    """
    specimen.require_causal()
    blocks = [block for block in specimen.anatomy.blocks if block.mlp is not None and not block.has_part("mlp")]
    if not blocks:
        raise NotApplicable("no block of this model has an MLP of neurons left: they were dropped, or are parts")
    texts = _texts(specimen, load_functions(functions), instances, length) if functions else None
    sizes = {block.index: Sizes(block) for block in blocks}
    while (seen := (yield)) is not None:
        for layer, one in sizes.items():
            found = seen.neurons[layer]
            flat = found.reshape(-1, found.shape[-1])
            one.add(flat if seen.mask is None else flat[seen.mask.flatten()])
    result = _sparsity(specimen, blocks, sizes, sequences)
    if texts is not None:
        _functions(specimen, result, blocks, texts, Chosen(share, per_layer, rank, fill))
    return result


def _texts(specimen: Specimen, instances: Sequence[Instance], most: int, length: int) -> tuple[Texts, Texts]:
    """The labelled texts in two halves: to choose neurons by, and to measure on."""
    if specimen.tokenizer is None:
        raise NotApplicable("labelled texts need the model's tokenizer: pass tokenizer=AutoTokenizer...")
    context = getattr(specimen.anatomy.config, "max_position_embeddings", None) or length
    by_kind: dict[str, list[Instance]] = {}
    for one in instances:
        by_kind.setdefault(one.function, []).append(one)
    few = {kind: len(part) for kind, part in by_kind.items() if len(part) < 2 * LEAST}
    if few:
        told = ", ".join(f"{kind!r} has {number}" for kind, number in few.items())
        raise BadData(f"bricks: each kind needs {2 * LEAST} texts, {LEAST} to choose by and {LEAST} to measure: {told}")
    kept = [one for part in by_kind.values() for one in evenly_spaced(part, most)]
    found = tokenised(specimen, kept, min(length, context))
    halves = torch.zeros(len(kept), dtype=torch.bool)
    for kind in range(len(found.names)):
        halves[(found.labels == kind).nonzero()[:, 0][::2]] = True
    return found.of(halves.nonzero()[:, 0]), found.of((~halves).nonzero()[:, 0])


def _sparsity(specimen: Specimen, blocks: Sequence[Block], sizes: dict[int, Sizes], sequences: int) -> Result:
    names = [str(layer) for layer in sizes]
    shares = torch.stack([one.shares for one in sizes.values()], 1)
    quantities = {
        "distribution": Quantity(
            shares, ("indicator", "layer", "level"), "share", "neurons at or below a share of the token's largest"
        ),
        "masked loss": Quantity(
            masked_losses(specimen, blocks, sequences), ("decides", "masked"), "nats", "with the smallest at zero"
        ),
    }
    labels = {
        "indicator": INDICATORS, "decides": [*INDICATORS, RANDOM], "layer": names,
        "level": [f"{level:.2f}" for level in LEVELS.tolist()], "masked": [f"{share:.0%}" for share in MASKED],
    }  # fmt: skip
    result = Result(quantities, caveats=list(CAVEATS[3:4]), labels=labels)
    result.findings = about_sparsity(result)
    return result


def _functions(
    specimen: Specimen, result: Result, blocks: Sequence[Block], halves: tuple[Texts, Texts], how: Chosen
) -> None:
    """Add what labelled texts say to a result."""
    first, second = halves
    sizes, means = mean_sizes(specimen, blocks, first)
    widths = {block.index: block.find("down").shape[1] for block in blocks}
    generator = torch.Generator().manual_seed(specimen.seed)
    positives = first.positives()
    scores = average_precisions(sizes, positives)  # C x N
    shuffled = average_precisions(sizes, positives[torch.randperm(len(positives), generator=generator)])
    drawn = torch.rand(1, scores.shape[1], generator=generator)
    sets, random = (
        chosen(by, list(widths.values()), how.share, how.per_layer) for by in (ranked(scores, how.rank), drawn)
    )
    values = means if how.fill == "mean" else torch.zeros_like(means)
    whole = losses_by_kind(specimen, second)
    pruned = pruned_losses(specimen, widths, torch.cat([sets, random]), second, values)
    rise = (pruned - whole).exp() - 1
    experts, enriched, chance = _experts(specimen, blocks, scores, list(widths.values()), generator)
    parts, shuffled_parts = scores.split(list(widths.values()), 1), shuffled.split(list(widths.values()), 1)
    table = torch.full((len(scores), len(widths), max(widths.values())), torch.nan)
    for layer, part in enumerate(parts):
        table[:, layer, : part.shape[1]] = part
    axes, each = ("function", "layer"), ("function",)

    def by_layer(rows: Sequence[Tensor], unit: str, about: str) -> Quantity:
        return Quantity(torch.stack(list(rows), 1), axes, unit, about)

    precision = "average precision"
    result.quantities |= {
        "scores": Quantity(table, (*axes, "neuron"), precision, "of each neuron for each kind"),
        "base": Quantity(positives.double().mean(0), each, "share", "texts of the kind: the score of no information"),
        "best": by_layer([part.amax(1) for part in parts], precision, "of the best neuron"),
        "best 5 per mille": by_layer([_top(part) for part in parts], precision, "their mean, of one at least"),
        "mean": by_layer([part.mean(1) for part in parts], precision, "mean over neurons"),
        "best by chance": by_layer([part.amax(1) for part in shuffled_parts], precision, "best, with shuffled labels"),
        "loss": Quantity(whole, each, "nats", "of the whole model on the kind's other texts"),
        "rise": Quantity(rise[:-1], ("without", "function"), "share", "relative rise of the perplexity"),
        "random rise": Quantity(rise[-1], each, "share", "the same without as many random neurons"),
        "overlap": Quantity(overlaps(sets), ("without", "function"), "share", "neurons that two kinds share"),
        "share": Quantity(sets.double().mean(), (), "share", "neurons in a kind's set"),
        "sets": Quantity(sets.double() @ _membership(widths), ("function", "layer"), "neurons", "of a set by layer"),
        "experts": Quantity(experts, axes, "share", "groups of neurons that are experts for the kind"),
        "enrichment": Quantity(enriched, axes, "", "neurons of the kind in its experts, over those by chance"),
        "experts by chance": Quantity(chance, ("layer",), "share", "the same with random groups, mean"),
    }  # fmt: skip
    result.labels = {**result.labels, "function": first.names, "without": first.names}
    result.findings = [*result.findings, *about_functions(result)]
    result.caveats = CAVEATS


def _top(part: Tensor) -> Tensor:
    """Mean of the best 5 per mille of each row."""
    return part.topk(max(1, round(0.005 * part.shape[1])), dim=1).values.mean(1)


def _membership(widths: dict[int, int]) -> Tensor:
    """Which layer each neuron is in (N x L), as 0 and 1."""
    layers = torch.arange(len(widths)).repeat_interleave(torch.tensor(list(widths.values())))
    return torch.nn.functional.one_hot(layers, len(widths)).double()


def _experts(
    specimen: Specimen, blocks: Sequence[Block], scores: Tensor, widths: list[int], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Share of expert groups, enrichment (C x L each), and the share by chance (L); NaN where there are no groups."""
    shares, enriched = (torch.full((len(scores), len(blocks)), torch.nan, dtype=torch.float64) for _ in range(2))
    chance = torch.full((len(blocks),), torch.nan, dtype=torch.float64)
    parts = zip(blocks, scores.split(widths, 1), strict=True)
    for layer, (block, part) in enumerate(specimen.shown(list(parts), "groups of neurons")):
        group = groups_of(block, generator)
        if group is None:
            continue
        shares[:, layer], enriched[:, layer] = enrichment(group, part)
        chance[layer] = by_chance(group, max(1, round(TOP * len(group))), generator)
    return shares, enriched, chance
