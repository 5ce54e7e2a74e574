"""How steeply a model's answer depends on its embedded text, and how far that text may move before the answer turns."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import torch
from torch import Tensor

from ...data import Specimen
from ...errors import NotApplicable
from ...forward.blocks import feeds_of, run_blocks
from ...parameters import Range
from ..draw import Drawing, Table, scatter
from ..places import wide
from ..registry import probing
from ..result import Quantity, Result

_ABOUT = {
    "margin": ("nats", "how far the most likely next token is above the second"),
    "slope": ("nats", "steepest change of that margin at the text itself, for a move by the text's own length"),
    "steepest": ("nats", "the largest such slope among the samples of the ball"),
    "radius": ("share", "move, as a share of the text's length, below which the answer stays, if that is the steepest"),
}  # fmt: skip


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    rows = [[name, round(float(result[name].median()), 4), about] for name, (_, about) in _ABOUT.items()]
    return [
        scatter(
            "Margin and slope", "A text far to the left and high up turns at a small change of its embedding.",
            {"texts": (result["margin"], result["steepest"])}, xlabel="margin (nats)", ylabel="steepest slope (nats)",
        ),
        Table("Medians over the texts", "Small radius: a small move is enough.", ["figure", "median", "what"], rows),
    ]  # fmt: skip


@probing("local-lipschitz", title="Local Lipschitz constants", paper="arXiv:2503.20454", draw=draw)
def local_lipschitz(
    specimen: Specimen,
    *,
    texts: Annotated[int, Range(1, 100_000)] = 16,
    length: Annotated[int, Range(2, 100_000)] = 128,
    ball: Annotated[float, Range(0, 1, above=True)] = 0.05,
    samples: Annotated[int, Range(0, 10_000)] = 15,
) -> Result:
    """How steeply the next token's margin depends on the embedded text nearby, and what change it stands at least.

    E (T x d) is what enters the first block, and g(E) the logit of the most likely token behind the last position over
    that of the second. ‖∇g‖ is taken at E and at random points of the ball of radius ball ‖E‖ around it, uniform in
    direction and distance; the largest is a lower bound of the Lipschitz constant L there. Where it is L, no move
    shorter than min(g / L, ball ‖E‖) lets the second token overtake the first (as CLEVER, Weng et al. 2018,
    arXiv:1801.10578). All lengths are in units of ‖E‖. TSCNC is about such constants of pruned networks.
    Time: samples + 1 passes over a text, forward and back. Padding is left out.

    texts: how many texts to look at, from the first on.
    length: tokens of their beginnings that are looked at.
    ball: its radius, as a share of ‖E‖ (Frobenius).
    samples: random points of the ball of each text.
    """
    specimen.require_causal()
    generator = torch.Generator().manual_seed(specimen.seed)
    rows = [row[:length] for row in islice((row for row in specimen.text.texts() if len(row) > 1), texts)]
    if not rows:
        raise NotApplicable("it needs texts of two tokens or more")
    found = torch.stack([_measured(specimen, row, ball, samples, generator) for row in specimen.shown(rows, "slopes")])
    quantities = {
        name: Quantity(column, ("text",), *_ABOUT[name]) for name, column in zip(_ABOUT, found.T, strict=True)
    }
    radius, rise = found[:, 3].median(), (found[:, 2] / found[:, 1]).median()
    findings = [
        f"Half of {len(rows)} texts keep their next token under any move of their embedding by up to "
        f"{float(radius):.2%} of its length, by the steepest slope that was seen within {ball:.0%}. That is "
        f"{float(rise):.2f} times the slope at the text itself, at the median."
    ]
    caveats = [
        "The steepest slope of some samples is a lower bound: an attack may find steeper ones, so the radius is an "
        "estimate and no certificate. Moves of embeddings need not be those of any other text.",
    ]
    return Result(quantities, findings, caveats)


def _measured(specimen: Specimen, ids: Tensor, ball: float, samples: int, generator: torch.Generator) -> Tensor:
    """The figures of `_ABOUT` for one text (4), float64."""
    (feed,) = feeds_of(specimen.anatomy, [{"input_ids": ids[None]}])
    centre = wide(feed.hidden)  # (1, T, d)
    length = centre.norm()
    away = torch.randn(samples, *centre.shape[1:], generator=generator).to(centre)
    share = torch.rand(samples, generator=generator).to(centre)[:, None, None]
    away = ball * length * share * away / away.flatten(1).norm(dim=1)[:, None, None]
    points = torch.cat([centre, centre + away]).to(feed.hidden.dtype)
    margins, slopes, best = [], [], None
    for point in points:
        state = point[None].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = wide(specimen.lens(run_blocks(specimen.anatomy, feed, 0, state)[:, -1]))[0]
            best = logits.topk(2).indices if best is None else best  # at the text itself
            margin = logits[best[0]] - logits[best[1]]
            (gradient,) = torch.autograd.grad(margin, state)
        margins.append(float(margin.detach()))
        slopes.append(float(wide(gradient).norm() * length))
    steepest = max(slopes)
    radius = min(margins[0] / steepest, ball) if steepest > 0 else ball
    return torch.tensor([margins[0], slopes[0], steepest, radius], dtype=torch.float64)
