"""What each layer adds, and who uses it: later layers, the prediction, later tokens."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ....data import Specimen
from ....parameters import Range
from ...draw import Drawing, heatmap, lines
from ...excerpts import excerpt
from ...places import places, wide
from ...registry import Looking, probing
from ...result import Quantity, Result
from .convergence import lens_convergence
from .depth_findings import findings
from .erasure import erasure_effects, last_use
from .integrated import integrated_gradients
from .local_effects import local_effects
from .skipping import PARTS, REACHES, REDUCTIONS, cut_points, depth_score, skip_effects
from .steps import contributions

LEAST = 16  # tokens of a prompt: fewer leave no cut point with four tokens behind it
SPANS = ("all tokens", "without the first")


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    return [*draw_layers(result), *draw_readers(result), *draw_tokens(result)]


def draw_layers(result: Result) -> list[Drawing]:
    """What each layer adds, and what skipping it does to the prediction."""
    contribution, cosine, output = result["contribution"][1], result["cosine"][1], result["skip_output"][0]
    return [
        lines(
            "How much layers add to the stream",
            "Length of what is added over the length of the stream, without the first token.",
            {part: contribution[i] for i, part in enumerate(PARTS)},
            xlabel="layer", ylabel="share of the stream", log=True,
        ),
        lines(
            "Where what they add points",
            "Its cosine with the stream. A negative one erases, zero writes something new, a positive one strengthens.",
            {part: cosine[i] for i, part in enumerate(PARTS)}, xlabel="layer", ylabel="cosine",
        ),
        lines(
            "What skipping a layer does to the prediction",
            "Change of the predicted distribution (mean over tokens) where the layer is skipped, and at later "
            "tokens. A layer that matters only to the first kind polishes the prediction of its own token.",
            {"where it is skipped": output[0, 1], "at later tokens": output[1, 1]},
            xlabel="skipped layer", ylabel="|y - y'|, at most 1.41",
        ),
    ]  # fmt: skip


def draw_readers(result: Result) -> list[Drawing]:
    """Which layers, at later tokens, use what a layer added: through all that is between, and directly."""
    return [
        heatmap(
            "What skipping a layer does to layers at later tokens",
            "How much what a layer (column) adds changes when another (row) is skipped at earlier tokens alone: "
            "largest over tokens. Bright rows are layers whose results later tokens read.",
            _later(result["skip_later"][0, 1, 0]), xlabel="layer", ylabel="skipped layer",
        ),
        heatmap(
            "Which layers read another layer's result directly",
            "The same, where only the layer of the column goes without what the layer of the row added at earlier "
            "tokens, and all other layers are as usual. Bright here and above: read directly. Bright only above: "
            "what arrives has passed through layers in between.",
            _later(result["local_effect"][0, 1, 0]), xlabel="layer", ylabel="layer whose result is missing",
        ),
    ]  # fmt: skip


def _later(effects: Tensor) -> Tensor:
    """Effects (L x L) of a layer on another, without those on earlier layers, which are none."""
    return effects.masked_fill(torch.ones_like(effects).tril().bool(), torch.nan)


def draw_tokens(result: Result) -> list[Drawing]:
    """Until which layer each token's state is needed, seen in two ways."""
    return [
        heatmap(
            "Until which layer a token is needed",
            "Change of the predictions behind the prompt when one token's state is erased (replaced by the mean) "
            "at one layer: largest over predictions. Dark from some layer on: by then the token has been read.",
            result["erasure"], xlabel="token", ylabel="layer", unit="|y - y'|",
        ),
        heatmap(
            "How much a token helps the right continuation",
            "Integrated gradients of the log-probability of the text behind the prompt: what the token's state at "
            "a layer contributes, against the mean state. Red helps, blue stands in the way. A row sums to what "
            "all of these states do together.",
            result["attribution"], xlabel="token", ylabel="layer", unit="nats", diverging=True,
        ),
    ]  # fmt: skip


