"""Trained MLPs as groups of neurons: what every conversion reads of them, finds out on text, and puts into a part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from ..anatomy import MLP, Anatomy, Block
from ..anatomy.storage import is_dense
from ..errors import TransectError
from ..forward import Batch, real_positions, run_body
from ..parts import insert
from ..parts.experts import Function, SplitMLP
from ..parts.insert import places
from .attention import TOLERANCE

ROWS = 4096  # positions of the text that are looked at; each block's inputs at these are in memory at once
Partition = Literal["co-activation", "random", "order"]


@dataclass(frozen=True)
class TrainedMLP:
    """A trained MLP's numbers: up and gate (neurons x d), down (d x neurons), biases or None; see `Function`."""

    up: Tensor
    down: Tensor
    gate: Tensor | None
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None
    function: str

    @property
    def neurons(self) -> int:
        """How many there are."""
        return len(self.up)

    @property
    def settings(self) -> dict[str, Any]:
        """Of a part that is to hold it."""
        return {
            "hidden": self.neurons, "function": self.function, "gated": self.gate is not None,
            "bias": self.up_bias is not None or self.gate_bias is not None, "out_bias": self.down_bias is not None,
        }  # fmt: skip

    def activations(self, x: Tensor) -> Tensor:
        """What down reads: (n x d) -> (n x neurons)."""
        up, act = functional.linear(x, self.up, self.up_bias), ACT2FN[self.function]
        return act(up) if self.gate is None else act(functional.linear(x, self.gate, self.gate_bias)) * up

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(self.activations(x), self.down, self.down_bias)

    @torch.no_grad()
    def put(self, split: SplitMLP, neurons: Tensor) -> None:
        """Copy these neurons, in this order, into the groups of a part."""
        shape = (split.groups, split.size)
        for held, stored in ((split.up, self.up), (split.gate, self.gate), (split.down, self.down.T)):
            if held is not None and stored is not None:
                held.copy_(stored[neurons].view(*shape, -1))
        for held, stored in ((split.up_bias, self.up_bias), (split.gate_bias, self.gate_bias)):
            if held is not None:
                held.copy_(stored[neurons].view(shape) if stored is not None else torch.zeros_like(held))


@torch.no_grad()
def trained_mlp(block: Block) -> TrainedMLP:
    """What a block's MLP has learned, where it lies; TransectError where it is no plain MLP in one module.

    It is tried: on random inputs the matrices with the function must give what the module gives.
    """
    anatomy, number = block.anatomy, block.index
    (path,) = places(anatomy, "mlp", number)
    mlp = block.mlp
    if not isinstance(mlp, MLP):
        raise TransectError(
            f"block {number} has no MLP of the model's own (a part stands there, or it was dropped): convert the model "
            "that it came from"
        )
    for matrix in (mlp.gate, mlp.up, mlp.down):
        if matrix is not None and not is_dense(matrix.module):
            raise TransectError(
                f"{matrix.name} is stored as {type(matrix.module).__name__}: convert first, and compress what comes out"
            )
    gate = mlp.gate
    found = TrainedMLP(
        mlp.up.weight, mlp.down.weight, None if gate is None else gate.weight, mlp.up.bias,
        None if gate is None else gate.bias, mlp.down.bias, _function_of(mlp, number),
    )  # fmt: skip
    module: Any = anatomy.model.get_submodule(path)
    draws = torch.Generator().manual_seed(number)
    x = torch.randn(1, 8, found.up.shape[1], generator=draws).to(found.up)
    training = module.training
    ours, theirs = found(x).float(), module.eval()(x)
    module.train(training)
    off = float((ours - theirs.float()).abs().max() / theirs.float().abs().max().clamp_min(1e-30))
    if not off < max(TOLERANCE, 16 * torch.finfo(x.dtype).eps):
        raise TransectError(
            f"the MLP of block {number} of {anatomy.architecture.name} is more than its matrices and {found.function} "
            f"(these are off by {off:.2g} of the largest output): it cannot be cut into experts"
        )
    return found


def _function_of(mlp: MLP, number: int) -> str:
    """The name of the function between the matrices, found by its values; TransectError for one without a name."""
    activation = mlp.activation
    if activation is not None and not any(True for _ in activation.parameters()):
        x = torch.linspace(-6, 6, 97)
        values = activation(x)
        for name in get_args(Function):
            if values.shape == x.shape and torch.allclose(values, ACT2FN[name](x), atol=1e-6, rtol=0):
                return name
    raise TransectError(
        f"the activation of block {number}, {type(activation).__name__ if activation else 'a function without a name'},"
        f" is none of {', '.join(get_args(Function))}: its MLP cannot be cut into experts"
    )


