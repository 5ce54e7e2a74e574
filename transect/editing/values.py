"""What the model would have to compute at the subject so that it gives the wanted answer, found by gradient descent.

Source: Meng et al., arXiv:2202.05262, section 3.1 (ROME), and arXiv:2210.07229 (MEMIT), with the released code's loss.

The steps are taken here and not by `transect.training`, since nothing of the model is trained: one vector a fact, each
of which is held within a ball and stops by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Specimen
from ..errors import NotApplicable
from ..forward import Point
from .contexts import ESSENCE, Rows, wide

_ENOUGH = 0.05  # the loss at which a value is good enough
_POSITIONS = 4096  # in one pass, whose activations are kept for its gradients


@dataclass(frozen=True)
class Search:
    """How values are searched.

    steps: of Adam. rate: of Adam, in root mean squares of m₀'s entries. drift: weight of the KL divergence, edited from
    original, at the subject alone. decay: weight of ||δ|| / ||m₀||². longest: ||δ|| / ||m₀|| at most. lowers: whether
    the answer is to become improbable.
    """

    steps: int
    rate: float
    drift: float
    decay: float
    longest: float
    lowers: bool


def values(specimen: Specimen, rows: Rows, point: Point, layer: int, search: Search) -> tuple[Tensor, Tensor]:
    """δ (N x d, float64) to add at the edit tokens to an activation, and what that is before (m₀, N x d), by request.

    rows: with the subjects alone where `search.drift` is not 0. m₀: mean over a request's bare prompts.
    The loss of a request is the mean over its contexts of the answer's negative log-probability a token (or of its
    probability, to lower it), plus drift · KL(p_δ || p₀) at the subject alone, plus decay · ||δ|| / ||m₀||².
    """
    found = [_values(specimen, part, point, layer, search) for part in rows.parts(_POSITIONS)]
    changes, starts = zip(*found, strict=True)
    return torch.cat(changes), torch.cat(starts)


def _values(specimen: Specimen, rows: Rows, point: Point, layer: int, search: Search) -> tuple[Tensor, Tensor]:
    (activation,) = rows.at_edit(specimen, [(point, layer)])
    start = rows.bare(activation)
    dtype = torch.float64 if next(specimen.model.parameters()).dtype == torch.float64 else torch.float32
    size = start.norm(dim=1, keepdim=True).to(dtype)
    unit = size / start.shape[1] ** 0.5
    # δ in units of m₀'s entries, since Adam's steps do not depend on the size of its gradients
    change = torch.zeros(start.shape, dtype=dtype, device=start.device, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=search.rate)
    first = min(layer, specimen.layers - 1)  # what leaves the last block is changed where it runs
    rows, feed = rows.behind(specimen, first)
    essence = rows.kind == ESSENCE
    answers = rows.answer_places
    places = torch.cat([answers.flatten(), rows.places[essence]])
    before: Tensor | None = None
    done = torch.zeros(rows.requests, dtype=torch.bool, device=start.device)
    changes: dict[tuple[str, int], Any] = {}
    for step in range(search.steps):
        with torch.enable_grad():
            delta = change * unit
            changes[(point, layer)] = rows.adding(delta)
            logits = rows.logits_behind(specimen, feed, first, changes, places)
            said, alone = logits[: answers.numel()].unflatten(0, answers.shape), logits[answers.numel() :]
            loss = rows.in_context(rows.answer_losses(rows.answer_log_probabilities_at(said), search.lowers))
            if step == 0:
                _check_reach(loss, change, point, layer)
            if search.drift and essence.any():
                drifted = wide(alone).log_softmax(-1)
                before = drifted.detach() if before is None else before
                apart = torch.nn.functional.kl_div(before, drifted, log_target=True, reduction="none").sum(1)
                loss = loss.index_add(0, rows.owner[essence], search.drift * apart.to(loss))
            loss = loss + search.decay * delta.norm(dim=1) / size[:, 0].square()
            if not search.lowers:
                done = done | (loss.detach() < _ENOUGH)
            if done.all():
                break
            (change.grad,) = torch.autograd.grad(loss.sum(), change)
        kept = change.detach().clone()
        optimizer.step()
        with torch.no_grad():
            change[done] = kept[done]
            length = (change * unit).norm(dim=1, keepdim=True)
            change *= (search.longest * size / length.clamp_min(1e-30)).clamp_max(1)
    return (change * unit).detach().double(), start


def _check_reach(loss: Tensor, change: Tensor, point: Point, layer: int) -> None:
    """NotApplicable where no answer depends on the value: the search would follow the rounding of its other terms.

    So it is in the last layer, unless the prompt ends with the subject: what is written there reaches no later token.
    """
    (gradient,) = torch.autograd.grad(loss.sum(), change, retain_graph=True)
    if not gradient.any():
        raise NotApplicable(
            f"no answer depends on {point} {layer} at the subject's last token, so nothing can be written there (what "
            "the last layer adds reaches no later token); choose an earlier layer"
        )
