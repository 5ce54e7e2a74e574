"""The points of a forward pass that can be watched or changed, by name and layer, in every architecture.

| point | layer | shape | what it is |
| :--- | :--- | :--- | :--- |
| `residual` | 0 ... L | B x T x d | what block l reads; L is what the last block leaves, before the final norm |
| `attention` | 0 ... L-1 | B x T x d | what attention adds to the residual stream, after its own norm if it has one |
| `mlp` | 0 ... L-1 | B x T x d | what the MLP adds |
| `heads` | 0 ... L-1 | B x T x (H d_h) | outputs of the heads, side by side: what o reads |
| `neurons` | 0 ... L-1 | B x T x n | what down reads: act(up x), or act(gate x) * up x |
| `down` | 0 ... L-1 | B x T x d | output of the matrix down, before a norm of its own: else the same as `mlp` |
| `o` | 0 ... L-1 | B x T x d | output of the matrix o, before a norm of its own |
| `up`, `gate` | 0 ... L-1 | B x T x n | outputs of these matrices, before the activation |
| `q`, `k`, `v` | 0 ... L-1 | B x T x rows | outputs of these matrices, before norms and rotation |
| `patterns` | 0 ... L-1 | B x H x T x T | attention weights, queries by keys; can be watched, not changed |

Blocks are counted from 0. A layer whose sublayer was dropped has no such point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..anatomy import Anatomy, Block
from ..errors import NotApplicable, TransectError

Point = Literal[
    "residual", "attention", "mlp", "heads", "neurons", "up", "gate", "down", "q", "k", "v", "o", "patterns"
]
POINTS: tuple[Point, ...] = (
    "residual", "attention", "mlp", "heads", "neurons", "up", "gate", "down", "q", "k", "v", "o", "patterns",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a point is: what goes into a module (`before`) or comes out of it.

    rows: the part of the module's output, where it is stored with others. index: of the tensor in a tuple. block: the
    block around it; some models (OPT) flatten batch and positions inside. scale: what the model multiplies the tensor
    by before it is what the point's table says.
    """

    module: nn.Module
    before: bool = False
    rows: Tensor | slice | None = None
    index: int = 0
    block: nn.Module | None = None
    scale: float = 1.0


def place(anatomy: Anatomy, point: str, layer: int) -> Place | None:
    """Where a point is, or None where that sublayer was dropped or has no such matrix.

    Raises TransectError for an unknown point or layer, and NotApplicable where the architecture has no such point:
    in a post-norm model, what a sublayer adds is not what enters the stream.
    """
    layers = len(anatomy.block_list)
    if point not in POINTS:
        raise TransectError(f"unknown point {point!r}; known: {', '.join(POINTS)}")
    last = layers if point == "residual" else layers - 1
    if not 0 <= layer <= last:
        raise TransectError(f"{point} {layer} does not exist: the model has {point} 0 to {last}")
    if point == "residual":
        if layer < layers:
            return Place(anatomy.block_list[layer], before=True)
        norm = anatomy.final_norm
        return Place(anatomy.block_list[layers - 1]) if norm is None else Place(norm, before=True)
    block = anatomy.blocks[layer]
    if point == "patterns":
        if block.attention is None:
            return None
        if anatomy.architecture.attention_returns < 2:
            raise NotApplicable(f"the attention of {type(anatomy.model).__name__} does not return its weights")
        return Place(block.module.get_submodule(anatomy.architecture.attention), index=1)
    if point in ("attention", "mlp"):
        refuse_post_norm(block)
        branch = block.branch_output(point)
        return None if branch is None else Place(branch, block=block.module, scale=block.residual_multiplier)
    try:
        if point in ("heads", "neurons"):
            return Place(block.matrix("o" if point == "heads" else "down").host, before=True, block=block.module)
        matrix = block.matrix(point)
    except KeyError:
        return None
    return Place(matrix.host, rows=matrix.rows(), block=block.module)


def refuse_post_norm(block: Block) -> None:
    """Raise NotApplicable where norms stand after the residual sum."""
    if block.post_norm:
        raise NotApplicable(
            f"{type(block.model).__name__} normalises after the residual sum, so no single sublayer's contribution "
            "enters the residual stream as it is"
        )


class Reader:
    """Calls a function on the tensor at a place in every forward pass, until `remove`.

    apply: a tensor that it returns takes the place of what it was given; None leaves it.
    """

    def __init__(self, place: Place, apply: Callable[[Tensor], Tensor | None]) -> None:
        self.place, self.apply = place, apply
        self.leading: tuple[int, ...] = ()  # batch and positions
        self.handles = []
        if place.block is not None:
            self.handles.append(place.block.register_forward_pre_hook(self._note_shape, with_kwargs=True))
        if place.before:
            self.handles.append(place.module.register_forward_pre_hook(self._before, with_kwargs=True))
        else:
            self.handles.append(place.module.register_forward_hook(self._after))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _note_shape(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        self.leading = tuple(stream.shape[:-1])

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = self._replaced(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            new = self._replaced(output)
            # What was only looked at is handed on as a copy: some models (Falcon) add to it in place.
            return output.clone() if new is None else new
        new = self._replaced(output[self.place.index])
        return None if new is None else (*output[: self.place.index], new, *output[self.place.index + 1 :])

    def _replaced(self, tensor: Tensor | None) -> Tensor | None:
        """What takes the tensor's place; None if nothing does."""
        if tensor is None:
            raise TransectError("the model does not return its attention weights; load it with eager attention")
        rows = self.place.rows
        scale = self.place.scale
        part = tensor if rows is None else tensor[..., rows]
        part = part if scale == 1 else part * scale
        flat = self.place.block is not None and part.dim() == 2 and len(self.leading) == 2
        new = self.apply(part.unflatten(0, self.leading) if flat else part)
        if new is None:
            return None
        new = new if scale == 1 else new / scale
        if flat:
            new = new.flatten(0, 1)
        if rows is None:
            return new.contiguous()  # some modules view what they are given
        whole = tensor.clone()
        whole[..., rows] = new
        return whole


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Let the model compute attention in the plain way, which is the only one that shows its weights."""
    present = model.config._attn_implementation
    if present == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(present)
