"""The user's own model as a super-network: every smaller one is a slice of it, and all run as one mixture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ..forward import Batch, at_rest
from ..training import Machine, own_loss
from .entangle import mixed
from .space import Axis, Space, Weights, norms_of

Mixing = Literal["weights", "outputs"]
Norm = Literal["choice", "full"]


class _Losing(nn.Module):
    """The model and its loss as one module, so that torch can run it with other numbers in place of its parameters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        return own_loss(self.model, batch)


class SuperNetwork:
    """Runs the model with mixed weights. It has no numbers of its own.

    mixing: of an MLP, `weights` mixes the matrices on both sides of the hidden units, as the paper does; `outputs` only
    the one behind them, which gives Σ_c β_c MLP_c(x) exactly, for no more work. Of attention the outputs are mixed in
    either case.
    norm: over a narrower stream, `choice` normalises over each width and mixes what comes out; `full` mixes the norm's
    weights and normalises over the full width, as the paper does, where zeros count.
    """

    def __init__(self, space: Space, mixing: Mixing = "weights", norm: Norm = "choice") -> None:
        self.space, self.norm = space, norm
        self.roles = {"mixed", *(["hidden unit"] if mixing == "weights" else []), *(["norm"] if norm == "full" else [])}
        self._losing = _Losing(space.anatomy.model)

    def mixed(self, weights: Weights) -> dict[str, Tensor]:
        """The mixed parameters, by name; those that no axis touches are left out."""
        parameters = dict(self.space.anatomy.model.named_parameters())
        found = {}
        for name, spans in self.space.spans.items():
            used = [span for span in spans if span.role in self.roles]
            if used:
                axes = [(weights[span.axis], {span.dim: span.levels}) for span in used]
                found[name] = mixed(parameters[name], axes)
        return found

    def loss(self, weights: Weights, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss of the mixture on a batch and how many predictions it has; with gradients."""
        weights = {name: beta.to(self.space.anatomy.model.device) for name, beta in weights.items()}
        tensors = {f"model.{name}": tensor for name, tensor in self.mixed(weights).items()}
        with self._mixing(weights):
            return functional_call(self._losing, tensors, (batch,))

    @torch.no_grad()
    def loss_on(self, weights: Weights, batches: Iterable[Batch | None], machine: Machine) -> float:
        """Mean loss of a prediction, over all processes' shares."""
        summed = torch.zeros(2, dtype=torch.float64)
        with at_rest(self.space.anatomy.model):
            for batch in batches:
                if batch is not None:
                    loss, count = self.loss(weights, batch)
                    summed += torch.tensor([loss.item(), count], dtype=torch.float64)
        loss, count = machine.total(summed).tolist()
        return loss / count if count else float("nan")

    @contextmanager
    def _mixing(self, weights: Weights) -> Iterator[None]:
        """Inside the `with`, depth and norms are mixed."""
        anatomy, axes = self.space.anatomy, self.space.axes
        with ExitStack() as stack:
            if "depth" in axes:
                for handle in _mix_depth(list(anatomy.block_list), axes["depth"], weights["depth"]):
                    stack.callback(handle.remove)
            if "hidden" in axes and self.norm == "choice":
                for norm in norms_of(anatomy):
                    stack.callback(_mix_norm(norm, axes["hidden"].choices, weights["hidden"]).remove)
            yield


def _mix_depth(blocks: Sequence[nn.Module], axis: Axis, beta: Tensor) -> list[Any]:
    """Hooks by which the last block returns Σ_c β_c x_c, of the stream behind c blocks."""
    streams: list[Tensor] = []

    def behind(module: nn.Module, args: Any, output: Any) -> Any:
        stream, *rest = output if isinstance(output, tuple) else (output,)
        streams.append(stream)
        if len(streams) < len(blocks):
            return None
        parts = [b.to(stream.dtype) * streams[c - 1] for b, c in zip(beta, axis.choices, strict=True)]
        streams.clear()
        mixture = torch.stack(parts).sum(0)
        return (mixture, *rest) if isinstance(output, tuple) else mixture

    return [block.register_forward_hook(behind) for block in blocks]


def _mix_norm(norm: nn.Module, choices: Sequence[int], beta: Tensor) -> Any:
    """A hook by which the norm returns Σ_c β_c norm_c(x), of the first c entries, with zeros behind them."""
    inside = False

    def narrowed(module: Any, x: Tensor, size: int) -> Tensor:
        parameters = {name: parameter[:size] for name, parameter in module.named_parameters()}
        if isinstance(module, nn.LayerNorm):
            return functional.layer_norm(x, (size,), parameters.get("weight"), parameters.get("bias"), module.eps)
        return functional_call(module, parameters, (x,))

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal inside
        if inside:  # one of those below
            return None
        inside, x = True, args[0]
        parts = [
            functional.pad(b.to(x.dtype) * narrowed(module, x[..., :size], size), (0, x.shape[-1] - size))
            for b, size in zip(beta, choices, strict=True)
        ]
        inside = False
        return torch.stack(parts).sum(0)

    return norm.register_forward_hook(hook)
