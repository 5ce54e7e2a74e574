"""Claim of the study of depth use (Csordas et al. 2025, arXiv:2505.13898)."""

from __future__ import annotations

from .context import Context
from .probing import probed
from .registry import NotApplicable, Result, Verdict, claim


@claim(
    "depth-efficiency/halves",
    method="depth-efficiency",
    paper="arXiv:2505.13898",
    statement="Layers of the second half add less to the residual stream than those of the first, and skipping one of "
    "them "
    "changes the predictions for later tokens less.",
)
def halves(context: Context) -> Result:
    """Two differences of means over layers, each also without the layers that decide it by construction.

    Layer 0 writes onto the bare embedding, whose length is arbitrary, and the last layer cannot reach later tokens. The
    claim holds where both differences have the claimed sign with all layers and without these two. Effects are means
    over tokens, without the first for what is added. Leaving these layers out is our design.
    """
    specimen = context.specimen
    layers, middle = specimen.layers, specimen.layers // 2
    if layers < 4:
        raise NotApplicable(
            f"two halves without the first and the last layer need at least 4 layers, the model has {layers}"
        )
    found = probed(specimen, "depth-efficiency", erased=1)
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
    for what, values in (("What a layer adds, over the stream's length", added), ("Change at later tokens", future)):
        means = [float(part.mean()) for part in (values[:middle], values[middle:], values[1:middle], values[middle:-1])]
        holds &= means[1] < means[0] and means[3] < means[2]
        told.append(
            f"{what}: {means[0]:.4f} in the first half and {means[1]:.4f} in the second; without layer 0 and layer "
            f"{layers - 1}, {means[2]:.4f} and {means[3]:.4f}"
        )
    first, second = float(current[:middle].mean()), float(current[middle:].mean())
    told.append(
        f"Where it is skipped, a layer of the first half changes predictions by {first:.4f}, of the second {second:.4f}"
    )
    return Result(Verdict.HOLDS if holds else Verdict.DOES_NOT_HOLD, ". ".join(told) + ".", rows)
