"""How few MLP neurons are active: by layer, neuron and place in the text, and what the others are good for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch

from ....data import Specimen
from ....errors import NotApplicable
from ....evaluation import evaluate_loss
from ....forward import changed
from ....forward.objective import task_of
from ....parameters import Range
from ...draw import Drawing, Table, lines
from ...places import places
from ...registry import Looking, probing
from ...result import Quantity, Result
from .activity import MEASURES, PLACES, Tally, rectifies, shaped
from .topk import top_k

SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)
CURVE = 101  # points of the sorted firing rates


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    rates, layers = result["rate"], result.label("layer", len(result["rate"]))
    points = torch.linspace(0, 1, CURVE, dtype=rates.dtype)
    curves = {}
    for name, row in zip(layers, rates, strict=True):
        curves[f"layer {name}"] = row[row.isfinite()].quantile(points).flip(0)
    drawn: list[Drawing] = [
        lines(
            "Active neurons by layer",
            "Mean share of the neurons that are active for a token. exact: not zero. above: larger than a share of "
            "the token's largest. mass: the fewest that hold 95 % of the sum of sizes. Never compare one with another.",
            {name: result["density"][number] for number, name in enumerate(MEASURES)},
            x=layers, xlabel="layer", ylabel="share of neurons",
        ),
        lines(
            "How often each neuron is active",
            "Neurons sorted from the busiest to the laziest; the curve reaches zero where neurons are dead.",
            curves, x=list(range(CURVE)), xlabel="neurons, % of a layer", ylabel="share of tokens",
        ),
        lines(
            "Active neurons by place in the text",
            "Mean over layers. The first token is often an outlier.",
            {"active": result["by_place"].nanmean(0)},
            x=result.labels["place"], xlabel="place of the token", ylabel="share of neurons",
        ),
    ]  # fmt: skip
    if "loss" in result.quantities:
        rows = [[name, f"{float(loss):.4f}"] for name, loss in zip(result.labels["kept"], result["loss"], strict=True)]
        drawn.append(
            Table(
                "Loss with only the largest activations",
                "Every layer's neurons but the k largest of each token are set to zero, without any training.",
                ["neurons that stay, of each layer", "loss, nats"],
                rows,
            )
        )
    return drawn


@probing("lazy-neuron", title="Lazy neurons", paper="arXiv:2210.06313", watches=["residual", "neurons"], draw=draw)
def lazy_neuron(
    specimen: Specimen,
    *,
    share: Annotated[float, Range(0, 1)] = 0.05,
    sequences: Annotated[int, Range(1, 10000)] = 8,
) -> Looking:
    """How few MLP neurons are active for a token, which are busy and which are dead, and how many the model needs.

    Li et al. 2023. Activations are what the down matrix reads, a (n). Three measures of the active share: a_i != 0,
    the paper's; |a_i| > share * max |a|; and the smallest k whose largest entries hold 95 % of the sum of |a_i|.
    The last two are an extension for GELU, SiLU and gated MLPs, where nothing is exactly zero; the paper is about
    ReLU. Firing rates, places and dead neurons are those of exact zeros where the activation function gives them,
    else of the second measure. Padding does not count. Then the loss with the k largest |a_i| of each token alone,
    k the same share of every layer, and k = what 99 % of the tokens of that layer need ("natural", our design),
    without any training.

    share: of a token's largest activation, above which a neuron counts as active where nothing is exactly zero.
    sequences: of the text, on which the loss is measured.
    """
    blocks = [block for block in specimen.anatomy.blocks if block.mlp is not None]
    if not blocks:
        raise NotApplicable("all MLPs of this model were dropped")
    sharp = all(rectifies(block) for block in blocks)
    tallies = {block.index: Tally(block.find("down").shape[1], sharp, share) for block in blocks}
    while (seen := (yield)) is not None:
        place = places(seen, seen.residual[0])
        for layer, tally in tallies.items():
            tally.add(shaped(seen, layer), place)
    kept, losses = thinned_losses(specimen, {layer: tally.natural() for layer, tally in tallies.items()}, sequences)
    quantities = measured(list(tallies.values()), sharp)
    labels = {"measure": MEASURES, "layer": [str(layer) for layer in tallies]}
    labels["place"] = PLACES[: quantities["by_place"].values.shape[1]]
    if losses:
        quantities["loss"] = Quantity(
            torch.tensor(losses), ("kept",), "nats", "loss with the largest activations alone"
        )
        labels["kept"] = kept
    tokens = int(next(iter(tallies.values())).tokens)
    return Result(quantities, findings(quantities, labels, sharp, share, tokens), CAVEATS, labels)


def measured(tallies: Sequence[Tally], sharp: bool) -> dict[str, Quantity]:
    """What the tallies of the layers say, as arrays."""
    rates = torch.full((len(tallies), max(tally.neurons for tally in tallies)), torch.nan, dtype=torch.float64)
    for row, tally in zip(rates, tallies, strict=True):
        row[: tally.neurons] = tally.fired / tally.tokens
    buckets = int(tallies[0].place_counts.nonzero().max()) + 1
    by_place = torch.stack([tally.place_sums / tally.place_counts for tally in tallies])[:, :buckets].float()
    density = torch.stack([tally.density for tally in tallies], 1)
    dead = torch.tensor([float((tally.fired == 0).double().mean()) for tally in tallies])
    natural = torch.tensor([tally.natural() for tally in tallies])
    neurons = torch.tensor([tally.neurons for tally in tallies])
    return {
        "density": Quantity(density, ("measure", "layer"), "share", "active neurons of a token, mean over tokens"),
        "rate": Quantity(rates, ("layer", "neuron"), "share", "tokens for which a neuron is active"),
        "dead": Quantity(dead, ("layer",), "share", "neurons that were never active"),
        "natural": Quantity(natural, ("layer",), "neurons", "active neurons that 99 % of the tokens do not exceed"),
        "by_place": Quantity(by_place, ("layer", "place"), "share", "active neurons by place in the text"),
        "neurons": Quantity(neurons, ("layer",), "neurons", "neurons of a layer"),
        "sharp": Quantity(torch.tensor(sharp), (), "", "whether the activation function gives exact zeros"),
    }


CAVEATS = (
    "Density depends on the measure and on the activation function. Do not compare numbers across them: a "
    "threshold says nothing about exact zeros.",
    "Few active neurons do not make a model faster on ordinary hardware, which computes the zeros too.",
    "The paper trains with the k largest from the start. Put on a trained model afterwards they cost loss below "
    "the number of neurons that it uses by itself.",
    "A neuron that is dead on this text may live on another.",
)


def thinned_losses(specimen: Specimen, natural: dict[int, int], sequences: int) -> tuple[list[str], list[float]]:
    """Names and losses (nats) with the k largest activations of each token, at several k; none without labels."""
    text = specimen.text.take(sequences)
    task = task_of(specimen.model)
    if task == "unknown" or (task != "causal" and not all("labels" in batch for batch in text)):
        return [], []
    widths = {layer: specimen.anatomy.blocks[layer].find("down").shape[1] for layer in natural}
    kept = {f"{share:.2%}": {layer: math.ceil(share * n) for layer, n in widths.items()} for share in SHARES}
    kept["natural"] = natural
    losses = []
    for counts in specimen.shown(kept.values(), "largest activations"):
        changes = {("neurons", layer): (lambda a, k=k: top_k(a, k, magnitude=True)) for layer, k in counts.items()}
        with changed(specimen.anatomy, changes):
            losses.append(evaluate_loss(specimen.model, text).loss)
    return list(kept), losses


def findings(
    quantities: dict[str, Quantity], labels: dict[str, list[str]], sharp: bool, share: float, tokens: int
) -> list[str]:
    """What the numbers say, in sentences."""
    values = {name: one.values for name, one in quantities.items()}
    layers = labels["layer"]
    density = values["density"][0 if sharp else 1]
    lazy, busy = int(density.argmin()), int(density.argmax())
    kind = (
        "have an activation other than zero"
        if sharp
        else f"have more than {share:.0%} of the token's largest activation"
    )
    told = [
        f"For a token, {float(density.mean()):.1%} of the neurons {kind} (mean over layers and {tokens} tokens): "
        f"from {float(density[lazy]):.1%} in layer {layers[lazy]} to {float(density[busy]):.1%} in layer "
        f"{layers[busy]}."
    ]
    if not sharp:
        told.append(
            "Activations of this model are never exactly zero by design, so the paper's measure does not apply; 95 "
            f"% of the sum of sizes is held by {float(values['density'][2].mean()):.1%} of the neurons."
        )
    rates, dead = values["rate"][values["rate"].isfinite()], float(values["dead"].max())
    told.append(
        f"Half of the neurons are active for fewer than {float(rates.median()):.1%} of the tokens. "
        f"{float((rates == 0).double().mean()):.1%} were never active, {dead:.1%} in the layer with the most of them"
        + (": more than the 5 % of a healthy layer." if dead >= 0.05 else ".")
    )
    if "loss" in values:
        loss = values["loss"].tolist()
        enough = [name for name, one in zip(labels["kept"][1:-1], loss[1:-1], strict=True) if one - loss[0] < 0.05]
        told.append(
            f"The loss is {loss[0]:.3f} nats with all neurons and {loss[-1]:.3f} with the largest "
            f"{float((values['natural'] / values['neurons']).mean()):.0%} of each token (what 99 % of the tokens use). "
            + (
                f"Down to {enough[-1]} of each layer it rises by less than 0.05 nats."
                if enough
                else f"Half of the neurons already cost {loss[1] - loss[0]:.3f} nats."
            )
        )
    return told
