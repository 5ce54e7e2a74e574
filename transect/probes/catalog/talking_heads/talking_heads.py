"""Which heads talk to which later heads, and over how few directions (Merullo et al. 2024, arXiv:2406.09519)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ....data import Specimen
from ....errors import NotApplicable
from ....forward import changed
from ....forward.head import last_logits
from ....forward.objective import task_of
from ....parameters import Range
from ...draw import Drawing, Table, bars, heatmap
from ...registry import probing
from ...result import Quantity, Result
from .channels import READS, Heads, composition, heads_of, scaled_component


def draw(result: Result) -> list[Drawing]:
    """Channels, the map of heads, and what removing a component does."""
    rows = [
        [label, float(score), float(score * result["width"].sqrt()), float(outlier)]
        for label, score, outlier in zip(result.labels["channel"], result["channels"], result["outliers"], strict=True)
    ]
    best, names = result["heads"].amax(0), result.labels["head"]
    best = best.where(best > 0, torch.nan)  # heads that do not stand behind the writer
    plots: list[Drawing] = [
        Table("Strongest channels", "One direction that a head writes and a later one reads. Random matrices give "
              "about 1 in the third column; the last says how far the score is above its writer's others.",
              ["channel", "score", "score x sqrt(width)", "standard deviations"], rows),
        heatmap("Composition of whole heads", "The largest of the scores (query, key, value), as a multiple of "
                "what random matrices give. Only later blocks can read.",
                best * result["width"].sqrt(), x=names, y=names, xlabel="reader (block.head)",
                ylabel="writer (block.head)", unit="x random"),
    ]  # fmt: skip
    if "removed" in result.quantities:
        plots.append(
            bars("Removing one component", "Rise of the loss on the repeated half of random sequences when a "
                 "channel's component is removed, and the mean over others of the same head.",
                 {"channel": result["removed"], "other components": result["control"]},
                 x=result.labels["channel"][: len(result["removed"])], xlabel="channel", ylabel="nats")
        )  # fmt: skip
    return plots


@probing("talking-heads", title="Channels between heads", paper="arXiv:2406.09519", draw=draw)
def talking_heads(
    specimen: Specimen,
    *,
    channels: Annotated[int, Range(1, 1000)] = 20,
    tested: Annotated[int, Range(0, 100)] = 5,
    controls: Annotated[int, Range(1, 100)] = 4,
) -> Result:
    """Which directions a head writes that a later head reads, from the weights alone, and whether the model uses them.

    Every head's output matrix is split by its SVD; a channel is a component whose composition score with a later head
    is an outlier among its writer's. A high score is no proof of use: the strongest channels are removed, one component
    each, while the model reads random tokens that are said twice (a task for copying heads), beside other components
    of the same head.

    channels: how many are reported.
    tested: how many are removed; 0 needs no forward pass.
    controls: other components of the same head that are removed for comparison, those of the nearest sizes.
    """
    specimen.require_contributions()
    layers = [heads_of(specimen.anatomy, block) for block in specimen.anatomy.blocks]
    if sum(made is not None for made in layers) < 2:
        raise NotApplicable("channels lead to a later block's heads, and fewer than two blocks have attention")
    whole, best = _composed(specimen, layers, channels)
    quantities = {
        "heads": Quantity(whole, ("read", "head", "head"), "", "composition scores of whole heads"),
        "channels": Quantity(torch.tensor([score for score, *_ in best]), ("channel",), "", "scores of components"),
        "outliers": Quantity(torch.tensor([z for _, z, *_ in best]), ("channel",), "standard deviations",
                             "distance from the mean of the writer's components"),
        "width": Quantity(torch.tensor(float(specimen.anatomy.config_value("hidden"))), (), "", "width of the stream"),
    }  # fmt: skip
    if tested and task_of(specimen.model) == "causal":
        removed, control = _removals(specimen, layers, best[:tested], controls)
        quantities["removed"] = Quantity(removed, ("tested",), "nats", "rise of the loss without the component")
        quantities["control"] = Quantity(control, ("tested",), "nats", "the same for other components of the head")
    labels = {
        "head": [f"{layer}.{head}" for layer, made in enumerate(layers) if made for head in range(len(made.sizes))],
        "read": READS,
        "channel": [
            f"{early}.{head} [{component}] -> {late}.{other} ({READS[kind]})"
            for _, _, kind, early, head, component, late, other in best
        ],
    }
    result = Result(quantities, caveats=CAVEATS, labels=labels)
    result.findings = _findings(result, best[0])
    return result


CAVEATS = (
    "A high score says that a direction could carry something, not that it does; see the removals.",
    "Rotary embeddings are taken at offset 0; biases and the MLPs between the heads are left out.",
    "Where singular values are nearly equal, single components are not unique.",
)


def _composed(specimen: Specimen, layers: list[Heads | None], count: int) -> tuple[Tensor, list[tuple]]:
    """Scores of whole heads (3 x writers x readers, 0 where a reader is not in a later block); the best components."""
    starts = torch.tensor([0, *(len(made.sizes) if made else 0 for made in layers)]).cumsum(0).tolist()
    whole = torch.zeros(len(READS), starts[-1], starts[-1])
    best: list[tuple] = []
    pairs = [(w, r) for w in range(len(layers)) for r in range(w + 1, len(layers)) if layers[w] and layers[r]]
    for early, late in specimen.shown(pairs, "talking-heads"):
        writer, reader = layers[early], layers[late]
        assert writer is not None and reader is not None
        scores, components = composition(writer, reader)
        whole[:, starts[early] : starts[early + 1], starts[late] : starts[late + 1]] = scores.float().cpu()
        best += _strongest(components, early, late, count)
    return whole, sorted(best, reverse=True)[:count]


def _strongest(components: Tensor, early: int, late: int, count: int) -> list[tuple]:
    """(score, outlier, read, writer's layer, head, component, reader's layer, head) of the strongest components."""
    spread = (components - components.mean(2, keepdim=True)) / components.std(2, keepdim=True).clamp_min(1e-12)
    values, order = components.flatten().topk(min(count, components.numel()))
    kinds, heads, parts, others = (index.tolist() for index in torch.unravel_index(order, components.shape))
    return [
        (score, float(spread[kind, head, part, other]), kind, early, head, part, late, other)
        for score, kind, head, part, other in zip(values.tolist(), kinds, heads, parts, others, strict=True)
    ]


def _findings(result: Result, strongest: tuple) -> list[str]:
    """The strongest channel, whole heads for comparison, and what removals do."""
    score, outlier, *_ = strongest
    whole, names, root = result["heads"], result.labels["head"], float(result["width"]) ** 0.5
    layers = [int(name.partition(".")[0]) for name in names]
    later = torch.tensor([a < b for a in layers for b in layers]).view(len(names), -1)
    findings = [
        f"The strongest channel is {result.labels['channel'][0]}: {score * root:.1f} times what random matrices give, "
        f"and {outlier:.1f} standard deviations above its writer's components in the mean.",
        f"Whole heads compose at {float(whole[:, later].mean()) * root:.2f} times random in the mean, "
        f"and {float(whole.max()) * root:.2f} times at most.",
    ]
    if "removed" in result.quantities:
        removed, control = result["removed"], result["control"]
        findings.append(
            f"Removing the component of each of the {len(removed)} strongest channels raises the loss on repeated "
            f"random tokens by {float(removed.mean()):.4f} nats in the mean, other components of the same heads by "
            f"{float(control.mean()):.4f}."
        )
    return findings


@torch.no_grad()
def _removals(
    specimen: Specimen, layers: list[Heads | None], channels: list[tuple], controls: int
) -> tuple[Tensor, Tensor]:
    """Rise of the loss on the second half of repeated random tokens, for each channel and for other components."""
    generator = torch.Generator().manual_seed(specimen.seed)
    half = torch.randint(specimen.lens.weight.shape[0], (16, 24), generator=generator)
    ids = torch.cat([half, half], 1).to(specimen.model.device)

    def loss() -> float:
        logits = last_logits(specimen.model, ids, 24)[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 25:].flatten()))

    def without(early: int, head: int, component: int) -> float:
        made = layers[early]
        assert made is not None
        with changed(specimen.anatomy, {("heads", early): scaled_component(made, head, component, 0.0)}):
            return loss() - present

    present, removed, control = loss(), [], []
    for _, _, _, early, head, component, *_ in channels:
        made = layers[early]
        assert made is not None
        sizes = made.sizes[head]
        near = [int(i) for i in (sizes - sizes[component]).abs().argsort() if int(i) != component][:controls]
        removed.append(without(early, head, component))
        control.append(sum(without(early, head, other) for other in near) / len(near))
    return torch.tensor(removed), torch.tensor(control)
