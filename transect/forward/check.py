"""Whether a description of an architecture is true: what must hold of it, tried on a tiny random model.

A description is believed by everything else, and a wrong one gives wrong numbers without a word. So one that a user
brings is checked before its first use, and `transect check-architecture` shows every check with its number. A check is
a function of the bench that returns a relative error; it raises NotApplicable where it means nothing for the model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import MLP, Anatomy, Architecture, Block, ExpertMatrix, Experts, experts_apart, verify_with
from ..errors import NotApplicable, TransectError, WrongDescription
from .blocks import feeds_of, run_blocks
from .change import changed
from .lens import Lens
from .objective import task_of
from .twin import batch_for, class_and_config, plain_experts, small_config, twin
from .watch import watch

# Of the largest value. Norms compute in float32 inside; a wrong description is off by a hundredth or more.
LIMIT = 1e-4
SMALL = 5_000_000  # parameters of a user's own model that is checked itself where no tiny one can be made


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    what: a sentence. keys: of the description, where to look if it does not. error: relative to the largest value;
    None where it could not be measured. note: why not.
    """

    what: str
    keys: tuple[str, ...]
    error: float | None
    note: str = ""
    applies: bool = True

    @property
    def passed(self) -> bool:
        return not self.applies or (self.error is not None and self.error <= LIMIT)

    @property
    def complaint(self) -> str:
        """What is wrong, and where to look."""
        how = self.note if self.error is None else f"off by {self.error:.2g} of the largest value"
        return f"{self.what}: {how} (look at {', '.join(f'`{key}`' for key in self.keys)})"


