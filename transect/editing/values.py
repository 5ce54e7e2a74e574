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
    searched = torch.arange(rows.requests, device=start.device)
    running = _Losses(specimen, rows, point, layer, search)
    done = torch.zeros(rows.requests, dtype=torch.bool, device=start.device)
    for step in range(search.steps):
        with torch.enable_grad():
            delta = (change * unit)[searched]
            answers, drifts = running.of(delta)
            if step == 0:
                _check_reach(answers, change, point, layer)
            loss = answers + drifts + search.decay * delta.norm(dim=1) / size[searched, 0].square()
            if not search.lowers:
                done[searched] |= loss.detach() < _ENOUGH
            if done.all():
                break
            (change.grad,) = torch.autograd.grad(loss.sum(), change)
        kept = change.detach().clone()
        optimizer.step()
        with torch.no_grad():
            change[done] = kept[done]
            length = (change * unit).norm(dim=1, keepdim=True)
            change *= (search.longest * size / length.clamp_min(1e-30)).clamp_max(1)
        if 2 * int((~done).sum()) <= len(searched):  # the others alone go on
            left = (~done[searched]).nonzero()[:, 0]
            searched, running = searched[left], running.only(left)
    return (change * unit).detach().double(), start


class _Losses:
    """What the answers and the drift of some requests cost under changes of a value; only what is behind them runs.

    said: log-probabilities at the subject alone without a change, of the rows that are ESSENCE; None: not yet known.
    """

    def __init__(
        self, specimen: Specimen, rows: Rows, point: Point, layer: int, search: Search, said: Tensor | None = None
    ) -> None:
        self.specimen, self.whole, self.layer, self.search = specimen, rows, layer, search
        self.point: Point = point
        self.first = min(layer, specimen.layers - 1)  # what leaves the last block is changed where it runs
        self.rows, self.feed = rows.behind(specimen, self.first)
        self.essence = rows.kind == ESSENCE
        self.answers = self.rows.answer_places
        self.places = torch.cat([self.answers.flatten(), self.rows.places[self.essence]])
        self.said = said

    def of(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Means over contexts of the answers' losses, and the weighted divergences (N each) under δ (N x d)."""
        rows, count = self.rows, self.answers.numel()
        changes: dict[tuple[str, int], Any] = {(self.point, self.layer): rows.adding(delta)}
        logits = rows.logits_behind(self.specimen, self.feed, self.first, changes, self.places)
        total = rows.answer_log_probabilities_at(logits[:count].unflatten(0, self.answers.shape))
        answers = rows.in_context(rows.answer_losses(total, self.search.lowers))
        drifts = torch.zeros_like(answers)
        if self.search.drift and self.essence.any():
            drifted = wide(logits[count:]).log_softmax(-1)
            self.said = drifted.detach() if self.said is None else self.said
            apart = torch.nn.functional.kl_div(self.said, drifted, log_target=True, reduction="none").sum(1)
            drifts = drifts.index_add(0, rows.owner[self.essence], self.search.drift * apart.to(drifts))
        return answers, drifts

    def only(self, requests: Tensor) -> _Losses:
        """The same for some of the requests."""
        kept = torch.isin(self.rows.owner[self.essence], requests)
        said = None if self.said is None else self.said[kept]
        return _Losses(self.specimen, self.whole.of(requests), self.point, self.layer, self.search, said)


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