@probing(
    "depth-efficiency",
    title="Use of depth",
    paper="arXiv:2505.13898",
    watches=["residual", "attention", "mlp"],
    draw=draw,
)
def depth_efficiency(
    specimen: Specimen,
    *,
    prompts: Annotated[int, Range(1, 1000)] = 4,
    length: Annotated[int, Range(LEAST, 4096)] = 64,
    cuts: Annotated[int, Range(1, 64)] = 4,
    erased: Annotated[int, Range(1, 100)] = 1,
    steps: Annotated[int, Range(1, 256)] = 32,
) -> Looking:
    """How much of the depth is used: what layers add, what skipping one changes, when the prediction is there.

    Csordas et al. 2025, with running text in place of their arithmetic problems. Over all of the text: length of
    what attention a_l, MLP m_l and the whole layer l add over the length of what they add it to (h_l; h_l + a_l for
    the MLP, unless both run in parallel; h_l), and the cosines; all means over tokens. On a few prompts: effects of
    skipping, see `skipping`, and of one layer on another alone, see `local_effects`; the logit lens at each layer,
    as KL(final || lens) and overlap of the five most likely tokens; erased states, see `erasure`, where the last
    quarter of the prompt is what is predicted; integrated gradients of the same predictions, see `integrated`; and
    the depth score of a prompt, the mean layer weighted by the effect of skipping it on the output. Weights by that
    effect, the last quarter, and text as data are our reading.

    Costs 3 L (1 + cuts) passes over the prompts and half as many for the effects of one layer on another alone, and
    for each erased sequence L passes over as many copies as it has tokens in its first three quarters, and L passes
    forward and back over as many as there are steps.

    prompts: beginnings of the text's sequences that layers are skipped on. The authors have 10 and 20; four take
        minutes on a CPU.
    length: tokens of a prompt.
    cuts: positions of each prompt before which a layer is skipped, to see later tokens.
    erased: sequences of which tokens are erased, and whose predictions are attributed to tokens.
    steps: points between mean and state at which integrated gradients are taken; their error is in the result.
    """
    specimen.require_causal()
    specimen.require_contributions()
    lens, ids = specimen.lens, excerpt(specimen, prompts, length, LEAST)
    layers, parallel = specimen.layers, [block.parallel for block in specimen.anatomy.blocks]
    sums = torch.zeros(2, len(SPANS), len(PARTS), layers, dtype=torch.float64)
    counts = torch.zeros(len(SPANS), dtype=torch.float64)
    means = torch.zeros(layers, lens.weight.shape[1], dtype=torch.float64)
    while (seen := (yield)) is not None:
        place = places(seen, seen.residual[0])
        spans = (place >= 0, place > 0)
        for layer in range(layers):
            sums[..., layer] += contributions(seen, layer, parallel[layer], spans)
            means[layer] += wide(seen.residual[layer])[spans[0]].sum(0).cpu().double()
        counts += torch.tensor([float(span.sum()) for span in spans], dtype=torch.float64)
    shares = (sums / counts[:, None, None].clamp_min(1)).float()
    means = (means / counts[0].clamp_min(1)).float()
    quantities = {
        "contribution": Quantity(shares[0], ("span", "part", "layer"), "", "length added over that of the stream"),
        "cosine": Quantity(shares[1], ("span", "part", "layer"), "", "cosine of what is added and the stream"),
        **of_layers(specimen, ids, cuts),
        **of_tokens(specimen, ids[:erased], means, steps),
    }
    labels = {"span": SPANS, "part": tuple(PARTS), "reach": REACHES, "reduction": REDUCTIONS}
    return Result(quantities, findings({name: one.values for name, one in quantities.items()}), CAVEATS, labels)


def of_layers(specimen: Specimen, ids: Tensor, cuts: int) -> dict[str, Quantity]:
    """What layers are good for on a few prompts (P x T): skipped, one for another alone, read through the lens."""
    points = cut_points(ids.shape[0], ids.shape[1], cuts, specimen.seed)
    effects, (divergence, overlap) = skip_effects(specimen, ids, points), lens_convergence(specimen, ids)
    local = local_effects(specimen, ids, points)
    scores = torch.stack([depth_score(values) for values in effects.by_prompt])
    one, pair = ("part", "reach", "reduction", "skipped"), ("part", "reach", "reduction", "skipped", "layer")
    alone = "the same if only that layer goes without"
    shared = "of the five most likely tokens, those the lens has too"
    return {
        "skip_later": Quantity(effects.later, pair, "", "relative change of what a layer adds"),
        "local_effect": Quantity(local, pair, "", alone),
        "skip_output": Quantity(effects.output, one, "", "L2 change of the predicted distribution"),
        "skip_logits": Quantity(effects.logits, one, "", "relative change of the centred logits"),
        "skip_loss": Quantity(effects.loss, ("part", "skipped"), "nats", "loss with it skipped behind token 0"),
        "prompt_loss": Quantity(effects.baseline, ("prompt",), "nats", "loss of each prompt"),
        "depth_score": Quantity(scores, ("reach", "prompt"), "layers", "depth score"),
        "lens_kl": Quantity(divergence, ("state",), "nats", "KL of the final prediction and the logit lens"),
        "lens_overlap": Quantity(overlap, ("state",), "share", shared),
    }


def of_tokens(specimen: Specimen, ids: Tensor, means: Tensor, steps: int) -> dict[str, Quantity]:
    """Until when the tokens of a few sequences (n x T) are needed for the last quarter. means: of states, L x d."""
    start = ids.shape[1] * 3 // 4
    erasure = erasure_effects(specimen, ids, means, start)
    found = integrated_gradients(specimen, ids, means, start, steps)
    erased = "L2 change of later predictions, token erased at the layer"
    part = "part of the token's state in the log-probability of later tokens"
    return {
        "erasure": Quantity(erasure, ("layer", "token"), "", erased),
        "last_use": Quantity(last_use(erasure), ("token",), "layer", "deepest layer with half its effect"),
        "attribution": Quantity(found.attribution, ("layer", "token"), "nats", part),
        "attributed": Quantity(found.change, ("layer",), "nats", "log-probability, against mean states"),
        "attribution_error": Quantity(found.error, ("layer",), "nats", "what attributions miss of it, at most"),
    }


CAVEATS = (
    "Skipped and erased states are ones that the model never saw in training: an effect says that something was "
    "read, not that the rest could not do without it.",
    "Largest values over tokens grow with the number of prompts; compare them between layers, not between runs of "
    "different size. Where a layer adds almost nothing, its relative change is noise.",
    "Distributions change little where the model is sure, whatever the logits do; their change is kept beside it.",
    "The last layer cannot reach later tokens at all, since nothing behind it reads their past.",
    "That a layer alone goes without another's result is a combination of states that the network never has. "
    "Effects of single pairs do not add up to the effect of skipping.",
    "Attributions depend on the mean state that they start from, and tokens share what they do together by the "
    "path from there: a token without attribution may still have been needed.",
    "Depth scores of a few prompts of ordinary text do not say that hard inputs use no more depth.",
)
