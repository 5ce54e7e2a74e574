"""Which blocks a model consists of, in which order, and what they share.

Buffers (codes of integers, indices) are copied where blocks are repeated, never shared: moving a model to another
device would tear them apart without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..errors import TransectError
from .banks import hand_over_banks
from .mixture import renumber_blocks
from .record import record_of
from .storage import describe
from .ties import tie


def tie_blocks(anatomy: Any, numbers: Sequence[int], chosen: Callable[[str], bool] = lambda name: True) -> None:
    """Let the blocks of these numbers hold the parameters of the first of them, those of whose names `chosen` is true.

    chosen: of a parameter's name within the block. TransectError, before any change, where a block has others.
    """
    names = alike(anatomy, numbers, chosen)
    for name in names if len(numbers) > 1 else ():
        tie(anatomy.model, [f"{anatomy.blocks[number].path}.{name}" for number in numbers])


def alike(anatomy: Any, numbers: Sequence[int], chosen: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Names within the block of these blocks' parameters; TransectError if one block has others, or of other shapes."""
    blocks = [anatomy.blocks[number] for number in numbers]
    shapes = [
        {name: p.shape for name, p in block.module.named_parameters(remove_duplicate=False) if chosen(name)}
        for block in blocks
    ]
    for block, held in zip(blocks, shapes, strict=True):
        differing = sorted({*held, *shapes[0]} - {name for name in held if shapes[0].get(name) == held[name]})
        if differing:
            raise TransectError(
                f"blocks {blocks[0].index} and {block.index} cannot share their parameters: {differing[0]} is not the "
                "same in both, by name and shape"
            )
    return list(shapes[0])


def arrange(anatomy: Any, order: Iterable[int], tied: bool = True) -> None:
    """Let the model consist of its blocks of these numbers, in this order: see `Anatomy.arrange`."""
    order, count, model = list(order), len(anatomy.block_list), anatomy.model
    if not order or not all(type(number) is int and 0 <= number < count for number in order):
        raise TransectError(f"an order of blocks should hold numbers from 0 to {count - 1}, at least one, not {order}")
    if order == list(range(count)):
        return
    anatomy.refuse_dropping_blocks()
    blocks: list[nn.Module] = list(anatomy.block_list)
    for number in {number for number in order if order.count(number) > 1}:
        if any(hasattr(module, "bank_group") for module in blocks[number].modules()):
            raise TransectError(
                f"block {number} shares a bank of numbers with others and cannot be repeated: take the model as it was "
                "before that"
            )
    for number in range(count):
        if number not in order:
            hand_over_banks(model, blocks[number])
    placed: list[nn.Module] = []
    for place, number in enumerate(order):
        repeated = number in order[:place]
        placed.append(_again(blocks[number], tied) if repeated else blocks[number])
    del anatomy.block_list[:]
    anatomy.block_list.extend(placed)
    for place, block in enumerate(placed):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
    setattr(anatomy.config, anatomy.architecture.config["blocks"], len(order))
    for name in anatomy.architecture.per_block:
        values = getattr(anatomy.config, name, None)
        if values is not None:
            setattr(anatomy.config, name, [values[number] for number in order])
    renumber_blocks(anatomy)
    path = f"{anatomy._prefix}{anatomy.architecture.blocks}"
    record = record_of(model)
    record.arrange_blocks(path, order)
    repeats = {number: [p for p, n in enumerate(order) if n == number] for number in order if order.count(number) > 1}
    if tied:
        for places in repeats.values():
            tie_blocks(anatomy, places)
    else:
        copies = tuple(f"{path}.{place}." for places in repeats.values() for place in places[1:])
        record.keep_ties({name: group for name, group in record.tied.items() if not name.startswith(copies)})
    for where, description in record.modules.items():
        if "layer_idx" in description:  # a dropped attention, or a mixer, at another place
            record.modules[where] = describe(model.get_submodule(where))


def _again(block: nn.Module, tied: bool) -> nn.Module:
    """The block once more, with modules of its own; its configs are shared, and its parameters if they are tied."""
    shared = {id(config): config for module in block.modules() if (config := getattr(module, "config", None))}
    return copy.deepcopy(block, shared | ({id(one): one for one in block.parameters()} if tied else {}))
