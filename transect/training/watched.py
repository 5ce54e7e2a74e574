"""The residual stream of the pass that has just run, with its gradient, for what is added to the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def watching(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside the `with`, the list holds the last pass's stream (B, T, d): before the first block and behind each."""
    states: list[Tensor] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[:] = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [blocks[0].register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [block.register_forward_hook(end) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
