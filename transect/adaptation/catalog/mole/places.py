"""Which linear layers of a model are the projections of an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from ....anatomy import Anatomy
from ....errors import TransectError

_HOW = (
    "Name them in the config: reads=, the last parts of the paths of those that read the MLP's input, and writes=, of "
    'those that read what it has computed (reads=["gate_proj", "up_proj"], writes=["down_proj"])'
)


class Projection(NamedTuple):
    """mlp: names the MLP. reads: whether it reads the MLP's input, and not what the others have made of it."""

    mlp: str
    reads: bool


def projections_of(
    model: Any, reads: Sequence[str] | None = None, writes: Sequence[str] | None = None
) -> dict[str, Projection]:
    """Path -> projection, in the model's order, as its architecture says, or as named.

    A gated MLP has three, or two where gate and up are stored as one, and any other two. Blocks whose MLP is itself a
    mixture of experts are left out. TransectError if there are none.
    """
    found = _described(model) if reads is None else _named(model, reads, writes or ())
    if not found:
        raise TransectError(f"the model has no MLP whose projections are known. {_HOW}")
    return found


def _described(model: Any) -> dict[str, Projection]:
    try:
        anatomy = Anatomy(model, weights=False)
    except TransectError as reason:
        raise TransectError(f"it is not known which layers are the projections of an MLP: {reason}. {_HOW}") from None
    found = {}
    for block in anatomy.blocks:
        for role in () if block.has_experts else ("gate", "up", "down"):
            try:
                found[block.matrix(role).path] = Projection(block.path, role != "down")
            except KeyError:  # no gate, or the sublayer was dropped
                continue
    return found


def _named(model: nn.Module, reads: Sequence[str], writes: Sequence[str]) -> dict[str, Projection]:
    """An MLP is what lies at the same path, but for these last parts."""
    ends = {f".{name}": True for name in reads} | {f".{name}": False for name in writes}
    found = {}
    for path, module in model.named_modules():
        end = next((end for end in ends if f".{path}".endswith(end)), None)
        if end is not None and isinstance(getattr(module, "base_layer", module), (nn.Linear, Conv1D)):
            found[path] = Projection(f".{path}".removesuffix(end).removeprefix("."), ends[end])
    return found
