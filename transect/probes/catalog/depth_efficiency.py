"""What each layer adds, and who uses it: later layers, the prediction, later tokens."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...activations import Seen, Specimen, watch
from ...parameters import Range
from ..draw import Drawing, heatmap, lines
from ..erasure import erasure_effects
from ..excerpts import excerpt
from ..places import places, wide
from ..registry import Looking, probing
from ..result import Quantity, Result
from ..skipping import PARTS, REACHES, REDUCTIONS, Effects, cut_points, depth_score, skip_effects

LEAST = 16  # tokens of a prompt: fewer leave no cut point with four tokens behind it
SPANS = ("all tokens", "without the first")


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    count = result["contribution"].shape[-1]
    contribution, cosine, output = result["contribution"][1], result["cosine"][1], result["skip_output"][0]
    shown = {f"length, {part}": contribution[i] for i, part in enumerate(PARTS)}
    shown |= {f"cosine, {part}": cosine[i] for i, part in enumerate(PARTS)}
    return [
        lines(
            "What layers add to the stream",
            "Length of what is added over the length of the stream, and cosine between the two, without the first "
            "token. A negative cosine erases, zero writes something new, a positive one strengthens.",
            shown, xlabel="layer", ylabel="share of the stream, or cosine",
        ),
        lines(
            "What skipping a layer does to the prediction",
            "Change of the predicted distribution (mean over tokens) where the layer is skipped, and at later tokens. "
            "A layer that matters only to the first kind polishes the prediction of its own token.",
            {"where it is skipped": output[0, 1], "at later tokens": output[1, 1]},
            xlabel="skipped layer", ylabel="|y - y'|, at most 1.41",
        ),
        heatmap(
            "What skipping a layer does to layers at later tokens",
            "How much what a layer (column) adds changes when another (row) is skipped at earlier tokens alone: "
            "largest "
            "over tokens. Bright rows are layers whose results later tokens read.",
            result["skip_later"][0, 1, 0], x=list(range(count)), y=list(range(count)), xlabel="layer",
            ylabel="skipped layer",
        ),
        heatmap(
            "Until which layer a token is needed",
            "Change of the predictions behind the prompt when one token's state is erased (replaced by the mean) at "
            "one "
            "layer: largest over predictions. Dark from some layer on: by then the token has been read.",
            result["erasure"], xlabel="token", ylabel="layer", unit="|y - y'|",
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
    prompts: Annotated[int, Range(1, 1000)] = 10,
    length: Annotated[int, Range(LEAST, 4096)] = 64,
    cuts: Annotated[int, Range(1, 64)] = 4,
    erased: Annotated[int, Range(1, 100)] = 2,
) -> Looking:
    """How much of the depth is used: what layers add, what skipping one changes, when the prediction is there.

    Csordas et al. 2025, with running text in place of their arithmetic problems. Over all of the text: length of what
    attention a_l, MLP m_l and the whole layer l add over the length of what they add it to (h_l; h_l + a_l for the MLP,
    unless both run in parallel; h_l), and the cosines; all means over tokens. On a few prompts: effects of skipping,
    see `skipping`; the logit lens at each layer, as KL(final || lens) and overlap of the five most likely tokens;
    erased states, see `erasure`, where the last quarter of the prompt is what is predicted; and the depth score of a
    prompt, the mean layer weighted by the effect of skipping it on the output. Weights by that effect, the last
    quarter, and text as data are our reading. Their effect of a layer on another alone ("local") and integrated
    gradients are not computed. Costs 3 L (1 + cuts) passes over the prompts, and L passes over as many copies of each
    erased sequence as it has tokens in its first three quarters.

    prompts: beginnings of the text's sequences that layers are skipped on.
    length: tokens of a prompt.
    cuts: positions of each prompt before which a layer is skipped, to see later tokens.
    erased: sequences of which tokens are erased.
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
    start = ids.shape[1] * 3 // 4
    erasure = erasure_effects(specimen, ids[:erased], means, start)
    effects = skip_effects(specimen, ids, cut_points(ids.shape[0], ids.shape[1], cuts, specimen.seed))
    divergence, overlap = lens_convergence(specimen, ids)
    quantities = {
        "contribution": Quantity(shares[0], ("span", "part", "layer"), "", "length added over length of the stream"),
        "cosine": Quantity(shares[1], ("span", "part", "layer"), "", "cosine of what is added and the stream"),
        "skip_later": Quantity(
            effects.later,
            ("part", "reach", "reduction", "skipped", "layer"),
            "",
            "relative change of what a layer adds",
        ),
        "skip_output": Quantity(
            effects.output, ("part", "reach", "reduction", "skipped"), "", "L2 change of the predicted distribution"
        ),
        "skip_logits": Quantity(
            effects.logits, ("part", "reach", "reduction", "skipped"), "", "relative change of the centred logits"
        ),
        "skip_loss": Quantity(effects.loss, ("part", "skipped"), "nats", "loss with it skipped behind the first token"),
        "prompt_loss": Quantity(effects.baseline, ("prompt",), "nats", "loss of each prompt"),
        "depth_score": Quantity(
            torch.stack([depth_score(one) for one in effects.by_prompt]), ("reach", "prompt"), "layers", "depth score"
        ),
        "lens_kl": Quantity(divergence, ("state",), "nats", "KL of the final prediction and the logit lens"),
        "lens_overlap": Quantity(
            overlap, ("state",), "share", "of the five most likely tokens, those the lens has too"
        ),
        "erasure": Quantity(
            erasure, ("layer", "token"), "", "L2 change of later predictions, token erased at the layer"
        ),
        "last_use": Quantity(last_use(erasure), ("token",), "layer", "deepest layer with half of the largest effect"),
    }
    labels = {"span": SPANS, "part": tuple(PARTS), "reach": REACHES, "reduction": REDUCTIONS}
    return Result(quantities, findings(shares, effects, divergence, erasure), CAVEATS, labels)


