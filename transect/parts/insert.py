"""Putting parts into a model's slots."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..anatomy import MLP, Anatomy, Block
from ..anatomy.architecture import MATRIX_ROLES
from ..anatomy.banks import link_banks
from ..anatomy.storage import shape_of
from ..anatomy.surround import AROUND, Surrounded, surround
from ..arguments import listed
from ..errors import TransectError
from ..forward.objective import task_of
from .part import Part, Sizes
from .registry import PartEntry, part_named
from .slots import BlockSlot, MixerSlot, arguments_of


def insert(
    model: Any,
    slot: str,
    part: str,
    *,
    layers: Iterable[int] | None = None,
    roles: Iterable[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Any:
    """Put a part into a slot of a model, in place and with random numbers; the model.

    slot: mixer, mlp, activation, matrix, norm or block. part: the name of a registered one, see `transect.parts`.
    layers: numbers of the blocks; default all, and for norms then the final one too. roles: in the slot of matrices,
    which ones (q, k, v, o, gate, up, down); default all. settings: the part's. seed: of its random numbers.
    Raises TransectError, before any change, if the part does not fit the model.
    """
    entry = part_named(slot, part)
    slot = entry.family  # a placement of norms stands around blocks
    anatomy = Anatomy(model, weights=next(model.parameters()).device.type != "meta")  # of a skeleton only the sizes
    chosen = entry.settings(settings or {})
    count = len(anatomy.blocks)
    numbers = list(range(count)) if layers is None else listed(layers)
    roles = None if roles is None else listed(roles)
    if not numbers or not all(0 <= number < count for number in numbers) or len(set(numbers)) != len(numbers):
        raise TransectError(f"layers should be distinct numbers from 0 to {count - 1}, not {numbers}")
    sizes = replace(sizes_of(anatomy), places=len(numbers), first=numbers[0])
    made: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for place, number in enumerate(numbers):
            here = replace(sizes, layer=number, place=place)
            if slot == "mlp" and isinstance(mlp := anatomy.blocks[number].mlp, MLP):
                here = replace(here, neurons=mlp.up.shape[0])  # narrowed ones have fewer than the config says
            for path in places(anatomy, slot, number, roles):
                if slot == "matrix":
                    here = replace(here, **_sizes_of_matrix(model.get_submodule(path)))
                made[path] = _standing(anatomy, entry, chosen, here)
        if slot == "norm" and layers is None and anatomy.final_norm is not None:
            path = f"{anatomy._prefix}{anatomy.architecture.final_norm}"
            made[path] = _standing(anatomy, entry, chosen, replace(sizes, layer=count - 1, place=count - 1))
    for path, module in made.items():
        old = model.get_submodule(path.removesuffix(f".{AROUND}") if slot == "block" else path)
        like = next((p for p in old.parameters() if p.is_floating_point()), next(model.parameters()))
        module = module.to(like).train(old.training)
        if slot == "block":
            surround(old, module)
        else:
            anatomy.model.set_submodule(path, module)
        anatomy.record.set_module(path, module.describe())
    link_banks(model)
    return model


def _standing(anatomy: Anatomy, entry: PartEntry, settings: Mapping[str, Any], sizes: Sizes) -> Any:
    """The part, as it stands in its slot."""
    asked = {name: getattr(sizes, name) for name in entry.sizes}
    part: Part = entry.function(**asked, **settings)
    if entry.family == "mixer":
        return mixer_slot(anatomy, part, sizes.layer)
    if entry.family == "block":
        return _around(anatomy, part, sizes.layer)
    return part


def mixer_slot(anatomy: Anatomy, part: Any, number: int) -> MixerSlot:
    """A mixer in the place of a block's attention."""
    architecture = anatomy.architecture
    neighbours = architecture.rotation.get("pairs") == "neighbours"
    return MixerSlot(part, number, architecture.attention_returns, neighbours, anatomy.blocks[number].attention_adds)


def _around(anatomy: Anatomy, part: Any, number: int) -> BlockSlot:
    """The part around the block of that number, told what the block has and where."""
    block, architecture = anatomy.blocks[number], anatomy.architecture
    if part.places_norms or part.runs_sublayers:
        check_places(block)
    if part.routes:
        check_routes(block)
    mlp, names = block.slot_path("mlp"), {module: name for name, module in block.module.named_modules()}
    adds = block.branch_output("mlp") if part.routes and not block.has_experts else None
    return BlockSlot(
        part, architecture.block_returns, architecture.attention if architecture.attention_adds is None else None,
        None if mlp is None or block.has_experts else mlp.removeprefix(f"{block.path}."),
        [names[norm] for norm in block.norms.values()], None if adds is None else names[adds],
    )  # fmt: skip


def check_routes(block: Block) -> None:
    """TransectError where a block cannot be run on some positions of each sequence only."""
    anatomy, architecture = block.anatomy, block.anatomy.architecture
    biased = bool({"alibi", "position_bias"} & set(arguments_of(block.module)))
    reasons = {
        "is none that predicts the next token": task_of(anatomy.model) != "causal",
        "norms behind the residual sum": block.post_norm,
        "adds the stream in its attention": architecture.attention_adds is not None,
        "tells positions by a bias of its attention": biased and getattr(anatomy.config, "alibi", True),
        "has no attention any more, or a part in its place": block.attention is None,
        "shares keys and values between blocks": bool(getattr(anatomy.config, "num_kv_shared_layers", 0)),
    }
    for reason, holds in reasons.items():
        if holds:
            raise TransectError(
                f"positions are routed around blocks of causal models with attention of their own, and "
                f"{architecture.name} (block {block.index}) {reason}: take a model such as llama, gpt2 or qwen3"
            )


