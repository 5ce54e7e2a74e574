"""Running a model block by block: what enters each block, one block at a time, and what follows the last one.

The model's own forward pass prepares the blocks' arguments (masks, rotary embeddings); stand-ins in place of the
blocks catch them. So this works for every architecture without knowing any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..anatomy import Anatomy
from .objective import Batch, inputs_of, to_device

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Feed:
    """One batch on its way through the blocks: the residual stream (B, T, d) and each block's other arguments."""

    batch: Batch
    hidden: Tensor
    calls: list[Call]

    @property
    def mask(self) -> Tensor | None:
        """Which positions are no padding (B, T), or None for all."""
        return self.batch.get("attention_mask")


class _StandIn(nn.Module):
    """Passes the residual stream on unchanged, in the block's own form, and remembers how the block was called."""

    def __init__(self, block: nn.Module, returns: int, give: Tensor | None = None) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its weights may be absent
        self.returns = returns
        self.give = give
        self.hidden: Tensor | None = None
        self.call: Call | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # a model may read an attribute of its blocks, such as the attention type
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden_states, (args, kwargs)
        output = hidden_states if self.give is None else self.give
        return (output, *[None] * (self.returns - 1)) if self.returns else output


@contextmanager
def _stand_ins(anatomy: Anatomy, first: int = 0, give: Tensor | None = None) -> Iterator[list[_StandIn]]:
    """Replace the blocks from `first` on by stand-ins; the last one puts out `give` if that is not None."""
    blocks = anatomy.block_list
    originals = list(blocks)
    last, returns = len(originals) - 1, anatomy.architecture.block_returns
    stand_ins = [
        _StandIn(block, returns, give if i == last else None) for i, block in enumerate(originals) if i >= first
    ]
    try:
        for index, stand_in in enumerate(stand_ins, first):
            blocks[index] = stand_in
        yield stand_ins
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


@torch.no_grad()
def feeds_of(anatomy: Anatomy, batches: Iterable[Batch], past: Cache | None = None) -> list[Feed]:
    """What enters the first block, for each batch. Runs the embedding, but no block.

    A block's other arguments depend on the batch's values (padding, positions), so they are those of each batch;
    tensors that turn out equal are kept once. past: of earlier positions, which the batches go on from (`first_of`).
    """
    model = anatomy.model
    more = {} if past is None else {"past_key_values": past}
    known: dict[Any, list[Tensor]] = {}
    feeds = []
    for batch in batches:
        with _stand_ins(anatomy) as stand_ins:
            model.base_model(**inputs_of(model, batch, body=True), **more)
        calls = [stand_in.call for stand_in in stand_ins if stand_in.call is not None]
        hidden = stand_ins[0].hidden
        assert hidden is not None
        feeds.append(Feed(to_device(batch, model.device), hidden, _kept_once(calls, known)))
    return feeds


def _kept_once(value: Any, known: dict[Any, list[Tensor]]) -> Any:
    """The value with each tensor in it replaced by an equal one that is known, if there is one."""
    if isinstance(value, Tensor):
        same_sum = known.setdefault((value.shape, value.dtype, float(value.sum().abs())), [])
        equal = next((tensor for tensor in same_sum if tensor is value or torch.equal(tensor, value)), None)
        if equal is None:
            same_sum.append(value)
        return value if equal is None else equal
    if type(value) in (list, tuple):
        return type(value)(_kept_once(part, known) for part in value)
    return {key: _kept_once(part, known) for key, part in value.items()} if type(value) is dict else value


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The residual stream (B, T, d) after the block."""
    args, kwargs = call
    output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def run_blocks(anatomy: Anatomy, feed: Feed, first: int, hidden: Tensor) -> Tensor:
    """The residual stream (B, T, d) after the last block, before the final norm, if block `first` reads `hidden`.

    hidden: of the feed's batch, or of any number of copies if that is one sequence.
    """
    if anatomy.architecture.head_bias and len(hidden) > len(feed.hidden):  # the bias may be laid out for these rows
        parts = hidden.split(len(feed.hidden))
        return torch.cat([run_blocks(anatomy, feed, first, part) for part in parts])
    for number in range(first, len(feed.calls)):
        hidden = run_at(anatomy, feed, number, hidden)
    return hidden


def run_at(anatomy: Anatomy, feed: Feed, number: int, hidden: Tensor) -> Tensor:
    """The residual stream after block `number` alone, if it reads `hidden`: of the feed's batch, or of any number of
    copies if that is one sequence."""
    call = feed.calls[number]
    call = call if len(hidden) == len(feed.hidden) else _of_copies(call, len(hidden))
    return run_block(anatomy.block_list[number], hidden, call)


def _of_copies(call: Call, count: int) -> Call:
    """A call for that many copies of its one sequence: some models (XGLM) want a mask (B x 1 x T x T) of all rows."""

    def enough(value: Any) -> Any:
        is_mask = isinstance(value, Tensor) and value.dim() == 4 and len(value) == 1
        return value.expand(count, -1, -1, -1) if is_mask else value

    args, kwargs = call
    return tuple(map(enough, args)), {name: enough(value) for name, value in kwargs.items()}


@contextmanager
def stopping_behind(anatomy: Anatomy, last: int) -> Iterator[None]:
    """Inside the `with`, the blocks behind block `last` do not run: what it leaves comes out of the model's last."""
    with _stand_ins(anatomy, last + 1):
        yield


@contextmanager
def put_out(anatomy: Anatomy, hidden: Tensor) -> Iterator[None]:
    """Inside the `with`, `hidden` (B, T, d) comes out of the model's last block, and no block runs."""
    with _stand_ins(anatomy, give=hidden):
        yield
