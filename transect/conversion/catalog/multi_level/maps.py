"""Coalescing, de-coalescing and interpolating, as maps between all parameters of two models.

Groups of `factor` places of the larger side stand for one place of the smaller one. Shrinking takes means over groups
of outputs and sums over groups of inputs; growing copies outputs and divides inputs by the size of the group, so that
a larger model with the groups' values repeated does what the smaller one does (Section 3 of the paper). Residual
channels, neurons and whole heads are grouped, each by itself: a head's own channels never are, so that rotary
positions and the scale of scores stay what they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ....anatomy import MLP, Anatomy
from ....anatomy.storage import is_dense
from ....errors import TransectError
from ....forward import at_rest
from ....parts.build import sized

Groups = Literal["halves", "neighbours"]
Direction = Literal["shrink", "grow"]
Keeping = Literal["norm", "embedding"]


@dataclass(frozen=True)
class Levels:
    """How two levels are related.

    width, depth: how many times as large the upper one is. groups: which places go together, i and i + n/factor ...
    (halves), or those side by side. keeping: what keeps tied logits in scale, the final norm (exact, ours) or, as
    released, the embeddings. direction: which of the two is made.
    """

    direction: Direction
    width: int = 2
    depth: int = 2
    groups: Groups = "halves"
    keeping: Keeping = "norm"

    @property
    def factor(self) -> int:
        """The two factors' product: 1 where nothing changes."""
        return self.width * self.depth

    def to(self, size: int, factor: int) -> int:
        """The size on the other side."""
        return size // factor if self.direction == "shrink" else size * factor

    def outputs(self, x: Tensor, dim: int) -> Tensor:
        """A dimension of places that are made: means over groups, or copies."""
        if self.direction == "shrink":
            return _grouped(x, dim, self.width, self.groups).mean(dim)
        return _repeated(x, dim, self.width, self.groups)

    def inputs(self, x: Tensor, dim: int) -> Tensor:
        """A dimension of places that are read: sums over groups, or copies divided by their number."""
        return self.outputs(x, dim) * (self.width if self.direction == "shrink" else 1 / self.width)


def _grouped(x: Tensor, dim: int, factor: int, groups: Groups) -> Tensor:
    """The dimension with its groups' members in front of it, in `dim`, and the groups behind."""
    if groups == "halves":
        return x.unflatten(dim, (factor, -1))
    return x.unflatten(dim, (-1, factor)).transpose(dim, dim + 1)


def _repeated(x: Tensor, dim: int, factor: int, groups: Groups) -> Tensor:
    if groups == "neighbours":
        return x.repeat_interleave(factor, dim)
    return torch.cat([x] * factor, dim)


def check_levels(anatomy: Anatomy, levels: Levels) -> None:
    """TransectError, before any change, unless the model has what the maps know, in sizes that divide."""
    architecture, config = anatomy.architecture, anatomy.config
    if levels.factor == 1:
        raise TransectError("with width and depth 1 there is nothing to change")
    if config is not anatomy.model.config:
        raise TransectError("a language model inside another model is not resized: give the language model")
    if levels.width > 1 and (architecture.head_bias or architecture.head_parameters):
        raise TransectError(
            f"each head of {architecture.name} has numbers of its own for positions (ALiBi) or sinks, so that heads "
            "cannot be merged: leave the width (width=1)"
        )
    if levels.depth > 1:
        anatomy.refuse_dropping_blocks()
        _kinds(anatomy, levels)
    if anatomy.record.parameters or anatomy.record.attributes:
        raise TransectError("a model that was cut block by block is not of one width: give the model it came from")
    sizes = {"channels": anatomy.config_value("hidden"), "blocks": len(anatomy.blocks)}
    for block in anatomy.blocks:
        attention, mlp = block.attention, block.mlp
        if attention is None or not isinstance(mlp, MLP):
            raise TransectError(f"block {block.index} has no attention or no ordinary MLP: give a model that has both")
        for matrix in block.matrices():
            if not is_dense(matrix.module):
                raise TransectError(
                    f"{matrix.name} is stored as {type(matrix.module).__name__}: resize the dense model, and compress "
                    "what comes out"
                )
        mlp.refuse_narrowing()
        here = {"neurons": mlp.neurons, "heads": attention.heads, "key/value heads": attention.key_value_heads}
        if any(sizes.setdefault(name, size) != size for name, size in here.items()):
            raise TransectError(f"block {block.index} has other sizes than block 0: give the model it came from")
    if levels.width > 1 and sizes["heads"] != sizes["key/value heads"] and "key_value_heads" not in architecture.config:
        raise TransectError(
            f"the config of {architecture.name} gives no number of key/value heads, of which there would be others: "
            "leave the width (width=1)"
        )
    if levels.direction == "shrink":
        for name, size in sizes.items():
            factor = levels.depth if name == "blocks" else levels.width
            if size % factor:
                raise TransectError(
                    f"{size} {name} cannot be put into groups of {factor}: choose a factor that divides them (1 leaves "
                    f"{'the depth' if name == 'blocks' else 'the width'})"
                )
    if levels.width > 1:
        _check_stream(anatomy)


