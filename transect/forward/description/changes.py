"""Checks of a description: other orders change nothing, and what is removed is as if it gave nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ...anatomy import Block, Experts
from ...errors import NotApplicable, TransectError
from ..objective import task_of
from .bench import LIMIT, Bench, check, distance
from .twin import plain_experts


@check(
    "another order of heads changes nothing", "matrices", "fused", "q_norm", "k_norm", "head_bias", "head_parameters"
)
def _order_of_heads(bench: Bench) -> float:
    anatomy = bench.copy()
    for block in anatomy.blocks:
        attention = block.attention
        assert attention is not None  # nothing was dropped
        shared = attention.heads // attention.key_value_heads
        groups = reversed(range(attention.key_value_heads))
        attention.keep([group * shared + head for group in groups for head in reversed(range(shared))])
    return bench.off(anatomy)


@check("another order of neurons and experts changes nothing", "matrices", "fused", "experts")
def _order_of_neurons(bench: Bench) -> float:
    anatomy = bench.copy()
    for block in anatomy.blocks:
        for mlp in _mlps(block):
            mlp.keep(reversed(range(mlp.neurons)))
        if isinstance(block.mlp, Experts):
            block.mlp.keep(reversed(range(len(block.mlp.experts))))
    return bench.off(anatomy)


@check(
    "without some heads it is as if they gave nothing", "attributes", "head_bias", "head_parameters", "q_norm", "k_norm"
)
def _fewer_heads(bench: Bench) -> float:
    """Every group loses all query heads but its first, and then all groups but the last go."""
    anatomy = bench.copy()
    attention = anatomy.blocks[1].attention
    assert attention is not None  # nothing was dropped
    shared, size = attention.heads // attention.key_value_heads, attention.head_size
    weight: Any = getattr(attention.q_norm, "weight", None)
    joint = weight is not None and weight.dim() == 1 and weight.numel() > size
    last = (attention.key_value_heads - 1) * shared
    attention.keep(range(0, attention.heads, shared))
    attention = anatomy.blocks[1].attention
    assert attention is not None  # it was only made smaller
    attention.keep([attention.heads - 1])
    kept = slice(last * size, (last + 1) * size)
    with bench.overwritten() as zeroed:
        o = zeroed.blocks[1].matrix("o")
        weight = torch.zeros_like(o.weight)
        weight[:, kept] = o.weight[:, kept]
        o.write(weight)
        error = bench.off(anatomy, zeroed)  # it must run in any case
    if joint:
        raise NotApplicable("it runs, but a norm over all heads at once changes with their number")
    return error


@check("without some neurons it is as if they gave nothing", "matrices", "fused", "experts")
def _fewer_neurons(bench: Bench) -> float:
    anatomy = bench.copy()
    with bench.overwritten() as zeroed:
        for narrower, whole in zip(_mlps(anatomy.blocks[1]), _mlps(zeroed.blocks[1]), strict=True):
            narrower.keep(range(1, narrower.neurons))
            weight = whole.down.weight.clone()
            weight[:, 0] = 0
            whole.down.write(weight)
        return bench.off(anatomy, zeroed)


def _mlps(block: Block) -> list[Any]:
    """The block's MLP, or each expert of its mixture."""
    mlp = block.mlp
    if isinstance(mlp, Experts):
        return [*mlp.experts, *([] if mlp.shared is None else [mlp.shared])]
    return [mlp]


@check("dropping attention equals zeroing its output", "attention", "attention_returns", "attention_adds", "post_norm")
def _dropped_attention(bench: Bench) -> float:
    return max(_dropped(bench, "attention", index) for index in range(len(bench.anatomy.block_list)))


@check("dropping the MLP equals zeroing its output", "matrices", "experts", "post_norm")
def _dropped_mlp(bench: Bench) -> float:
    return max(_dropped(bench, "mlp", index) for index in range(len(bench.anatomy.block_list)))


def _dropped(bench: Bench, unit: str, index: int) -> float:
    anatomy = bench.copy()
    block = anatomy.blocks[index]
    if block.post_norm:
        raise NotApplicable("a sublayer of a post-norm model cannot be dropped")
    getattr(block, unit).drop()
    with bench.overwritten() as zeroed:
        silence(zeroed.blocks[index], unit)
        return bench.off(anatomy, zeroed)


def silence(block: Block, unit: str) -> None:
    """Let the matrices that write a sublayer's output, and their biases, be zero."""
    for matrix in [block.matrix("o")] if unit == "attention" else [mlp.down for mlp in _mlps(block)]:
        matrix.write(torch.zeros(matrix.shape), None if matrix.bias is None else torch.zeros(matrix.shape[0]))


@check("without attention in the first block, the cache still counts positions", "attention")
def _cache(bench: Bench) -> float:
    try:
        if task_of(bench.model) != "causal":
            raise NotApplicable("only a model that predicts the next token has a cache")
    except TransectError as error:
        raise NotApplicable(str(error)) from None
    anatomy = bench.copy()
    first = anatomy.blocks[0].attention
    assert first is not None  # nothing was dropped
    if anatomy.blocks[0].post_norm:
        raise NotApplicable("a sublayer of a post-norm model cannot be dropped")
    if distance(_in_two_steps(bench, bench.model), bench.output) > LIMIT:
        raise NotApplicable("this model itself gives other logits with a cache")
    first.drop()
    return distance(_in_two_steps(bench, anatomy.model), bench.run(anatomy.model))


@torch.no_grad()
def _in_two_steps(bench: Bench, model: Any) -> Tensor:
    """Logits where the cache holds the first positions."""
    ids = bench.batch["input_ids"]
    half = ids.shape[1] // 2
    start = model(input_ids=ids[:, :half], use_cache=True)
    rest = [start.logits]
    for position in range(half, ids.shape[1]):
        start = model(
            input_ids=ids[:, position : position + 1], past_key_values=start.past_key_values, use_cache=True,
            attention_mask=torch.ones_like(ids[:, : position + 1]),
        )  # fmt: skip
        rest.append(start.logits)
    return torch.cat(rest, 1)


@check("a model with a block less is what its config says", "per_block", "fixed_blocks", "config")
def _fewer_blocks(bench: Bench) -> float:
    anatomy, zeroed = bench.copy(), bench.copy()
    if not anatomy.can_drop_blocks:
        raise NotApplicable("the description says that no block can be dropped")
    errors = []
    if not anatomy.blocks[0].post_norm:
        for unit in ("attention", "mlp"):
            silence(zeroed.blocks[0], unit)
        anatomy.drop_block(0)
        errors.append(bench.off(anatomy, zeroed))
    else:
        anatomy.drop_block(0)
    model = anatomy.model
    same = model.config._attn_implementation
    again = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=same).eval().to(model.dtype)
    plain_experts(again)
    again.load_state_dict(model.state_dict())
    return max([*errors, distance(bench.run(again), bench.run(model))])
