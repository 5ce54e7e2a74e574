"""Trained attention as a mixer: its projections, whatever the architecture stores them as, in any part that has such.

Here an architecture and a mixer meet for the only time: what the anatomy knows of the one (fused matrices, biases,
norms on queries and keys, heads that share keys, the scale, which channels are turned) becomes the four projections
that the other has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Attention, Block
from ..anatomy.storage import dense, describe, is_dense, laid_out
from ..errors import TransectError
from ..forward import at_rest
from ..forward.lens import norm_centres
from ..parts import insert
from ..parts.insert import places
from ..parts.projection import Projection
from ..parts.registry import part_named

TOLERANCE = 1e-3  # of the largest output: how far what should be the same function may be rounded apart


@dataclass(frozen=True)
class Trained:
    """Trained projections: modules by role, for mixers whose heads share keys as the model's do, or have their own."""

    shared: dict[str, nn.Module]
    repeated: dict[str, nn.Module]
    key_value_heads: int


def trained_projections(block: Block) -> Trained:
    """What the block's attention has learned, copied; TransectError where none stands, or one of no plain matrices."""
    attention = block.attention
    if attention is None:
        raise TransectError(
            f"block {block.index} has no attention of the model's own (a part stands there, or it was dropped): "
            "convert the model that it came from"
        )
    for matrix in (attention.q, attention.k, attention.v, attention.o):
        if not is_dense(matrix.module):
            raise TransectError(
                f"{matrix.name} is stored as {type(matrix.module).__name__}: convert first, and compress what comes out"
            )
    groups = attention.heads // attention.key_value_heads
    scale = scale_of(block) * math.sqrt(attention.head_size)
    q = _projection(attention, "q", 1, scale)
    o = dense(attention.o.weight, attention.o.bias)
    shared = {"q": q, "o": o, "k": _projection(attention, "k", 1), "v": _projection(attention, "v", 1)}
    if groups == 1:
        return Trained(shared, shared, attention.key_value_heads)
    return Trained(
        shared, shared | {role: _projection(attention, role, groups) for role in "kv"}, attention.key_value_heads
    )


def scale_of(block: Block) -> float:
    """What scores are multiplied by: the attention module's own word for it, or 1 / sqrt(head size)."""
    module: Any = block.model.get_submodule(str(block.slot_path("attention")))
    return float(getattr(module, "scaling", None) or block.head_size**-0.5)


def _projection(attention: Attention, role: str, repeats: int, scale: float = 1.0) -> nn.Module:
    """A copy of q, k or v, with channels that are turned together half a rotation apart; q with its scale in it."""
    matrix, size = getattr(attention, role), attention.head_size
    norm: Any = {"q": attention.q_norm, "k": attention.k_norm}.get(role)
    weight, bias = matrix.weight, matrix.bias
    heads = len(weight) // size
    order = torch.arange(len(weight), device=weight.device)
    if role != "v" and attention.block.rotates_neighbours:
        order = _halves(order, size, attention.block.rotary_width)
    weight, bias = weight[order], None if bias is None else bias[order]
    if norm is None and repeats == 1:
        return dense(weight * scale, None if bias is None else bias * scale)
    kind, gain, shift, exponent = "none", None, None, 6
    if norm is not None:
        gain, shift = _gain_and_shift(norm, heads, size)
        kind = "all" if norm.weight is not None and norm.weight.numel() == len(weight) != size and (
            norm.weight.dim() == 1
        ) else "head"  # fmt: skip
        exponent = round(-math.log10(_eps(norm)))
    else:
        weight, bias = weight * scale, None if bias is None else bias * scale
    centred = norm is not None and norm_centres(norm)
    made = Projection(weight.shape[1], heads, size, bias is not None, kind, centred, exponent, repeats).to(weight)
    with torch.no_grad():
        made.linear.weight.copy_(weight)
        if bias is not None and made.linear.bias is not None:
            made.linear.bias.copy_(bias)
        if made.gain is not None and made.shift is not None and gain is not None and shift is not None:
            made.gain.copy_(gain[order] * scale)
            made.shift.copy_(shift[order] * scale)
    return made


def _halves(order: Tensor, size: int, width: int) -> Tensor:
    """Rows by heads, each head's turned channels 0, 2, 4 ... before 1, 3, 5 ..., the others as they are."""
    heads = order.view(-1, size)
    return torch.cat([heads[:, :width:2], heads[:, 1:width:2], heads[:, width:]], dim=1).flatten()


def _gain_and_shift(norm: Any, heads: int, size: int) -> tuple[Tensor, Tensor]:
    """What a norm multiplies and adds for each channel, measured, so that one that stores 1 + g is right."""
    weight = getattr(norm, "weight", None)
    width = heads * size if weight is not None and weight.numel() == heads * size else size
    like = weight if weight is not None else next(norm.parameters(), torch.empty(0))
    probe = torch.full((width,), 256.0, dtype=like.dtype, device=like.device)
    probe[::2] = -256.0
    if weight is not None and weight.dim() == 2:  # of each head by itself
        probe = probe.view(heads, size)
    with torch.no_grad():
        plus, minus = norm.forward(probe[None]), norm.forward(-probe[None])
        gain, shift = (plus - minus) / 2 / probe.sign(), (plus + minus) / 2
    found = (one.reshape(-1).float() for one in (gain, shift))
    first, second = (one.repeat(heads) if width == size and heads > 1 else one for one in found)
    return first, second


