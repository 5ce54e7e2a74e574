"""Layers that a token does not use, by how they change the length of its state (L2 Adaptive Computation).

Shemiranifar 2025 (arXiv:2505.14467). With n_l the length of a token's state after l layers and D_l = n_l - n_{l-1},
layer l is active where D_l >= theta_l, else void, and theta_l = alpha * (spread of D_j over j < l), 0 for the first
layer. With one earlier value the spread is 0 too, so the first two layers are compared with 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ....forward.change import Change
from ...places import wide

Spread = Literal["range", "middle"]


def threshold(earlier: Sequence[Tensor] | Tensor, alpha: float, spread: Spread) -> Tensor | float:
    """theta (...) of the next layer from the changes of length of the l layers before it.

    spread: largest minus smallest ("range", the paper's), or the distance of the 10 % and 90 % quantiles
        ("middle", ours).
    """
    if len(earlier) < 2:
        return 0.0
    changes = earlier if isinstance(earlier, Tensor) else torch.stack(list(earlier))
    if spread == "range":
        return alpha * (changes.amax(0) - changes.amin(0))
    low, high = changes.quantile(torch.tensor([0.1, 0.9]).to(changes), dim=0)
    return alpha * (high - low)


def activity(norms: Tensor, alpha: float, spread: Spread = "range") -> Tensor:
    """Which layers are active for which tokens (L x ..., True for active), from norms (L + 1 x ...)."""
    changes = norms.diff(dim=0)
    return torch.stack([one >= threshold(changes[:layer], alpha, spread) for layer, one in enumerate(changes)])


def norms_of(residual: Mapping[int, Tensor]) -> Tensor:
    """Lengths of the states (L + 1 x B x T) in float32 or wider."""
    return torch.stack([wide(residual[layer]).norm(dim=-1) for layer in sorted(residual)])


def last_active(residual: Mapping[int, Tensor], active: Tensor) -> Tensor:
    """Each token's state behind its last active layer (B x T x d); what the first layer read, where none is active."""
    state = residual[0]
    for layer, on in enumerate(active):
        state = torch.where(on[..., None], residual[layer + 1], state)
    return state


class Skipping:
    """Changes under which a token passes its void layers unchanged: s_l = s_{l-1}.

    A void is decided on the stream that the voids before it left, or is fixed beforehand. Keys and values of a void
    token come from the state that was passed on. Every layer is still computed; nothing is saved.

    alpha, spread: as in `activity`. fixed: L x B x T, True for active, instead of them.
    active: of the latest forward pass (L entries, B x T each).
    """

    def __init__(
        self, layers: int, alpha: float = 0.0, spread: Spread = "range", fixed: Sequence[Tensor] | Tensor | None = None
    ) -> None:
        self.alpha, self.fixed = alpha, fixed
        self.spread: Spread = spread
        self.active: list[Tensor] = []
        self.changes: dict[tuple[str, int], Change] = {("residual", 0): self._begin}
        self.changes |= {("residual", layer): self._pass for layer in range(1, layers + 1)}

    def _begin(self, state: Tensor) -> Tensor:
        self._state, self._norm = state, wide(state).norm(dim=-1)
        self._steps: list[Tensor] = []
        self.active = []
        return state

    def _pass(self, state: Tensor) -> Tensor:
        norm = wide(state).norm(dim=-1)
        if self.fixed is None:
            step = norm - self._norm
            on = step >= threshold(self._steps, self.alpha, self.spread)
            self._steps.append(step)
        else:
            on = self.fixed[len(self.active)]
        self.active.append(on)
        self._state = torch.where(on[..., None], state, self._state)
        self._norm = torch.where(on, norm, self._norm)
        return self._state