CAVEATS = (
    "Skipped and erased states are ones that the model never saw in training: an effect says that something was read, "
    "not that the rest could not do without it.",
    "Largest values over tokens grow with the number of prompts; compare them between layers, not between runs of "
    "different size. Where a layer adds almost nothing, its relative change is noise.",
    "Distributions change little where the model is sure, whatever the logits do; their change is kept beside it.",
    "The last layer cannot reach later tokens at all, since nothing behind it reads their past.",
    "Depth scores of a few prompts of ordinary text do not say that hard inputs use no more depth.",
)


def contributions(seen: Seen, layer: int, parallel: bool, spans: tuple[Tensor, ...]) -> Tensor:
    """Relative length and cosine (2) of what attention, MLP and both add, summed over each span: 2 x spans x 3.

    The parts are in the order of PARTS: the layer, attention, the MLP. A dropped sublayer adds zeros.
    """
    h = wide(seen.residual[layer])
    a, m = (
        torch.zeros_like(h) if layer not in found else wide(found[layer]).reshape(h.shape)
        for found in (seen.attention, seen.mlp)
    )
    pairs = ((a + m, h), (a, h), (m, h if parallel else h + a))
    lengths = torch.stack([added.norm(dim=-1) / base.norm(dim=-1).clamp_min(1e-6) for added, base in pairs])
    cosines = torch.stack([cosine_similarity(added, base, dim=-1) for added, base in pairs])
    both = torch.stack([lengths, cosines])
    return torch.stack([both[..., span].sum(-1) for span in spans], 1).cpu().double()


@torch.no_grad()
def lens_convergence(specimen: Specimen, ids: Tensor) -> tuple[Tensor, Tensor]:
    """KL(final || lens) in nats, and overlap of the five most likely tokens, at each state of the stream (L + 1 each).

    Means over all positions but the first.
    """
    with watch(specimen.anatomy, ["residual"]) as seen:
        specimen.model.base_model(input_ids=ids, use_cache=False)
    lens, layers = specimen.lens, specimen.layers
    final = wide(lens(seen.residual[layers][:, 1:])).log_softmax(-1)
    probabilities, best = final.exp(), final.topk(5).indices
    divergence, overlap = torch.zeros(layers + 1), torch.zeros(layers + 1)
    for layer in range(layers + 1):
        now = wide(lens(seen.residual[layer][:, 1:])).log_softmax(-1)
        divergence[layer] = (probabilities * (final - now)).sum(-1).mean()
        shared = best[..., :, None] == now.topk(5).indices[..., None, :]
        overlap[layer] = shared.any(-1).float().mean()
    return divergence, overlap