def check_places(block: Block) -> None:
    """TransectError where norms cannot be placed anew, because the block is more than attention and MLP with a norm."""
    architecture = block.anatomy.architecture
    reasons = {
        "norms behind the residual sum": block.post_norm,
        "runs attention and MLP side by side": block.parallel,
        "multiplies what its sublayers add": block.residual_multiplier != 1,
        "adds the stream in its attention": architecture.attention_adds is not None,
        "has no MLP in one module": block.slot_path("mlp") is None or block.has_experts,
        f"has the norms {', '.join(block.norms)}": list(block.norms) != ["attention_input", "mlp_input"],
    }
    for reason, holds in reasons.items():
        if holds:
            raise TransectError(
                "norms can be placed anew where a block has one in front of attention and one in front of its MLP, and "
                f"the block of {architecture.name} {reason}: take a base such as llama, gpt2 or vit"
            )


def _sizes_of_matrix(host: Any) -> dict[str, Any]:
    outputs, inputs = shape_of(host)
    return {"inputs": inputs, "outputs": outputs, "bias": host.bias is not None}


def sizes_of(anatomy: Anatomy) -> Sizes:
    """The sizes that the model's config gives."""
    heads = anatomy.config_value("heads")
    config = anatomy.config
    eps = next((getattr(config, name) for name in _EPS if getattr(config, name, None)), 1e-6)
    width = anatomy.config_value("hidden")
    return Sizes(
        width=width,
        heads=heads,
        key_value_heads=anatomy.config_value("key_value_heads") or heads,
        head_size=anatomy.head_size,
        neurons=anatomy.config_value("neurons") or 4 * width,
        length=getattr(config, "max_position_embeddings", None) or _embedded_positions(anatomy),
        causal=task_of(anatomy.model) == "causal",
        layers=len(anatomy.blocks),
        eps=eps,
    )


def _embedded_positions(anatomy: Anatomy) -> int:
    """How many positions an image model has embeddings of (1 x positions x width); 0 if it is none."""
    named = anatomy.model.named_parameters()
    return next((one.shape[1] for name, one in named if name.endswith("position_embeddings") and one.dim() == 3), 0)


_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")


def places(anatomy: Anatomy, slot: str, number: int, roles: Collection[str] | None = None) -> list[str]:
    """Paths, from the model's root, of the modules that a slot of a block consists of; TransectError if it has none.

    roles: of matrices, which ones; those that are stored as one are replaced as one.
    """
    architecture, block = anatomy.architecture, anatomy.blocks[number]
    if slot in ("mixer", "mlp") and isinstance(block.module, Surrounded) and block.module.leading.routes:
        raise TransectError(
            f"a part around block {number} runs it on some positions only, and knows its attention and MLP as they "
            "are: change these first, and route then"
        )
    if slot == "block":
        if isinstance(block.module, Surrounded):
            raise TransectError(f"a part stands around block {number} already: take a model without one")
        return [f"{block.path}.{AROUND}"]
    if slot == "matrix":
        if block.has_experts:
            raise TransectError(f"{architecture.name} has experts, whose matrices no part can stand for")
        chosen = set(MATRIX_ROLES if roles is None else roles)
        found = {matrix.path: {matrix.role} for matrix in reversed(block.matrices())}
        for matrix in block.matrices():
            found[matrix.path].add(matrix.role)
        paths = [path for path, here in found.items() if here & chosen]
        if unknown := chosen - set(MATRIX_ROLES):
            raise TransectError(f"unknown roles {sorted(unknown)}; known: {', '.join(MATRIX_ROLES)}")
        if not paths:
            raise TransectError(f"block {number} has no matrix of the roles {', '.join(sorted(chosen))}")
        return paths
    if slot == "mixer":
        if anatomy.post_norm:
            raise TransectError(
                f"the attention module of {architecture.name} norms the stream by itself, so that no mixer can stand "
                "for it: take a base whose blocks norm first, such as llama or gpt2 (or vit)"
            )
        return [str(block.slot_path("attention"))]
    if slot == "mlp":
        path = block.slot_path("mlp")
        if path is None or block.has_experts:
            raise TransectError(f"{architecture.name} has no MLP in one module: no part can be put in its place")
        if _arguments_needed(block.model.get_submodule(path)) > 1:
            raise TransectError(
                f"the MLP of {architecture.name} takes more than its input (it adds the stream by itself), so that no "
                "part can stand for it: take a base such as llama or gpt2"
            )
        return [path]
    if slot == "activation":
        if architecture.activation is None or block.has_experts:
            raise TransectError(f"the description of {architecture.name} names no activation that could be replaced")
        if block.part("mlp") is not None:
            raise TransectError(f"the MLP of block {number} is a part, which brings its own activation")
        return [f"{block.path}.{architecture.activation}"]
    return [
        name for name, module in block.model.named_modules() if any(module is norm for norm in block.norms.values())
    ]


def _arguments_needed(module: Any) -> int:
    """How many arguments its forward asks for."""
    asked = inspect.signature(module.forward).parameters.values()
    return sum(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in asked)