def _kinds(anatomy: Anatomy, levels: Levels) -> dict[str, list[Any]]:
    """Lists of the config with one value a block, for the other model; TransectError where a group has two values."""
    found = {}
    for name in anatomy.architecture.per_block:
        values = getattr(anatomy.config, name, None)
        if not values:
            continue
        numbers = torch.arange(len(values))
        if levels.direction == "grow":
            found[name] = [values[i] for i in _repeated(numbers, 0, levels.depth, levels.groups)]
            continue
        if len(values) % levels.depth:
            raise TransectError(f"{len(values)} blocks cannot be put into groups of {levels.depth}")
        groups = _grouped(numbers, 0, levels.depth, levels.groups).T.tolist()
        if mixed := next((group for group in groups if len({str(values[i]) for i in group}) > 1), None):
            raise TransectError(
                f"blocks {mixed} are of different kinds ({name}), so that their mean is neither: choose other groups, "
                "or leave the depth (depth=1)"
            )
        found[name] = [values[group[0]] for group in groups]
    return found


def _check_stream(anatomy: Anatomy) -> None:
    """TransectError where embeddings enter the stream multiplied by a root of the width: it is tried on two tokens.

    Their difference counts, which positions that are added do not enter. Images have no table of tokens.
    """
    if anatomy.embedding is None or anatomy.model.main_input_name != "input_ids":
        return
    block, seen = anatomy.blocks[0].module, []
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model = anatomy.model
    try:
        with torch.no_grad(), at_rest(model):
            model(input_ids=torch.tensor([[3], [4]], device=model.device))
    finally:
        handle.remove()
    first, second = anatomy.embedding.weight[3:5].detach().float()  # type: ignore[index, misc]
    row, entered = first - second, (seen[0][0] - seen[0][1]).flatten().float()
    rooted = row * row.numel() ** 0.5
    if row.any() and entered.shape == row.shape and torch.allclose(entered, rooted, rtol=1e-2, atol=1e-4):
        raise TransectError(
            f"{anatomy.architecture.name} multiplies its embeddings by the root of the width, which another width "
            "changes: leave the width (width=1)"
        )


