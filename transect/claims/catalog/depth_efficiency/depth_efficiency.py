"""Claims of the study of depth use (Csordas et al. 2025, arXiv:2505.13898)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....anatomy import Anatomy
from ....data import Specimen
from ....errors import BadData
from ....probes import Result as Found
from ....probes.catalog.depth_efficiency.convergence import late_share, lens_convergence
from ....probes.catalog.depth_efficiency.depth_maps import cross_model_maps, offsets
from ....probes.excerpts import excerpt
from ...context import Context
from ...probing import probed
from ...registry import NotApplicable, Result, Verdict, claim
from .shallower import STEPS, text_of, train, untrained

PROMPTS, LENGTH = 32, 128  # of the text, for the lens


@claim(
    "depth-efficiency/halves",
    method="depth-efficiency",
    paper="arXiv:2505.13898",
    statement="Layers of the second half add less to the residual stream than those of the first, and skipping one "
    "of them changes the predictions for later tokens less.",
)
def halves(context: Context) -> Result:
    """Two differences of means over layers, each also without the layers that decide it by construction.

    Layer 0 writes onto the bare embedding, whose length is arbitrary, and the last layer cannot reach later tokens.
    The claim holds where both differences have the claimed sign with all layers and without these two. Effects are
    means over tokens, without the first for what is added. Leaving these layers out is our design.
    """
    specimen = context.specimen
    layers, middle = specimen.layers, specimen.layers // 2
    if layers < 4:
        raise NotApplicable(
            f"two halves without the first and the last layer need at least 4 layers, the model has {layers}"
        )
    found = probed(specimen, "depth-efficiency", prompts=10)
    added, cosine = found["contribution"][1, 0], found["cosine"][1, 0]
    current, future = found["skip_output"][0, :, 1]
    rows = [
        {
            "layer": layer,
            "half": "first" if layer < middle else "second",
            "length added / stream": float(added[layer]),
            "cosine": float(cosine[layer]),
            "skipped: change where skipped": float(current[layer]),
            "skipped: change at later tokens": float(future[layer]),
            "skipped: loss, nats": float(found["skip_loss"][0, layer]),
            "lens KL before it, nats": float(found["lens_kl"][layer]),
        }
        for layer in range(layers)
    ]
    told, holds = [], True
    shown = {"What a layer adds, over the stream's length": added, "Change at later tokens": future}
    for what, values in shown.items():
        parts = (values[:middle], values[middle:], values[1:middle], values[middle:-1])
        means = [float(part.mean()) for part in parts]
        holds &= means[1] < means[0] and means[3] < means[2]
        told.append(
            f"{what}: {means[0]:.4f} in the first half and {means[1]:.4f} in the second; without layer 0 and layer "
            f"{layers - 1}, {means[2]:.4f} and {means[3]:.4f}"
        )
    here, later = (torch.stack([one[:middle].mean(), one[middle:].mean()]) for one in (current, future))
    ratio = (later / here).tolist()
    told.append(
        f"Where it is skipped, a layer of the first half changes predictions by {here[0]:.4f}, of the second "
        f"{here[1]:.4f}; the change at later tokens is {ratio[0]:.3f} and {ratio[1]:.3f} of that"
    )
    return Result(Verdict.of(holds), ". ".join(told) + ".", rows)


@claim(
    "depth-efficiency/lens",
    method="depth-efficiency",
    paper="arXiv:2505.13898",
    statement="Read through the unembedding, the residual stream comes closer to the final prediction mostly in "
    "the second half of the layers.",
)
def lens(context: Context) -> Result:
    """The fall of KL(final prediction || logit lens) from the first state to the last: over half of it is late.

    Mean over PROMPTS beginnings of the text of LENGTH tokens, without their first one. The claim is also judged
    from state 1 on: what the bare embedding says through the unembedding is far from any prediction in a model that
    ties both, so that layer 0 alone can decide the first number. It holds where both shares are above one half.
    Leaving out layer 0 is our design.
    """
    specimen = context.specimen
    specimen.require_causal()
    layers = specimen.layers
    if layers < 4:
        raise NotApplicable(f"two halves, one without layer 0, need at least 4 layers, the model has {layers}")
    divergence, overlap = lens_convergence(specimen, excerpt(specimen, PROMPTS, LENGTH, least=2))
    middle, shares = layers // 2, [late_share(divergence, start) for start in (0, 1)]
    rows = [
        {"state": state, "KL, nats": float(divergence[state]), "five most likely in common": float(overlap[state])}
        for state in range(layers + 1)
    ]
    told = (
        f"KL is {float(divergence[0]):.3f} nats at the embedding, {float(divergence[1]):.3f} behind layer 0, "
        f"{float(divergence[middle]):.3f} before layer {middle} and {float(divergence[-1]):.3f} at the end: the "
        f"second half of the layers does {shares[0]:.1%} of the approach, and {shares[1]:.1%} of what is left of "
        "it behind layer 0."
    )
    holds = all(share > 0.5 for share in shares)
    return Result(Verdict.of(holds), told, rows)


@claim(
    "depth-efficiency/cross-model",
    method="depth-efficiency",
    paper="arXiv:2505.13898",
    statement="The state of a shallower model from which a state of a deeper one is best had by a linear map lies "
    "near the one in proportion: the deeper model does the same in smaller steps.",
)
def cross_model(context: Context) -> Result:
    """Mean distance of the best states from the proportional ones, against a path that is drawn at random.

    The paper maps between released models of one family. Our stand-in for the shallower one has the configuration
    of the model under study with half of its blocks, and is trained from scratch here, see `shallower`; the maps
    are fitted and judged on the held-out text. State 0 is left out of the mean: both models' embeddings know the
    token and nothing else. The claim holds where the mean distance is below that of a uniform choice of the state;
    how often such a choice comes as near is told beside it, and the path from the same model before its training.
    """
    specimen, deep = context.specimen, context.specimen.layers
    if deep < 4:
        raise NotApplicable(f"half of the layers must be 2 or more, and so all at least 4 layers; there are {deep}")
    shallow = deep // 2
    model, (text, source) = untrained(context, shallow), text_of(context)
    target = replace(specimen, data=context.evaluation)
    other = Specimen(Anatomy(model, context.anatomy.architecture), specimen.tokenizer)
    try:
        before = cross_model_maps(target, other)
    except BadData as reason:
        raise NotApplicable(f"the held-out text is too little for it: {reason}") from None
    train(model, text, context.progress)
    after = cross_model_maps(target, other)
    away = offsets(range(deep + 1), range(shallow + 1), deep, shallow)
    random, chosen, control = float(away[1:].mean()), path_of(away, after), path_of(away, before)
    near = share_as_near(deep, shallow, after["best"])
    losses = context.dense.loss, context.evaluate(model, 1.0).loss
    told = (
        f"The best of {shallow + 1} states is {chosen:.3f} layers from the one in proportion, mean over {deep} "
        f"states; a random one {random:.3f}, and a random path is as near in {near:.1%} of cases. Before its "
        f"training the best states of the shallower model are {control:.3f} away. Losses on held-out text: {deep} "
        f"layers {losses[0]:.4f}, {shallow} layers {losses[1]:.4f} nats, the latter after {STEPS} steps on "
        f"{source}."
    )
    rows = map_rows(deep, shallow, before, after)
    return Result(Verdict.of(chosen < random), told, rows)


def map_rows(deep: int, shallow: int, before: Found, after: Found) -> list[dict[str, Any]]:
    """The maps to each state of the deep model, from the shallower one before and after its training."""
    return [
        {
            "state": state,
            "in proportion": state * shallow / deep,
            "best": int(after["best"][state]),
            "best before training": int(before["best"][state]),
            **{f"error from state {m}": float(after["error"][state, m]) for m in range(shallow + 1)},
        }
        for state in range(deep + 1)
    ]


def path_of(away: Tensor, maps: Found) -> float:
    """Mean distance of the best states from the proportional ones, without state 0. away: all `offsets`."""
    return float(away.gather(1, maps["best"][:, None])[1:].mean())


def share_as_near(deep: int, shallow: int, best: Tensor) -> float:
    """Of all paths, one state of the shallower model for each of 1 ... L, the share as near as `best` (L + 1).

    In whole numbers, |m L - l M|, since equal distances must count as equal.
    """
    steps = [[abs(m * deep - state * shallow) for m in range(shallow + 1)] for state in range(1, deep + 1)]
    sums = Counter({0: 1})
    for distances in steps:
        sums = Counter(
            {
                total: sum(sums[total - distance] for distance in distances)
                for total in range(max(sums) + max(distances) + 1)
            }
        )
    reached = sum(distances[int(m)] for distances, m in zip(steps, best[1:], strict=True))
    return sum(count for total, count in sums.items() if total <= reached) / (shallow + 1) ** deep
