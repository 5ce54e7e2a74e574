"""Checks of a description: the matrices are those that they are called, and of the sizes that the config says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import MLP, ExpertMatrix, Experts, experts_apart
from ...errors import NotApplicable, TransectError
from ..blocks import feeds_of, run_blocks
from ..change import changed
from ..objective import task_of
from ..watch import watch
from .bench import Bench, Hooks, check, distance, matters


@check("the sizes are those of the modules", "config")
def _sizes(bench: Bench) -> float:
    anatomy = bench.anatomy
    for block in anatomy.blocks:
        attention, mlp = block.attention, block.mlp
        assert attention is not None and mlp is not None  # nothing was dropped
        rows = {role: block.matrix(role).shape for role in ("q", "k", "v", "o")}
        found = {
            "blocks": len(anatomy.block_list), "hidden": rows["o"][0], "heads": rows["o"][1] // block.head_size,
            "key_value_heads": rows["k"][0] // block.head_size,
        }  # fmt: skip
        if isinstance(mlp, Experts):
            found |= {"experts": len(mlp.experts), "chosen_experts": mlp.chosen}
        else:
            found["neurons"] = mlp.down.shape[1]
        for name, size in found.items():
            said = anatomy.config_value(name)
            optional = name == "key_value_heads" and size == 1  # some configs count none where all heads share one
            if said is not None and said != size and not optional:
                raise TransectError(f"`{name}` is {said} in the config and {size} in block {block.index}")
        if rows["q"][0] != rows["o"][1] or rows["k"] != rows["v"] or found["heads"] % found["key_value_heads"]:
            raise TransectError(f"q {rows['q']}, k {rows['k']}, v {rows['v']}, o {rows['o']} do not make heads")
    return 0.0


@check("each matrix gives what its module gives", "matrices", "fused")
def _matrices(bench: Bench) -> float:
    anatomy, worst, seen = bench.anatomy, [0.0], set()
    matrices = anatomy.matrices()
    with experts_apart(matrices), Hooks() as handles:
        for matrix in matrices:

            def compare(module: nn.Module, args: tuple[Any, ...], output: Tensor, matrix: Any = matrix) -> None:
                rows = matrix.rows()
                seen.add(matrix.name)
                if output.numel():  # some tokens are sent to this expert
                    expected = nn.functional.linear(args[0], matrix.weight, matrix.bias)
                    worst.append(distance(output if rows is None else output[..., rows], expected))

            handles.append(matrix.module.register_forward_hook(compare))
        bench.run(bench.model)
    idle = [one for one in matrices if one.name not in seen and not isinstance(one, ExpertMatrix)]
    if idle:
        raise TransectError(f"the model does not call {idle[0].name} ({idle[0].path})")
    return max(worst)


@check("blocks run one by one give what the model gives", "blocks", "block_returns")
def _single_blocks(bench: Bench) -> float:
    anatomy = bench.anatomy
    try:
        task_of(bench.model)
    except TransectError as error:
        raise NotApplicable(str(error)) from None
    with torch.no_grad(), watch(anatomy, ["residual"]) as seen:
        bench.run(bench.model)
    (feed,) = feeds_of(anatomy, [bench.batch])
    with torch.no_grad():
        found = run_blocks(anatomy, feed, 0, feed.hidden)
    return max(distance(feed.hidden, seen.residual[0]), distance(found, seen.residual[len(anatomy.block_list)]))


@check("q, k and v are what they are called", "matrices", "fused")
def _queries_keys_values(bench: Bench) -> float:
    """Heads are linear in v. A query acts at its own position alone, and a key on others too."""
    place = 3

    def moved(x: Tensor) -> Tensor:
        new = x.clone()
        new[:, place] = new[:, place].flip(-1) + 1
        return new

    plain = _heads(bench)
    doubled = _heads(bench, ("v", lambda x: 2 * x))
    others = [position for position in range(plain.shape[1]) if position != place]
    by_query, by_key = (_heads(bench, (role, moved)) - plain for role in ("q", "k"))
    if not matters(by_query[:, place]):
        raise TransectError("the heads do not depend on q")
    if matters(by_query[:, others]):
        raise TransectError("a query acts at other positions than its own, as a key does")
    if not matters(by_key[:, others]):
        raise TransectError("no position depends on the key of another")
    return distance(doubled, 2 * plain)


def _heads(bench: Bench, change: tuple[Any, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
    """What the heads of the first block put out, if one of its matrices' outputs is changed."""
    anatomy = bench.anatomy
    changes: Any = {} if change is None else {(change[0], 0): change[1]}
    with torch.no_grad(), changed(anatomy, changes), watch(anatomy, ["heads"], [0]) as seen:
        bench.run(bench.model)
    return seen.heads[0]


@check("rotary positions turn the pairs of channels that are said", "rotation")
def _rotation(bench: Bench) -> float:
    """A pair of channels gives a score nothing if it is zero in the queries, and also if it is zero in the keys."""
    anatomy = bench.anatomy
    block = anatomy.blocks[1]
    attention, size, width = block.attention, block.head_size, block.rotary_width
    assert attention is not None  # nothing was dropped
    if attention.q_norm is not None or attention.k_norm is not None:
        raise NotApplicable("a norm mixes the channels of queries or keys")
    sets = [[width]] if width < size else []
    if width:
        sets.append([2, 3] if block.rotates_neighbours and width > 2 else [width // 2 - 1, width - 1])

    def silenced(role: Any, channels: list[int]) -> Tensor:
        def change(x: Tensor) -> Tensor:
            new = x.clone()
            for channel in channels:
                new[..., channel::size] = 0
            return new

        with torch.no_grad(), changed(anatomy, {(role, 1): change}), watch(anatomy, ["heads"], [1]) as seen:
            bench.run(bench.model)
        return seen.heads[1]

    return max(distance(silenced("q", channels), silenced("k", channels)) for channels in sets)


@check("neurons are activation(up x), or activation(gate x) * up x", "matrices", "fused", "activation")
def _neurons(bench: Bench) -> float:
    anatomy = bench.anatomy
    with torch.no_grad(), watch(anatomy, ["up", "gate", "neurons"]) as seen:
        bench.run(bench.model)
    errors = []
    for block in anatomy.blocks:
        mlp, up, neurons = block.mlp, seen.up[block.index], seen.neurons[block.index]
        assert isinstance(mlp, MLP)  # it has these points
        if mlp.activation is None and mlp.gate is None:
            raise NotApplicable("the description names no activation")
        if mlp.activation is None:
            twofold: Any = {("up", block.index): lambda x: 2 * x}
            with torch.no_grad(), changed(anatomy, twofold), watch(anatomy, ["neurons"], [block.index]) as twice:
                bench.run(bench.model)
            errors.append(distance(twice.neurons[block.index], 2 * neurons))
            continue
        with torch.no_grad():
            expected = mlp.activation(up) if mlp.gate is None else mlp.activation(seen.gate[block.index]) * up
        errors.append(distance(neurons, expected))
    return max(errors)