@torch.no_grad()
def resized(anatomy: Anatomy, levels: Levels) -> Any:
    """The model of the other level, of the same class, with mapped parameters; the given one stays as it is.

    TransectError for what `check_levels` refuses, and for a parameter that no map is known for.
    """
    check_levels(anatomy, levels)
    model = anatomy.model
    new = _empty(anatomy, levels)
    target = Anatomy(new, anatomy.architecture)
    written: set[int] = set()
    width, depth = levels.width, levels.depth
    old_blocks, new_blocks = anatomy.blocks, target.blocks
    numbers = torch.arange(len(old_blocks))
    sources = (
        _grouped(numbers, 0, depth, levels.groups).T.tolist()
        if levels.direction == "shrink"
        else [[i] for i in _repeated(numbers, 0, depth, levels.groups).tolist()]
    )

    def put(parameter: Any, tensors: list[Tensor]) -> None:
        mean = torch.stack([tensor.float() for tensor in tensors]).mean(0) if len(tensors) > 1 else tensors[0]
        if mean.shape != parameter.shape:
            raise TransectError(
                f"no map to a tensor of shape {tuple(parameter.shape)} from one that becomes {tuple(mean.shape)}"
            )
        parameter.copy_(mean)
        written.add(id(parameter))

    attention: Any = old_blocks[0].attention
    size, per_group = attention.head_size, attention.heads // attention.key_value_heads

    def heads(step: Callable[[Tensor, int], Tensor], x: Tensor, dim: int, role: str) -> Tensor:
        """A map of whole heads: a group of key/value heads with its queries in their order, each with its channels."""
        together = size * (per_group if role in "qo" else 1)
        return step(x.unflatten(dim, (-1, together)), dim).flatten(dim, dim + 1)

    def matrix(one: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias, role = one.weight, one.bias, one.role
        if width > 1:
            if role in ("q", "k", "v"):
                weight = levels.inputs(heads(levels.outputs, weight, 0, role), 1)
                bias = None if bias is None else heads(levels.outputs, bias, 0, role)
            elif role == "o":
                weight = heads(levels.inputs, levels.outputs(weight, 0), 1, role)
            else:  # residual channels and neurons are grouped alike
                weight = levels.inputs(levels.outputs(weight, 0), 1)
            if bias is not None and role not in ("q", "k", "v"):
                bias = levels.outputs(bias, 0)
        return weight, bias

    for block, sourced in zip(new_blocks, sources, strict=True):
        olds = [old_blocks[number] for number in sourced]
        for made in block.matrices():
            pairs = [matrix(old.matrix(made.role)) for old in olds]
            weight = torch.stack([one.float() for one, _ in pairs]).mean(0)
            biases = [one.float() for _, one in pairs if one is not None]
            if weight.shape != made.shape:
                raise TransectError(f"{made.name} of the new model is {made.shape}, its map {tuple(weight.shape)}")
            made.write(weight, torch.stack(biases).mean(0) if biases else None)
            written |= {id(p) for p in (made.module.weight, made.module.bias) if p is not None}
        new_part, part = block.attention, olds[0].attention
        for name, role in (("q_norm", "q"), ("k_norm", "k")):
            norm, old_norm = getattr(new_part, name), getattr(part, name)
            for key, parameter in () if norm is None else norm.named_parameters():
                tensors = [getattr(old.attention, name).get_parameter(key).detach() for old in olds]
                many = old_norm.get_parameter(key).numel() > size and width > 1
                put(parameter, [_norm_of_heads(one, heads, levels, role) if many else one for one in tensors])
        for name, norm in block.norms.items():
            for key, parameter in norm.named_parameters():
                tensors = [old.norms[name].get_parameter(key).detach() for old in olds]
                put(parameter, [levels.outputs(one, 0) if width > 1 else one for one in tensors])
    _ends(anatomy, target, levels, put, written)
    left = [name for name, p in new.named_parameters() if id(p) not in written]
    old = dict(model.named_parameters())
    for name in left:  # what no map of widths has reached
        _, dot, inner = name.partition(f"{target._prefix}{target.architecture.blocks}.")
        if dot or inner or name not in old or new.get_parameter(name).shape != old[name].shape:
            raise TransectError(f"no map is known for {name} of a {type(model).__name__}")
        put(new.get_parameter(name), [old[name].detach()])
    return new.train(model.training)


def _norm_of_heads(x: Tensor, heads: Any, levels: Levels, role: str) -> Tensor:
    """A norm over all heads at once (flat), or of each head by itself (heads x head size)."""
    return heads(levels.outputs, x.flatten(), 0, role).view(-1, *x.shape[1:])


def _ends(anatomy: Anatomy, target: Anatomy, levels: Levels, put: Any, written: set[int]) -> None:
    """What stands before the blocks and behind them: embeddings of tokens, places and patches, norms, and the head."""
    width, hidden = levels.width, anatomy.config_value("hidden")
    scale = width if levels.direction == "shrink" else 1 / width  # of tied logits
    tied = anatomy.embeddings_tied and width > 1
    inside = {id(p) for p in target.block_list.parameters()}
    final = anatomy.final_norm
    finals = set() if target.final_norm is None else {id(p) for p in target.final_norm.parameters()}
    head: Any = target.unembedding
    old = dict(anatomy.model.named_parameters())
    outside = [
        (name, parameter) for name, parameter in target.model.named_parameters()
        if id(parameter) not in inside and id(parameter) not in written and width > 1 and name in old
    ]  # fmt: skip
    kinds = {name: target.model.get_submodule(name.rpartition(".")[0]) for name, _ in outside}
    if tied and levels.keeping == "norm":
        between = any(isinstance(kind, nn.Linear) and kind is not head for kind in kinds.values())
        if between or final is None or getattr(final, "weight", None) is None:
            raise TransectError(
                "no final norm has numbers that could keep tied logits in scale: choose keeping=embedding"
            )
    offset = _offset(final) if final is not None and tied else 0.0
    for name, parameter in outside:
        tensor, kind = old[name].detach(), kinds[name]
        if id(parameter) in finals:
            tensor = levels.outputs(tensor, 0)
            if tied and levels.keeping == "norm":
                by = offset if name.endswith("weight") else 0.0
                tensor = (tensor + by) * scale - by
        elif isinstance(kind, (nn.Linear, nn.Conv2d)):
            if kind is not head and tensor.shape[0] == hidden:
                tensor = levels.outputs(tensor, 0)
            if isinstance(kind, nn.Linear) and tensor.dim() == 2 and tensor.shape[1] == hidden:
                tensor = levels.inputs(tensor, 1)
        elif tensor.shape[-1] == hidden != parameter.shape[-1]:
            tensor = levels.outputs(tensor, tensor.dim() - 1)  # tables, tokens of a class, and norms
            if tied and levels.keeping == "embedding" and isinstance(kind, nn.Embedding):
                tensor = tensor * scale
        elif tensor.shape != parameter.shape:
            raise TransectError(f"no map is known for {name} of a {type(anatomy.model).__name__}")
        put(parameter, [tensor])


def _offset(norm: nn.Module) -> float:
    """1 where a norm multiplies by 1 + its weight, else 0: what it gives with a weight of zero says which."""
    probe = copy.deepcopy(norm)
    probe.weight.data.zero_()  # type: ignore[union-attr, operator]
    if getattr(probe, "bias", None) is not None:
        probe.bias.data.zero_()  # type: ignore[union-attr, operator]
    x = torch.linspace(-1, 1, probe.weight.numel()).to(probe.weight)  # type: ignore[union-attr, operator, arg-type]
    return float(bool(probe(x).any()))


def _empty(anatomy: Anatomy, levels: Levels) -> Any:
    """A model of the other level with numbers that are all overwritten."""
    model, keys = anatomy.model, anatomy.architecture.config
    attention: Any = anatomy.blocks[0].attention
    config = copy.deepcopy(model.config)
    sizes: dict[str, int] = {}
    if levels.width > 1:
        sizes = {
            "hidden": levels.to(anatomy.config_value("hidden"), levels.width),
            "heads": levels.to(attention.heads, levels.width),
        }
        if keys.get("key_value_heads"):
            sizes["key_value_heads"] = levels.to(attention.key_value_heads, levels.width)
        if keys.get("head_size"):
            sizes["head_size"] = attention.head_size
        neurons = anatomy.blocks[0].mlp.neurons  # type: ignore[union-attr]
        if anatomy.config_value("neurons"):
            sizes["neurons"] = levels.to(neurons, levels.width)
        if getattr(config, "word_embed_proj_dim", None) == anatomy.config_value("hidden"):
            config.word_embed_proj_dim = sizes["hidden"]
    if levels.depth > 1:
        sizes["blocks"] = levels.to(len(anatomy.blocks), levels.depth)
        kinds = _kinds(anatomy, levels)
        setattr(config, keys["blocks"], sizes["blocks"])
        for name, values in kinds.items():
            setattr(config, name, values)
    config = sized(config, sizes)
    with torch.random.fork_rng(devices=[]):  # its random numbers are all overwritten
        new = type(model)(config).to(model.device, model.dtype)
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)
    return new


@torch.no_grad()
def interpolated(before: Any, grown: Any, alpha: float) -> Any:
    """(1 - alpha) of the larger model as it was before coalescing, and alpha of the grown one, which is changed.

    Both of one class with parameters of the same shapes; TransectError otherwise.
    """
    if not 0 <= alpha <= 1:
        raise TransectError(f"alpha should be from 0 to 1, not {alpha!r}")
    old, new = dict(before.named_parameters()), dict(grown.named_parameters())
    if {n: p.shape for n, p in old.items()} != {n: p.shape for n, p in new.items()}:
        raise TransectError("the model before coalescing has not the sizes of the grown one: blend models of one shape")
    for name, parameter in new.items():
        parameter.copy_((1 - alpha) * old[name].to(parameter.device).float() + alpha * parameter.float())
    return grown
