"""Running a model's blocks one by one, on states of one's own: what comes before them need not be computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..anatomy import Anatomy

Call = Callable[[Tensor], Tensor]


@contextmanager
def block_calls(anatomy: Anatomy) -> Iterator[dict[int, Call]]:
    """Notes how the model calls its blocks inside the `with`: each block as a function of its input alone.

    The functions map what a block reads to what it leaves (B x T x d each), with the masks, positions and settings of
    the noted pass; so B is that of the pass, or any number after a pass of one sequence. Hooks on modules inside fire
    as ever. Let the noted pass use no key/value cache.
    """
    calls: dict[int, Call] = {}

    def note(layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}

            def call(state: Tensor) -> Tensor:
                left = module(state, *args[1:], **others)
                return left[0] if isinstance(left, tuple) else left

            calls[layer] = call

        return hook

    blocks = enumerate(anatomy.block_list)
    hooks = [block.register_forward_pre_hook(note(layer), with_kwargs=True) for layer, block in blocks]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def from_block(calls: Mapping[int, Call], first: int, state: Tensor) -> Tensor:
    """What the last block leaves (B x T x d, before the final norm) if block `first` reads `state`."""
    for layer in range(first, len(calls)):
        state = calls[layer](state)
    return state
