"""How gradients move weights from code to code: to neighbours only, or by soft assignment (part 3 of the paper)."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from .coding import Coding

Surrogate = Literal["proximal", "soft"]

_TEMPERATURE = 4.0


class Assignment(Protocol):
    """indices: the code of each weight (d_out x d_in)."""

    indices: Tensor

    def move(self, wanted: Tensor) -> None:
        """Follow a step of gradient descent (d_out x d_in), in gaps between codes."""
        ...


class Proximal:
    """The paper's: a weight moves along the codes, and passes from one to the next; never farther in a step.

    latent: where each weight is, as a number whose nearest integer is its code (d_out x d_in). So the latent weights
    move with the codes, and are clipped to the neighbours of the codes that they had.
    """

    def __init__(self, weight: Tensor, coding: Coding) -> None:
        self.indices, self._last = coding.indices, coding.codes.shape[1] - 1
        self.latent = places(weight, coding)

    def move(self, wanted: Tensor) -> None:
        here = self.indices.to(wanted)
        self.latent = (self.latent + wanted).clamp_(here - 1, here + 1).clamp_(0, self._last)
        self.indices = self.latent.round().long()


class Soft:
    """What the paper compares itself with: softmax over minus the squared distance to each code, over a temperature.

    The weight has the likeliest code. Following the gradient of the expected one, the probabilities of all codes on one
    side rise together, and a weight may jump. The temperature, 4 squared gaps, is the best of those that we tried; how
    the paper sets it is not known to us. It holds K numbers for each weight.
    """

    def __init__(self, weight: Tensor, coding: Coding) -> None:
        self.indices = coding.indices
        self._numbers = torch.arange(coding.codes.shape[1]).to(weight)
        self._logits = -(places(weight, coding)[..., None] - self._numbers).square() / _TEMPERATURE

    def move(self, wanted: Tensor) -> None:
        shares = self._logits.softmax(-1)
        away = self._numbers - (shares @ self._numbers)[..., None]
        self._logits += wanted[..., None] * shares * away
        self.indices = self._logits.argmax(-1)


def places(weight: Tensor, coding: Coding) -> Tensor:
    """Each entry of W (d_out x d_in) between its code's number and half-way to the next one's."""
    rows, k, last = coding.table[coding.labels], coding.indices, coding.codes.shape[1] - 1
    code = rows.gather(1, k)
    off = weight - code
    neighbour = torch.where(off > 0, k + 1, k - 1).clamp_(0, last)
    gap = (rows.gather(1, neighbour) - code).abs()
    share = torch.where(gap > 0, off / gap, 0).clamp_(-0.499, 0.499)  # half-way itself could round to the next
    return (k + share).clamp_(0, last)
