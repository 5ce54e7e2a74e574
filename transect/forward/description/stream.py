"""Checks of a description: what sublayers read, what they add to the stream, and what the lens makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Block, Experts
from ...errors import NotApplicable, TransectError
from ..change import changed
from ..lens import Lens
from ..objective import task_of
from ..watch import watch
from .bench import Bench, Hooks, check, distance, matters


@check("each sublayer reads what the norms say", "norms", "post_norm")
def _norms(bench: Bench) -> float:
    """q's input is the block's, behind `attention_input`; up's is the stream, behind `mlp_input`.

    In a post-norm model up reads what `attention_output` gives, and the next block what `mlp_output` does.
    """
    anatomy = bench.anatomy
    outputs: dict[Any, Any] = {}  # by the norm's id
    inputs: dict[Any, Any] = {}  # by role and block
    with Hooks() as handles:
        for block in anatomy.blocks:
            for norm in block.norms.values():
                handles.append(
                    norm.register_forward_hook(lambda module, args, output: outputs.update([(id(module), output)]))
                )
            for role in ("q", "up"):
                handles.append(
                    _reader(block, role).register_forward_pre_hook(
                        lambda module, args, key=(role, block.index): inputs.update([(key, args[0])])
                    )
                )
        points: Any = ["residual"] if anatomy.blocks[0].post_norm else ["residual", "attention"]
        with watch(anatomy, points) as seen:
            bench.run(bench.model)
    errors = []
    for block in anatomy.blocks:
        layer, norms = block.index, block.norms
        entering = seen.residual[layer]
        if block.post_norm:
            expected = {"q": entering, "up": outputs[id(norms["attention_output"])]}
            errors.append(distance(outputs[id(norms["mlp_output"])], seen.residual[layer + 1]))
        else:
            stream = entering if block.parallel else entering + seen.attention[layer]
            expected = {
                role: outputs[id(norms[name])] if name in norms else state
                for role, name, state in (("q", "attention_input", entering), ("up", "mlp_input", stream))
            }
        for role, state in expected.items():
            found = inputs[role, layer]
            errors.append(distance(found, state.flatten(0, 1) if found.dim() < state.dim() else state))
    return max(errors)


def _reader(block: Block, role: str) -> nn.Module:
    """The module that reads what q or up do; the sublayer itself where that is a mixture of experts."""
    mlp = block.mlp
    return mlp.module if role == "up" and isinstance(mlp, Experts) else block.matrix(role).module


@check("the MLP reads what attention added, or, in parallel, does not", "parallel")
def _parallel(bench: Bench) -> float:
    anatomy = bench.anatomy
    block = anatomy.blocks[1]

    def ups(change: Any) -> Tensor:
        with torch.no_grad(), changed(anatomy, change), watch(anatomy, ["up"], [1]) as seen:
            bench.run(bench.model)
        return seen.up[1]

    plain, without = ups({}), ups({("heads", 1): lambda x: torch.zeros_like(x)})
    if block.parallel:
        return distance(without, plain)
    if not matters(without - plain):
        raise TransectError("the MLP does not see what attention adds, as in a parallel block")
    return 0.0


@check("what sublayers add sums to the stream", "residual_multiplier", "norms", "matrices", "post_norm")
def _contributions(bench: Bench) -> float:
    anatomy = bench.anatomy
    with torch.no_grad(), watch(anatomy, ["residual", "attention", "mlp"]) as seen:
        bench.run(bench.model)
    return max(
        distance(seen.residual[i] + seen.attention[i] + seen.mlp[i], seen.residual[i + 1])
        for i in range(len(anatomy.block_list))
    )


@check("the lens of the last state gives the logits", "final_norm", "logits", "head_transform")
def _lens(bench: Bench) -> float:
    anatomy = bench.anatomy
    try:
        task_of(bench.model)
    except TransectError as error:
        raise NotApplicable(str(error)) from None
    lens, last = Lens(anatomy), len(anatomy.block_list)
    with torch.no_grad(), watch(anatomy, ["residual"], [last]) as seen:
        logits = bench.run(bench.model)
        return distance(lens(seen.residual[last]), logits)
