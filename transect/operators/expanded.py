"""Operators that store few numbers and compute with a dense form of them, which is made once and kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Operator


class Expanded(Operator):
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
        # Writes in place are counted; wide arithmetic for a while (`computing_wide`) shows in the dtype alone.
        made_of = [(t, (0 if t.is_inference() else t._version, t.dtype)) for t in self.sources]
        kept = self.__dict__.get("_form")
        if kept is not None and all(t is u and v == w for (t, v), (u, w) in zip(made_of, kept[0], strict=True)):
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():
            form = self.form()
        self.__dict__["_form"] = made_of, form
        return form

    def _apply(self, *args: Any, **kwargs: Any) -> Expanded:  # every move and every cast comes here
        self.__dict__.pop("_form", None)
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Expanded:
        self.__dict__.pop("_form", None)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:  # for copies
        return {name: value for name, value in self.__dict__.items() if name != "_form"}
