"""Watching a forward pass: activations by point and layer, from the user's own model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..anatomy import Anatomy
from .points import Point, Reader, eager_attention, place


@dataclass
class Seen:
    """Activations of one forward pass, on the model's device, without gradients.

    ids: B x T token ids, or None for images. mask: B x T, True where a position counts, or None for all.
    logits: B x T x V, where they were asked for. The points: `seen.residual[l]` and so on, see `points`; a layer that
    has no such point is absent.
    """

    residual: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    neurons: dict[int, Tensor] = field(default_factory=dict)
    up: dict[int, Tensor] = field(default_factory=dict)
    gate: dict[int, Tensor] = field(default_factory=dict)
    down: dict[int, Tensor] = field(default_factory=dict)
    q: dict[int, Tensor] = field(default_factory=dict)
    k: dict[int, Tensor] = field(default_factory=dict)
    v: dict[int, Tensor] = field(default_factory=dict)
    o: dict[int, Tensor] = field(default_factory=dict)
    patterns: dict[int, Tensor] = field(default_factory=dict)
    ids: Tensor | None = None
    mask: Tensor | None = None
    logits: Tensor | None = None


@contextmanager
def watch(
    anatomy: Anatomy,
    points: Iterable[Point],
    layers: Iterable[int] | None = None,
    keep_graph: bool = False,
    instead: Mapping[Point, Callable[[Tensor], Any]] | None = None,
) -> Iterator[Seen]:
    """Record the points of every forward pass inside the `with`; a later pass overwrites an earlier one.

    layers: only these (counted as in `points`). Default: all. keep_graph: leave the tensors in autograd's graph.
    instead: what is kept of a point's tensors in their place. The attention weights of all layers are many times as
    large as everything else in a pass over long sequences.
    Inside `changed`, open this second: then it sees what the changes made. The hooks go also after an error.

        with torch.no_grad(), watch(anatomy, ["residual", "mlp"]) as seen:
            model(ids)
        seen.mlp[3]
    """
    seen = Seen()
    points = list(dict.fromkeys(points))
    count = len(anatomy.block_list)
    wanted = None if layers is None else list(layers)
    with ExitStack() as stack:
        if "patterns" in points:
            stack.enter_context(eager_attention(anatomy.model))
        for point in points:
            made = (instead or {}).get(point)
            every = range(count + 1) if point == "residual" else range(count)
            for layer in every if wanted is None else wanted:
                where = place(anatomy, point, layer)
                if where is None:
                    continue

                def keep(
                    tensor: Tensor,
                    into: dict[int, Any] = getattr(seen, point),
                    layer: int = layer,
                    made: Callable[[Tensor], Any] | None = made,
                ) -> None:
                    tensor = tensor if keep_graph else tensor.detach()
                    into[layer] = tensor if made is None else made(tensor)

                stack.callback(Reader(where, keep).remove)
        yield seen
