"""Numbers of a sequence's real positions, from its first, whichever call they come in."""

from __future__ import annotations

import torch
from torch import Tensor

from .part import Inside


def numbered(x: Tensor, inside: Inside) -> tuple[Tensor, Tensor]:
    """Which positions of this call are real (B x N), and the number of each in its sequence, from 0, without padding.

    x: the stream (B x N x d). How many a sequence had before is kept in the state, where there is one.
    """
    real = inside.real()
    if real is None:
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    number = real.long().cumsum(1) - 1
    if inside.state is not None:
        before = inside.state.get("count")
        if before is not None:
            number = number + before[:, None]
        inside.state["count"] = real.sum(1) if before is None else before + real.sum(1)
    return real, number


def settled(inside: Inside) -> Tensor | None:
    """Which sequences run the block from here on (B); None while one of them is in its beginning, see `settle`."""
    return None if inside.state is None else inside.state.get("runs")


def settle(inside: Inside, decided: Tensor, runs: Tensor) -> None:
    """Note which sequences run the block (B), once all have decided (B), for the calls to come."""
    if inside.state is not None and bool(decided.all()):
        inside.state["runs"] = runs


def targets_in(x: Tensor, inside: Inside, targets: int) -> tuple[Tensor, Tensor]:
    """Real positions (B x N), and which of them are among the first `targets` of a sequence that has these in full.

    They are chosen among together, so all have to come in the first call; a sequence that begins shorter has none.
    """
    real, number = numbered(x, inside)
    if inside.past:
        return real, torch.zeros_like(real)
    return real, real & (number < targets) & (number[:, -1:] >= targets)


def largest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Which `count` positions of each sequence have the largest scores, of equal ones the first (B x N).

    scores: (B x N). among: (B x N), the only ones that count.
    """
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(among).scatter(1, order, True) & among
