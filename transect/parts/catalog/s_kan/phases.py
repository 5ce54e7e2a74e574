"""What goes on between the trainings of a model with S-KAN parts: the selection sharpens, then the rest is pruned.

adapt(model, "full", data)                         # 1. all families together
set_temperature(model, 0.3); adapt(...)            # 2. the selection sharpens
prune(model, batches); adapt(...)                  # 3. one family for each node, and what is left is trained on
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ....anatomy.record import record_of
from ....errors import TransectError
from .part import Selectable, SKANPart

Keep = Literal["logits", "energy"]


def selecting(model: nn.Module) -> Iterator[tuple[str, SKANPart, str, Selectable]]:
    """Path and part of each S-KAN part, with name and module of each of its layers that are not pruned."""
    found = False
    for path, part in model.named_modules():
        if isinstance(part, SKANPart):
            for name in part.layers:
                layer = getattr(part, name)
                if layer.counts is None:
                    found = True
                    yield path, part, name, layer
    if not found:
        raise TransectError("the model has no S-KAN part that still selects: put one in its mlp or activation slot")


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Sharpen every selection: s = softmax(a / temperature). From 1 down to about 0.1 in the second phase."""
    if not 0 < temperature < float("inf"):
        raise TransectError(f"temperature={temperature} should be above 0")
    for *_, layer in list(selecting(model)):
        layer.temperature.fill_(temperature)


def entropy(model: nn.Module) -> Tensor:
    """The mean entropy of the nodes' selections in nats: log of the number of families at the start, 0 when decided."""
    shares = [layer.selection() for *_, layer in selecting(model)]
    return torch.stack([-torch.xlogy(s, s).sum(-1).mean() for s in shares]).mean()


def prune(model: Any, batches: Iterable[Any] | None = None) -> Any:
    """Leave each node the one family that matters most; in place, the model.

    batches: inputs of the model, as keyword arguments each. With them what matters is E[Σ_o (s φ_o(x))²], the energy of
    a family in what the node passes on; without them the selection alone, which does not know how large the
    coefficients are.
    """
    each = list(selecting(model))
    scores = [layer.selection().detach() for *_, layer in each] if batches is None else _energies(model, each, batches)
    for (_, part, name, layer), score in zip(each, scores, strict=True):
        setattr(part, name, layer.pruned(score.argmax(dim=1)).train(layer.training))
    for path, part in {path: part for path, part, *_ in each}.items():
        if hasattr(model, "config"):  # of a part alone nothing is recorded
            record_of(model).set_module(path, part.describe())
    return model


@torch.no_grad()
def _energies(model: Any, each: list[tuple[str, SKANPart, str, Selectable]], batches: Iterable[Any]) -> list[Tensor]:
    """E[Σ_o (s φ_o(x))²] of every layer (nodes x families)."""
    totals = [torch.zeros_like(layer.selection()) for *_, layer in each]

    def watch(number: int, layer: Selectable) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for i, (name, basis) in enumerate(layer.bases(inputs[0].detach()).items()):
                totals[number][:, i] += energy(layer, name, basis).to(totals[number])

        return layer.register_forward_pre_hook(add)

    hooks = [watch(number, layer) for number, (*_, layer) in enumerate(each)]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return totals


def energy(layer: Selectable, family: str, basis: Tensor) -> Tensor:
    """Σ over outputs and positions of (s φ)², for each node.

    basis: of the family, times its share (... x nodes x K).
    """
    moments = torch.einsum("tik,til->ikl", *[basis.flatten(0, -3)] * 2)
    c = layer.coefficients[family].to(moments.dtype).reshape(-1, *moments.shape[:2])  # outputs, or 1, x nodes x K
    return torch.einsum("oik,ikl,oil->i", c, moments, c)