def _eps(norm: Any) -> float:
    return next((float(getattr(norm, n)) for n in ("eps", "variance_epsilon") if getattr(norm, n, None)), 1e-6)


def check_mixer(anatomy: Anatomy, name: str, layers: Sequence[int]) -> None:
    """TransectError unless that mixer can stand for trained attention in these blocks."""
    entry = part_named("mixer", name)
    if missing := {"q", "k", "v", "o"} - set(entry.function.roles):
        raise TransectError(
            f"the mixer {name} has no {', '.join(sorted(missing))} that trained projections could be put into"
        )
    for number in layers:
        places(anatomy, "mixer", number)
        trained_projections(anatomy.blocks[number])


@torch.no_grad()
def put_mixer(
    anatomy: Anatomy, name: str, layers: Sequence[int], settings: Mapping[str, Any] | None = None, seed: int = 0
) -> None:
    """Let a mixer stand for trained attention in these blocks, with its queries, keys, values and output, in place.

    What the mixer has besides those (gates, norms, maps of its own) begins with random numbers of the seed.
    """
    trained = {number: trained_projections(anatomy.blocks[number]) for number in layers}
    first = trained[layers[0]]
    chosen = dict(settings or {})
    has = {parameter.name for parameter in part_named("mixer", name).parameters}
    sizes = part_named("mixer", name).sizes
    if "key_value_heads" in has:
        chosen["key_value_heads"] = first.key_value_heads
    shares = "key_value_heads" in has or "key_value_heads" in sizes
    insert(anatomy.model, "mixer", name, layers=layers, settings=chosen, seed=seed)
    for number in layers:
        part = anatomy.blocks[number].part("attention")
        path = f"{anatomy.blocks[number].slot_path('attention')}.part"
        modules = trained[number].shared if shares else trained[number].repeated
        for role, module in modules.items():
            put_projection(anatomy, f"{path}.{part.roles[role]}", module)


def put_projection(anatomy: Anatomy, path: str, module: nn.Module) -> None:
    """Put a trained projection in the place of a mixer's own, recorded where it is more than that."""
    old = anatomy.model.get_submodule(path)
    if shape_of_outputs(module) != old.weight.shape[0]:  # type: ignore[union-attr, index]
        raise TransectError(
            f"{path} puts out {old.weight.shape[0]} numbers, and the trained one {shape_of_outputs(module)}"  # type: ignore
        )
    anatomy.model.set_submodule(path, laid_out(module.to(old.weight.device).train(old.training)))  # type: ignore
    if describe(module) != describe(old):
        anatomy.record.set_module(path, describe(module))


def shape_of_outputs(module: Any) -> int:
    """How many numbers a projection puts out."""
    if isinstance(module, Projection):
        return module.heads * module.head_size * module.repeats
    return module.out_features


@torch.no_grad()
def check_is_softmax(anatomy: Anatomy, layers: Sequence[int]) -> None:
    """TransectError unless attention in these blocks is softmax over queries and keys, turned as the model says.

    It is tried: on one text of random tokens, a softmax mixer with the trained projections must give what each of these
    attention modules gives. Positions that are added to scores (ALiBi), sinks, capped scores, or rotations that are
    computed inside it make it another function, of which a window and a recurrence would know nothing.
    """
    import copy

    from ..forward.description.twin import batch_for

    wanted = {str(anatomy.blocks[number].slot_path("attention")): number for number in layers}
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
    handles = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            seen[path] = args, dict(kwargs), output

        return hook

    for path in wanted:
        module = anatomy.model.get_submodule(path)
        handles.append(module.register_forward_hook(watch(path), with_kwargs=True))
    try:
        with at_rest(anatomy.model):
            batch = {key: tensor.to(anatomy.model.device) for key, tensor in batch_for(anatomy.model).items()}
            anatomy.model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    shell = copy.copy(anatomy)
    for path, number in wanted.items():
        args, kwargs, expected = seen[path]
        slot = _softmax_of(shell, number)
        given = slot(*args, **kwargs)
        ours, theirs = (one[0] if isinstance(one, tuple) else one for one in (given, expected))
        off = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp_min(1e-30))
        if not off < max(TOLERANCE, 16 * torch.finfo(ours.dtype).eps):
            raise TransectError(
                f"attention in block {number} of {anatomy.architecture.name} is not softmax over queries and keys "
                f"alone (a softmax mixer with its projections is off by {off:.2g} of the largest output): positions or "
                "caps enter its scores in a way that a window and a recurrence would leave out"
            )


def _softmax_of(anatomy: Anatomy, number: int) -> Any:
    """A softmax mixer in its slot with the projections of a block, which stays as it is."""
    from ..parts.catalog.softmax import Softmax
    from ..parts.insert import mixer_slot, sizes_of

    block = anatomy.blocks[number]
    trained, sizes = trained_projections(block), sizes_of(anatomy)
    part = Softmax(sizes.width, sizes.heads, trained.key_value_heads, sizes.head_size, sizes.causal)
    for role, module in trained.shared.items():
        setattr(part, Softmax.roles[role], module)
    return mixer_slot(anatomy, part, number).eval()