def last_use(erasure: Tensor) -> Tensor:
    """The deepest layer at which erasing a token has at least half of its largest effect (T'), from L x T'."""
    matters = erasure >= erasure.amax(0) / 2
    return (matters * torch.arange(len(erasure))[:, None]).amax(0)


def halves(values: Tensor) -> tuple[float, float]:
    """Means over the first and the second half of the layers; the middle one of an odd number is in the second."""
    middle = len(values) // 2
    return float(values[:middle].mean()), float(values[middle:].mean())


def findings(shares: Tensor, effects: Effects, divergence: Tensor, erasure: Tensor) -> list[str]:
    """What the numbers say, in sentences."""
    layers = shares.shape[-1]
    if layers < 2:
        return ["The model has one layer: there are no two halves to compare."]
    first, second = halves(shares[0, 1, 0])
    told = [
        f"A layer of the first half adds {first:.3f} of the stream's length on average, one of the second half "
        f"{second:.3f}{_times(first, second)} (without the first token; with it "
        "{:.3f} and {:.3f}). ".format(*halves(shares[0, 0, 0]))
        + f"Layer 0, which writes onto the bare embedding, adds {float(shares[0, 1, 0, 0]):.3f}"
        + (
            f"; without it the first half has {float(shares[0, 1, 0, 1 : layers // 2].mean()):.3f}."
            if layers > 3
            else "."
        )
    ]
    against = [str(layer) for layer in range(layers) if shares[1, 1, 0, layer] < 0]
    told.append(
        "What is added points against the stream on average, and so erases more than it strengthens, in: layer "
        f"{', '.join(against)}."
        if against
        else "No layer points against the stream on average: they strengthen what is there, or add to it."
    )
    current, future = halves(effects.output[0, 0, 1]), halves(effects.output[0, 1, 1])
    told.append(
        f"Skipping a layer of the first half changes the predicted distribution by {current[0]:.3f} where it is "
        "skipped "
        f"and by {future[0]:.3f} at later tokens (mean over tokens and layers); one of the second half by "
        f"{current[1]:.3f} and {future[1]:.3f}. "
        + (
            "So the second half serves later tokens less, in proportion, than the first."
            if future[1] * current[0] < future[0] * current[1]
            else "So later tokens use the second half no less, in proportion, than the first."
        )
    )
    loss, base = effects.loss[0], float(effects.baseline.mean())
    best, worst = int(loss.argmin()), int(loss.argmax())
    told.append(
        f"The loss of these prompts is {base:.3f} nats; with one layer skipped it is between {float(loss[best]):.3f} "
        f"(layer {best}) and {float(loss[worst]):.3f} (layer {worst})."
    )
    middle = layers // 2
    fall = float(divergence[0] - divergence[-1])
    share = float(divergence[middle] - divergence[-1]) / fall if fall > 0 else float("nan")
    told.append(
        f"Read through the unembedding, the stream is {float(divergence[0]):.2f} nats from the final prediction at the "
        f"start and {float(divergence[middle]):.2f} nats before layer {middle}"
        + (f": the second half does {share:.0%} of the approach." if fall > 0 else ".")
    )
    told.append(
        f"Erased at layer 0, a token changes later predictions by up to {float(erasure[0].max()):.3f}; on average over "
        f"tokens half of its largest effect is there until layer {float(last_use(erasure).float().mean()):.1f} of "
        f"{layers - 1}."
    )
    score = depth_score(effects.by_prompt[0])
    if len(score) >= 3 and bool(score.isfinite().all()):
        pair = torch.stack([score, effects.baseline.to(score)])
        told.append(
            f"Depth scores of {len(score)} prompts go from {float(score.min()):.2f} to {float(score.max()):.2f} of at "
            "most "
            f"{layers - 1}; their correlation with the prompt's loss is {float(torch.corrcoef(pair)[0, 1]):.2f}, which "
            "says little for so few prompts."
        )
    return told


def _times(first: float, second: float) -> str:
    return f", {first / second:.1f} times less" if 0 < second < first else ", no less"
