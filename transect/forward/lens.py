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
        if anatomy.architecture.head_transform:
            raise NotApplicable(
                f"the head of {type(model).__name__} transforms what the final norm gives, then unembeds"
            )
        width = anatomy.config_value("hidden")
        self.head: Any = head
        if self.head.weight.shape[1] != width:
            raise NotApplicable(
                f"the head of {type(model).__name__} reads {self.head.weight.shape[1]} numbers, and the residual "
                f"stream has {width}: it projects in between"
            )
        self.norm: Any = anatomy.final_norm
        multiplier, divisor, softcap = (
            None if key is None else getattr(anatomy.config, key)
            for key in map(anatomy.architecture.logits.get, ("multiplier", "divisor", "softcap"))
        )
        self.multiplier = (1.0 if multiplier is None else multiplier) / (1.0 if divisor is None else divisor)
        self.softcap: float | None = softcap

    @property
    def weight(self) -> Tensor:
        """W_U (V x d), detached: times what the model multiplies its logits by."""
        weight = self.head.weight.detach()
        return weight if self.multiplier == 1 else self.multiplier * weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the unembedding (V), detached, or None: times what the model multiplies its logits by."""
        bias = getattr(self.head, "bias", None)
        return None if bias is None else self.multiplier * bias.detach()

    def __call__(self, residual: Tensor) -> Tensor:
        """Logits (... x V) of a state (... x d) of the residual stream, before the final norm."""
        return self.unembed(residual if self.norm is None else self.norm(residual))

    def unembed(self, normed: Tensor) -> Tensor:
        """Logits of a state behind the final norm."""
        logits = self.head(normed)
        logits = logits if self.multiplier == 1 else self.multiplier * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def gain(self) -> Tensor:
        """What the final norm multiplies each coordinate by (d), once it has normalised."""
        if self.norm is None:
            return torch.ones_like(self.head.weight[0])
        return norm_gain(self.norm)

    @property
    def centres(self) -> bool:
        """Whether the final norm subtracts the mean (LayerNorm) or not (RMSNorm)."""
        return norm_centres(self.norm)


@torch.no_grad()
def norm_gain(norm: Any) -> Tensor:
    """The elementwise gain (d) of a LayerNorm or RMSNorm, measured, so that a norm that stores 1 + g is right too.

    One number where the norm has no gain and fits every width.
    """
    probe = _probe(norm)
    out = norm.forward(probe)  # not a call: whoever watches the norm is not to see this
    out = out if getattr(norm, "bias", None) is None else out - norm.bias
    gain = out / probe * probe.square().mean(-1, keepdim=True).sqrt()
    return gain if hasattr(norm, "weight") or hasattr(norm, "normalized_shape") else gain[:1]


@torch.no_grad()
def norm_centres(norm: Any) -> bool:
    """Whether a norm subtracts the mean, measured, since not every class that does is PyTorch's (Cohere, OLMo)."""
    if norm is None or isinstance(norm, torch.nn.LayerNorm):
        return norm is not None
    probe = _probe(norm)
    moved = norm.forward(probe + 256) - norm.forward(probe)
    return bool(moved.abs().max() < 0.1 * norm.forward(probe).abs().max())


def _probe(norm: Any) -> Tensor:
    """A vector of mean 0 that a norm can take, so large that the norm's epsilon does not matter."""
    weight = getattr(norm, "weight", None)
    like = torch.empty(getattr(norm, "normalized_shape", (2,))) if weight is None else weight
    probe = torch.full_like(like, 256)
    probe[..., ::2] = -256
    return probe - probe.mean(-1, keepdim=True)
