"""What the numbers of the study of depth use say, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .convergence import late_share
from .erasure import last_use

Found = Mapping[str, Tensor]  # the quantities of `depth-efficiency` by name


def findings(found: Found) -> list[str]:
    """A few sentences; only that there is nothing to compare for a model of one layer."""
    if found["contribution"].shape[-1] < 2:
        return ["The model has one layer: there are no two halves to compare."]
    told = [
        added(found), direction(found), skipped(found), loss_of_skipping(found), readers(found), convergence(found),
        erased(found), attributed(found), depth_scores(found),
    ]  # fmt: skip
    return [sentence for sentence in told if sentence]


def halves(values: Tensor) -> tuple[float, float]:
    """Means over the first and the second half of the layers; the middle one of an odd number is in the second."""
    middle = len(values) // 2
    return float(values[:middle].mean()), float(values[middle:].mean())


def added(found: Found) -> str:
    """How much the halves add to the stream."""
    every, later = found["contribution"][:, 0]
    layers, (first, second) = len(later), halves(later)
    times = f", {first / second:.1f} times less" if 0 < second < first else ", no less"
    told = (
        f"A layer of the first half adds {first:.3f} of the stream's length on average, one of the second half "
        f"{second:.3f}{times} (without the first token; with it {halves(every)[0]:.3f} and "
        f"{halves(every)[1]:.3f}). Layer 0, which writes onto the bare embedding, adds {float(later[0]):.3f}"
    )
    if layers <= 3:
        return f"{told}."
    return f"{told}; without it the first half has {float(later[1 : layers // 2].mean()):.3f}."


def direction(found: Found) -> str:
    """Which layers erase."""
    cosine = found["cosine"][1, 0]
    against = [str(layer) for layer in range(len(cosine)) if cosine[layer] < 0]
    if not against:
        return "No layer points against the stream on average: they strengthen what is there, or add to it."
    return (
        "What is added points against the stream on average, and so erases more than it strengthens, in: layer "
        f"{', '.join(against)}."
    )


def skipped(found: Found) -> str:
    """What skipping a layer of each half does to predictions, here and at later tokens."""
    output = found["skip_output"][0]
    current, future = halves(output[0, 1]), halves(output[1, 1])
    less = future[1] * current[0] < future[0] * current[1]
    return (
        f"Skipping a layer of the first half changes the predicted distribution by {current[0]:.3f} where it is "
        f"skipped and by {future[0]:.3f} at later tokens (mean over tokens and layers); one of the second half by "
        f"{current[1]:.3f} and {future[1]:.3f}. "
        + (
            "So the second half serves later tokens less, in proportion, than the first."
            if less
            else "So later tokens use the second half no less, in proportion, than the first."
        )
    )


def loss_of_skipping(found: Found) -> str:
    """What skipping a layer costs."""
    loss, base = found["skip_loss"][0], float(found["prompt_loss"].mean())
    best, worst = int(loss.argmin()), int(loss.argmax())
    return (
        f"The loss of these prompts is {base:.3f} nats; with one layer skipped it is between "
        f"{float(loss[best]):.3f} (layer {best}) and {float(loss[worst]):.3f} (layer {worst})."
    )


def readers(found: Found) -> str:
    """Whether layers that are not neighbours use each other's results directly; "" where there are none."""
    mean_at_all_tokens = (0, 0, 1)
    skipping, local = found["skip_later"][mean_at_all_tokens], found["local_effect"][mean_at_all_tokens]
    pairs = torch.ones_like(local).triu(2).bool()
    if not pairs.any():
        return ""
    through, direct = float(skipping[pairs].mean()), float(local[pairs].mean())
    return (
        f"Between layers that are not neighbours, skipping the earlier one changes what the later one adds by "
        f"{through:.3f} of its length (mean over tokens and pairs). If the later one alone goes without what the "
        f"earlier one added, and all others are as usual, by {direct:.3f}: "
        + (
            "the layers in between add to the effect."
            if direct < through
            else "the layers in between do not add to the effect, and may take away from it."
        )
    )


def convergence(found: Found) -> str:
    """When the prediction is there."""
    divergence = found["lens_kl"]
    middle, share = (len(divergence) - 1) // 2, late_share(divergence)
    return (
        f"Read through the unembedding, the stream is {float(divergence[0]):.2f} nats from the final prediction at "
        f"the start and {float(divergence[middle]):.2f} nats before layer {middle}"
        + (f": the second half does {share:.0%} of the approach." if share == share else ".")
    )


def erased(found: Found) -> str:
    """Until when single tokens are needed."""
    erasure, use = found["erasure"], found["last_use"]
    return (
        f"Erased at layer 0, a token changes later predictions by up to {float(erasure[0].max()):.3f}; on average "
        f"over tokens half of its largest effect is there until layer {float(use.float().mean()):.1f} of "
        f"{len(erasure) - 1}."
    )


def attributed(found: Found) -> str:
    """What the tokens contribute to later predictions, and until when."""
    parts, whole, error = found["attribution"], found["attributed"], found["attribution_error"]
    last = len(whole) - 1
    return (
        f"Against mean states, the tokens' own states at layer 0 change the log-probability of the text behind "
        f"them by {float(whole[0]):+.3f} nats a token, and those at layer {last} by {float(whole[last]):+.3f}. By "
        f"integrated gradients, half of a token's largest part in that is there until layer "
        f"{float(last_use(parts.abs()).float().mean()):.1f} on average; the parts miss their sum by at most "
        f"{float(error.max()):.1g} nats (layer {int(error.argmax())})."
    )


def depth_scores(found: Found) -> str:
    """Whether prompts differ in depth; "" for fewer than three."""
    score, last = found["depth_score"][0], found["contribution"].shape[-1] - 1
    if len(score) < 3 or not bool(score.isfinite().all()):
        return ""
    pair = torch.stack([score, found["prompt_loss"].to(score)])
    return (
        f"Depth scores of {len(score)} prompts go from {float(score.min()):.2f} to {float(score.max()):.2f} of at "
        f"most {last}; their correlation with the prompt's loss is {float(torch.corrcoef(pair)[0, 1]):.2f}, which "
        "says little for so few prompts."
    )