@dataclass
class Bench:
    """A small model under a description, and what it does before anything is changed."""

    model: Any
    architecture: Architecture
    batch: dict[str, Tensor] = field(init=False)
    output: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.batch = batch_for(self.model)
        self.output = self.run(self.model)

    @property
    def anatomy(self) -> Anatomy:
        return Anatomy(self.model, self.architecture)

    def copy(self) -> Anatomy:
        """A copy of the model that may be changed."""
        return Anatomy(copy.deepcopy(self.model), self.architecture)

    @torch.no_grad()
    def run(self, model: Any) -> Tensor:
        """Logits, or the last state of a model without a head."""
        output = model(**self.batch)
        return output[0] if getattr(output, "logits", None) is None else output.logits

    def off(self, anatomy: Anatomy, reference: Anatomy | None = None) -> float:
        """How far a changed model is from another, or from the unchanged one."""
        return distance(self.run(anatomy.model), self.output if reference is None else self.run(reference.model))


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinity where something is not finite or has no value."""
    if found.shape != expected.shape:
        raise TransectError(f"the shape is {tuple(found.shape)}, and should be {tuple(expected.shape)}")
    worst = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return float(worst) if torch.isfinite(worst) else float("inf")


_checks: list[tuple[str, tuple[str, ...], Callable[[Bench], float]]] = []


def check(what: str, *keys: str) -> Callable[[Callable[[Bench], float]], Callable[[Bench], float]]:
    """Decorator: registers a check; they are made in the order of this file."""

    def register(function: Callable[[Bench], float]) -> Callable[[Bench], float]:
        _checks.append((what, keys, function))
        return function

    return register


_under_check: list[Architecture] = []  # their models are opened by the checks themselves


def check_description(model: Any, architecture: Architecture) -> list[Check]:
    """Make every check on a small model (float64, better random than trained), which stays as it is."""
    _under_check.append(architecture)
    try:
        bench = Bench(model, architecture)
        return [_made(bench, what, keys, function) for what, keys, function in _checks]
    finally:
        _under_check.pop()


def _made(bench: Bench, what: str, keys: tuple[str, ...], function: Callable[[Bench], float]) -> Check:
    try:
        return Check(what, keys, function(bench))
    except NotApplicable as reason:
        return Check(what, keys, None, str(reason), applies=False)
    except Exception as error:  # a wrong path, a wrong shape, a module that does not run any more: each a wrong key
        return Check(what, keys, None, " ".join(f"{type(error).__name__}: {error}".split())[:300])


def check_architecture(architecture: Architecture, model: Any = None) -> list[Check]:
    """Check a description on a tiny random model: of the model's class and config, or of its first model type's.

    Where none can be made from the model's config, a small model is checked itself; TransectError for a large one.
    """
    if model is None:
        subject = twin(*class_and_config(architecture.model_types[0]), architecture)
    else:
        subject = _subject(model, architecture)
    if subject is None:
        raise TransectError(f"no tiny {type(model).__name__} can be made from its config, and this one is not small")
    return check_description(subject, architecture)


_verified: list[tuple[Architecture, type, str]] = []


def verify(model: Any, architecture: Architecture) -> None:
    """Raise WrongDescription unless the description is true of models like this one; done once for each kind.

    On a tiny random model of the same class and config; where there is none to be had, on a copy of the model itself
    if it is small. A warning says so where neither is possible.
    """
    if any(architecture is one for one in _under_check):
        return
    try:
        config = small_config(model.config, architecture).to_json_string()
    except Exception:  # each config has its own way to refuse
        config = ""
    kind = (architecture, type(model), config)
    if kind in _verified:
        return
    subject = _subject(model, architecture)
    if subject is None:
        warnings.warn(
            f"the architecture description {architecture.name!r} could not be checked: no tiny "
            f"{type(model).__name__} can be made from its config",
            stacklevel=4,
        )
    else:
        failed = [made for made in check_description(subject, architecture) if not made.passed]
        if failed:
            raise WrongDescription(
                f"the architecture description {architecture.name!r} does not fit {type(model).__name__}: "
                f"{failed[0].complaint}; {len(failed) - 1} more of its checks fail. `transect check-architecture` "
                "shows them all"
            )
    _verified.append(kind)


def _subject(model: Any, architecture: Architecture) -> Any:
    try:
        made = twin(type(model), model.config, architecture)
        Bench(made, architecture)
        return made
    except Exception:  # a class that cannot be made from its config alone, a size that it refuses
        parameters = list(model.parameters())
        if sum(parameter.numel() for parameter in parameters) > SMALL or any(p.is_meta for p in parameters):
            return None
        return copy.deepcopy(model).eval().double()


verify_with(verify)


# What must hold, from what the rest builds on to what is built.


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
    with experts_apart(matrices), _hooks() as handles:
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
    if not _any(by_query[:, place]):
        raise TransectError("the heads do not depend on q")
    if _any(by_query[:, others]):
        raise TransectError("a query acts at other positions than its own, as a key does")
    if not _any(by_key[:, others]):
        raise TransectError("no position depends on the key of another")
    return distance(doubled, 2 * plain)


def _any(change: Tensor) -> bool:
    return bool(change.abs().max() > 1e-6)


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


@check("each sublayer reads what the norms say", "norms", "post_norm")
def _norms(bench: Bench) -> float:
    """q's input is the block's, behind `attention_input`; up's is the stream, behind `mlp_input`.

    In a post-norm model up reads what `attention_output` gives, and the next block what `mlp_output` does.
    """
    anatomy = bench.anatomy
    outputs: dict[Any, Any] = {}  # by the norm's id
    inputs: dict[Any, Any] = {}  # by role and block
    with _hooks() as handles:
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


class _hooks:
    """A list of handles of hooks, which are removed at the end."""

    def __enter__(self) -> list[Any]:
        self.handles: list[Any] = []
        return self.handles

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


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
    if not _any(without - plain):
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


@check("another order of neurons or experts changes nothing", "matrices", "fused", "experts")
def _order_of_neurons(bench: Bench) -> float:
    anatomy = bench.copy()
    for block in anatomy.blocks:
        mlp = block.mlp
        assert mlp is not None  # nothing was dropped
        mlp.keep(reversed(range(len(mlp.experts) if isinstance(mlp, Experts) else mlp.neurons)))
    return bench.off(anatomy)


@check(
    "without some heads it is as if they gave nothing", "attributes", "head_bias", "head_parameters", "q_norm", "k_norm"
)
def _fewer_heads(bench: Bench) -> float:
    """Every group loses all query heads but its first, and then all groups but the last go."""
    anatomy, zeroed = bench.copy(), bench.copy()
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
    o = zeroed.blocks[1].matrix("o")
    kept = slice(last * size, (last + 1) * size)
    weight = torch.zeros_like(o.weight)
    weight[:, kept] = o.weight[:, kept]
    o.write(weight)
    error = bench.off(anatomy, zeroed)  # it must run in any case
    if joint:
        raise NotApplicable("it runs, but a norm over all heads at once changes with their number")
    return error


@check("without some neurons it is as if they gave nothing", "matrices", "fused", "experts")
def _fewer_neurons(bench: Bench) -> float:
    anatomy, zeroed = bench.copy(), bench.copy()
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
    anatomy, zeroed = bench.copy(), bench.copy()
    block = anatomy.blocks[index]
    if block.post_norm:
        raise NotApplicable("a sublayer of a post-norm model cannot be dropped")
    getattr(block, unit).drop()
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
