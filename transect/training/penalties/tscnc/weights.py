"""The weights that a model computes with at the moment, with their gradients, whatever stands in their places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ....anatomy import Anatomy, ExpertMatrix
from ....anatomy.architecture import MATRIX_ROLES
from ....anatomy.experts import StoredTogether
from ....anatomy.storage import shape_of
from ....errors import TransectError
from ....forward import at_rest
from ....parameters import pieces

HEAD = "head"
_FAR = 0.05  # of the largest output; bfloat16 rounds to a twentieth of this


def trained_weights(model: Any, places: str) -> Iterator[tuple[str, Tensor]]:
    """Names and weights W (d_out x d_in), with gradient, of the chosen matrices in which something is trained.

    places: `all`, or roles of the blocks' matrices (q, k, v, o, gate, up, down) and `head`, the last linear layer
    behind them, with commas. Of a layer with an adapter this is the weight that both make together.
    Raises TransectError for an unknown name, and where nothing is trained in any of them.
    """
    asked = pieces(places)
    if not asked or (asked != ["all"] and set(asked) - {*MATRIX_ROLES, HEAD}):
        raise TransectError(
            f"tscnc: {places!r} should be all, or some of {', '.join(MATRIX_ROLES)} and {HEAD}, with commas"
        )
    roles = MATRIX_ROLES if asked == ["all"] else [one for one in asked if one != HEAD]
    hosts: dict[int, Tensor] = {}  # what is fused is computed once
    found = False
    for matrix in Anatomy(model, weights=False).matrices(roles) if roles else ():  # the weights are not read there
        if not _trained(matrix.host):
            continue
        found = True
        module = matrix.module
        if isinstance(module, StoredTogether):
            assert isinstance(matrix, ExpertMatrix)
            yield matrix.name, _of_expert(matrix.host, matrix.expert, matrix.role)
            continue
        if id(module) not in hosts:
            hosts[id(module)] = weight_of(module, matrix.path)
        rows = matrix.rows()
        yield matrix.name, hosts[id(module)] if rows is None else hosts[id(module)][rows]
    if HEAD in asked and _trained(head := head_of(model)):
        found = True
        yield HEAD, weight_of(head, HEAD)
    if not found:
        raise TransectError(f"tscnc: nothing is trained in the matrices {places}, so that no penalty can change them")


def weight_of(module: Any, name: str) -> Tensor:
    """W (d_out x d_in) of a linear layer, with gradient; of what wraps or replaces one, what it makes of unit vectors.

    At rest, so without dropout, and of a parametrization what will be stored; in the type that the module computes in.
    TransectError for what is no linear map of its input, such as a mixture of adapters by token.
    """
    if isinstance(module, nn.Linear):
        return module.weight
    if isinstance(module, Conv1D):
        return module.weight.T
    d_in = shape_of(module)[1]
    numbers = next(tensor for tensor in module.parameters() if tensor.is_floating_point())
    unit = torch.eye(d_in, dtype=numbers.dtype, device=numbers.device)
    signs = 1.0 - 2.0 * (torch.arange(d_in, device=numbers.device)[None] % 3 == 1).to(numbers.dtype)
    try:
        with at_rest(module), torch.autocast(numbers.device.type, enabled=False):
            outputs = module(torch.cat([unit, torch.zeros_like(signs), signs]))
        weight = (outputs[:d_in] - outputs[d_in]).T
        expected, sought = (signs @ weight.detach().T.to(signs))[0], (outputs[d_in + 1] - outputs[d_in]).detach()
        linear = bool((expected - sought).abs().max() <= _FAR * sought.abs().max())
    except TransectError:  # of a layer that depends on what others have read
        linear, weight = False, unit
    if not linear:
        raise TransectError(f"tscnc: {name} is a {type(module).__name__}, whose output is no matrix times its input")
    return weight


def head_of(model: Any) -> Any:
    """The last linear layer behind the blocks: an unembedding or a classifier. TransectError if there is none."""
    known = model.get_output_embeddings()
    inside = {id(module) for module in model.base_model.modules()}
    behind = [one for one in model.modules() if isinstance(one, (nn.Linear, Conv1D)) and id(one) not in inside]
    if known is None and not behind:
        raise TransectError(f"tscnc: {type(model).__name__} has no linear layer behind its blocks: name other matrices")
    return behind[-1] if known is None else known


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _of_expert(host: Any, number: int, role: str) -> Tensor:
    if role == "down":
        return host.down_proj[number]
    return host.gate_up_proj[number].chunk(2)[("gate", "up").index(role)]
