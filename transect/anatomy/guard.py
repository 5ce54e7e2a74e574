"""The door: a weight that is not the ordinary matrix that it seems to be is named before anything reads or writes it.

Everything behind it takes a module's `weight` for W (d_out x d_in) in y = Wx + b. Of quantised, offloaded, adapted and
reparametrised modules that is not true, though many of them are `nn.Linear` by `isinstance`. They are told by what they
hold and do, not by their names, so that the next library is refused as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import TransectError
from .architecture import Architecture
from .body import ADAPTED
from .record import record_of
from .storage import is_dense, read_weight, shape_of

_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_COMPUTED = {"parametrizations", "weight_g", "weight_v", "weight_orig", "weight_u", "weight_mask"}  # of torch.nn.utils
_QUANTIZED = (
    "the model is quantised, or held in some other form than its plain numbers. Load it without the quantization (or "
    "call model.dequantize() where it has that, save it, and open what was saved), change it, and quantise the result"
)
_REPARAMETRISED = (
    "its weight is computed from other numbers before each use. Make it an ordinary one first: "
    'torch.nn.utils.parametrize.remove_parametrizations(module, "weight"), torch.nn.utils.prune.remove(module, '
    '"weight"), or what the library that did it offers'
)
_ELSEWHERE = (
    "the weight is not in memory (it is on the meta device): the model is offloaded to disk or CPU memory, or has no "
    "weights yet. Load it without device_map, or compress its folder with stream_to= (--stream), which holds one "
    "block in memory at a time"
)


def refuse_other_than_plain_weights(model: nn.Module, blocks: nn.Module, architecture: Architecture) -> None:
    """Raise TransectError, naming the module and what to do, unless every weight is what it seems to be."""
    named = list(model.named_modules())
    for path, module in named:
        if "base_layer" in module._modules:
            raise _error(path, module, ADAPTED)
    inside = {id(module) for module in blocks.modules()}
    for path, module in named:
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if id(module) not in inside and parameter.dtype not in _NUMBERS:  # an embedding or a head
                held = str(parameter.dtype).removeprefix("torch.")
                raise _error(path, module, f"it holds {held} numbers: {_QUANTIZED}")
            if type(parameter) is nn.Parameter and parameter.device.type != "meta":
                continue
            if parameter.device.type == "meta":
                raise _error(path, module, _ELSEWHERE)
            raise _error(path, module, f"it holds a {type(parameter).__name__}: {_QUANTIZED}")
    paths = {id(module): path for path, module in named}
    experts = architecture.experts
    routers = set() if experts is None else {id(_found(block, experts.router)) for block in blocks.children()}
    for module in blocks.modules():
        if is_dense(module) and id(module) not in routers:  # a router is no matrix, though one may derive from Linear
            _check_dense(paths[id(module)], module)
    for path in (*architecture.matrices.values(), *architecture.fused):
        for block in blocks.children():
            module = _found(block, path)
            if module is not None:
                _check_matrix(paths[id(module)], module)
    _check_untied(blocks, paths, record_of(model).tied)


def _check_dense(path: str, module: Any) -> None:
    more = [*module._parameters, *module._buffers, *module._modules]
    more = [name for name in more if name not in ("weight", "bias")]
    if _COMPUTED & set(more):
        raise _error(path, module, _REPARAMETRISED)
    if more:
        raise _error(path, module, f"beside weight and bias it holds {', '.join(more)}: {_QUANTIZED}")
    weight = module.weight
    expected = shape_of(module) if isinstance(module, nn.Linear) else shape_of(module)[::-1]
    if weight.dtype not in _NUMBERS or tuple(weight.shape) != expected:
        held = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        raise _error(path, module, f"its weight is {held}, where {list(expected)} is expected: {_QUANTIZED}")
    if type(module).forward not in (nn.Linear.forward, Conv1D.forward) and not _computes_its_weight(module):
        raise _error(path, module, f"it computes something of its own, not only Wx + b; {_QUANTIZED}")


@torch.no_grad()
def _computes_its_weight(module: Any) -> bool:
    """Whether a forward of its own (Falcon has one) gives Wx + b all the same: tried on one vector, to a hundredth."""
    weight = read_weight(module)
    x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    try:
        found = type(module).forward(module, x)
    except Exception:  # whatever it is, it is no linear map of x
        return False
    expected = x @ weight.T if module.bias is None else x @ weight.T + module.bias
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 0.01 * expected.abs().max())


def _check_matrix(path: str, module: Any) -> None:
    """What stands where the architecture has a matrix is dense, an operator, or the stand-in of what was dropped."""
    if is_dense(module) or hasattr(module, "describe"):
        return
    if any(tensor.numel() for tensor in [*module.parameters(), *module.buffers()]):
        raise _error(path, module, f"it is no matrix that can be read: {_QUANTIZED}")


def _check_untied(blocks: nn.Module, paths: Mapping[int, str], tied: Mapping[str, str]) -> None:
    """Of weights that places share, those that the structure record has as tied are as they should be."""
    users: dict[int, tuple[str, str | None]] = {}
    modules: Any = blocks.named_modules(remove_duplicate=False)
    for name, module in modules:
        if is_dense(module) and module.weight.numel():
            group = tied.get(f"{paths[id(module)]}.weight")
            first, known = users.setdefault(id(module.weight), (name, group))
            if first != name and (group is None or group != known):
                raise TransectError(
                    f"the blocks' {first} and {name} share one weight, so that one cannot be changed without the "
                    "other. Share them by Anatomy's tie or arrange, "
                    "or give each its own: module.weight = torch.nn.Parameter(module.weight.detach().clone()) "
                    "(copy.deepcopy(block) where whole blocks are shared)"
                )


def _found(block: Any, path: str) -> Any:
    try:
        return block.get_submodule(path)
    except AttributeError:  # of a dropped sublayer, or missing, which is said where it is asked for
        return None


def _error(path: str, module: nn.Module, why: str) -> TransectError:
    return TransectError(f"{path or 'the model'} ({type(module).__name__}) cannot be opened: {why}")
