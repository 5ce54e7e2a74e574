"""Operators that store few numbers and compute with a dense form of them, which is made once and kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Operator
from .remade import Remade


class Expanded(Remade, Operator):
    """y = Ŵx + b, computed with a form of Ŵ that is made of the tensors in `sources`.

    The form is made at the first call that needs no gradient of it and kept until one of these tensors changes, moves
    or is trained. It is neither stored nor copied nor counted.
    """

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What Ŵ is made of; the trained numbers first."""
        raise NotImplementedError

    def form(self) -> Tensor:
        """Ŵ as the forward pass multiplies by it."""
        return self.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and (self.sources[0].requires_grad or x.requires_grad)
        if needs_gradient or torch.compiler.is_compiling():  # nothing can be kept from call to call
            return nn.functional.linear(x, self.to_dense(), self.bias)
        return nn.functional.linear(x, self._ready(), self.bias)

    def _ready(self) -> Tensor:
        """The form, made anew only if what it is made of has changed."""
        return self.remade(self.sources, self.form)