@torch.no_grad()
def mlp_inputs(anatomy: Anatomy, layers: Sequence[int], batches: Iterable[Batch]) -> dict[int, Tensor]:
    """What the MLPs of these blocks read of the text (at most ROWS positions x d each), spread over all batches.

    Of the model as it is now; padding is left out.
    """
    batches = list(batches)
    each = -(-ROWS // len(batches))
    found: dict[int, list[Tensor]] = {number: [] for number in layers}
    where: Tensor | None = None

    def reader(number: int) -> Any:
        def read(module: nn.Module, given: tuple[Any, ...], more: dict[str, Any]) -> None:
            x = (given[0] if given else more["hidden_states"]).flatten(0, -2)
            at = torch.arange(len(x)) if where is None else where
            chosen = at[:: max(1, -(-len(at) // each))]
            found[number].append(x[chosen.to(x.device)])

        return read

    modules = {number: anatomy.model.get_submodule(places(anatomy, "mlp", number)[0]) for number in layers}
    handles = [m.register_forward_pre_hook(reader(number), with_kwargs=True) for number, m in modules.items()]
    try:
        for batch in batches:
            real = real_positions(batch)
            where = None if real is None else real.flatten().nonzero()[:, 0].cpu()
            run_body(anatomy.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {number: torch.cat(pieces)[:ROWS] for number, pieces in found.items()}


@torch.no_grad()
def in_groups(
    mlp: TrainedMLP, groups: int, kind: Partition, generator: torch.Generator, x: Tensor | None = None
) -> Tensor:
    """The neurons in an order in which each next neurons / groups of them are an expert.

    order: as they are. random. co-activation: neurons that are active at the same positions come together: balanced
    k-means of what each adds to the output (|activation| times the length of its column of down) at the inputs x
    (n x d), by correlation (our choice; the paper cuts in order).
    """
    device, count = mlp.up.device, mlp.neurons
    if kind == "order":
        return torch.arange(count, device=device)
    if kind == "random":
        return torch.randperm(count, generator=generator).to(device)
    assert x is not None
    added = mlp.activations(x).float().abs() * mlp.down.float().norm(dim=0)
    rows = functional.normalize((added - added.mean(0)).T, dim=-1)  # neurons x n
    centres = rows[torch.randperm(count, generator=generator)[:groups].to(device)]
    for _ in range(10):
        group = balanced(rows @ centres.T, count // groups)
        sums = torch.zeros_like(centres).index_add(0, group, rows)
        centres = functional.normalize(sums, dim=-1)
    return balanced(rows @ centres.T, count // groups).argsort(stable=True)


def balanced(scores: Tensor, size: int) -> Tensor:
    """The group of each row, `size` rows in each: no row and group would both gain by another choice.

    scores: (rows x groups), with rows = size x groups. Rows ask for the best group that has not refused them, groups
    keep the best that ask (Gale and Shapley 1962).
    """
    left = scores.clone()
    while True:
        group = left.argmax(dim=1)
        crowded = [number for number in range(scores.shape[1]) if int((group == number).sum()) > size]
        if not crowded:
            return group
        for number in crowded:
            asking = (group == number).nonzero()[:, 0]
            refused = asking[scores[asking, number].argsort(descending=True, stable=True)[size:]]
            left[refused, number] = -torch.inf


@torch.no_grad()
def fit_router(router: nn.Linear, x: Tensor, wanted: Tensor, ridge: float = 1e-2) -> None:
    """Let the gate's scores be the linear function of x that is nearest to these (n x experts), by ridge regression.

    ridge: what is added to the diagonal, as a share of its mean.
    """
    x, wanted = x.double(), wanted.double()
    mean, middle = x.mean(0), wanted.mean(0)
    x = x - mean
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ (wanted - middle)).T
    router.weight.copy_(weight)
    if router.bias is not None:
        router.bias.copy_(middle - weight @ mean)


@torch.no_grad()
def lengths_added(split: SplitMLP, x: Tensor) -> Tensor:
    """How long a vector each group adds (n x groups) at these inputs, relative to the groups' mean."""
    lengths = torch.stack([split.one(number, x).float().norm(dim=-1) for number in range(split.groups)], dim=-1)
    return lengths / lengths.mean(-1, keepdim=True).clamp_min(1e-30)


@torch.no_grad()
def put_experts(
    anatomy: Anatomy, number: int, name: str, mlp: TrainedMLP, settings: Mapping[str, Any], seed: int
) -> Any:
    """A part of experts in the place of a block's MLP, still without its neurons; the part."""
    insert(anatomy.model, "mlp", name, layers=[number], settings={**settings, **mlp.settings}, seed=seed)
    part = anatomy.blocks[number].part("mlp")
    if part.out_bias is not None and mlp.down_bias is not None:
        part.out_bias.copy_(mlp.down_bias)
    return part
