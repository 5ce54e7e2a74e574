"""The logit lens: what a state of the residual stream would say if the model stopped there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..errors import NotApplicable
from .objective import task_of


class Lens:
    """The final norm and the unembedding of a causal language model.

    Raises NotApplicable for a model that has no language-model head, or one that reads another width than the stream.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        model, head = anatomy.model, anatomy.unembedding
        if head is None or task_of(model) != "causal":
            raise NotApplicable(
                f"{type(model).__name__} does not predict a next token: there is nothing to unembed with"
            )
        width = anatomy.config_value("hidden")
        self.head: Any = head
        if self.head.weight.shape[1] != width:
            raise NotApplicable(
                f"the head of {type(model).__name__} reads {self.head.weight.shape[1]} numbers, and the residual "
                f"stream has {width}: it projects in between"
            )
        self.norm: Any = anatomy.final_norm
        self.softcap = getattr(anatomy.config, "final_logit_softcapping", None)

    @property
    def weight(self) -> Tensor:
        """W_U (V x d), detached."""
        return self.head.weight.detach()

    def __call__(self, residual: Tensor) -> Tensor:
        """Logits (... x V) of a state (... x d) of the residual stream, before the final norm."""
        return self.unembed(residual if self.norm is None else self.norm(residual))

    def unembed(self, normed: Tensor) -> Tensor:
        """Logits of a state behind the final norm."""
        logits = self.head(normed)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def gain(self) -> Tensor:
        """What the final norm multiplies each coordinate by (d), once it has normalised."""
        if self.norm is None:
            return torch.ones_like(self.weight[0])
        return norm_gain(self.norm)

    @property
    def centres(self) -> bool:
        """Whether the final norm subtracts the mean (LayerNorm) or not (RMSNorm)."""
        return isinstance(self.norm, torch.nn.LayerNorm)


@torch.no_grad()
def norm_gain(norm: Any) -> Tensor:
    """The elementwise gain (d) of a LayerNorm or RMSNorm, measured, so that a norm that stores 1 + g is right too."""
    probe = torch.full_like(norm.weight, 256)  # large, so that the norm's epsilon does not matter
    probe[::2] = -256
    if isinstance(norm, torch.nn.LayerNorm):
        probe -= probe.mean()
    out = norm(probe) if getattr(norm, "bias", None) is None else norm(probe) - norm.bias
    return out / probe * probe.square().mean().sqrt()
