"""Layer fusion: a removed block's weights become learned, masked additions to its neighbours' (arXiv:2411.14507).

Every stored matrix W of a receiving block becomes W + B A + Σ_k (P_k Q_k) o W_k, with W_k that of the k-th removed
block that it receives and o elementwise; a bias b becomes b + Σ_k c_k o b_k. B, P and c start at zero, so the group
starts as the plain removal. The terms are of the same form however a matrix is stored (transposed in GPT-2, several in
one); matrices stored as one count as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ....anatomy import Block
from ....anatomy.storage import is_dense
from ....errors import Diverged, NotApplicable, TransectError
from ....forward.blocks import Call, Feed, run_block
from ....training import Check, Machine, Problem, Run, Schedule, State
from ....training import train as train_problem

Distance = Literal["kl", "mse"]
_BETAS = (0.9, 0.95)


class FusedMatrix:
    """W + B A + Σ_k (P_k Q_k) o W_k (m x n), for one stored matrix; factors of rank r, at most min(m, n), in float32 or
    wider. k counts the removed blocks that it has received; see `receive`.

    The authors fix the rank of B A at 128, where P Q follows the setting; here both follow it.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        self.weight = weight.detach()
        self.dtype = _wide(weight).dtype
        self.rank, self.generator = min(rank, *weight.shape), generator
        self.b, self.a = self._factors()
        self.terms: list[tuple[Tensor, Tensor, Tensor]] = []  # P_k, Q_k and W_k

    def receive(self, removed: Tensor) -> None:
        """Add the term of a removed block's matrix W_k, with P_k = 0."""
        self.terms.append((*self._factors(), removed.detach()))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Zeros (m x r), and Kaiming-uniform numbers with a = √5 (r x n): uniform up to 1 / √n."""
        m, n = self.weight.shape
        random = torch.empty(self.rank, n, dtype=self.dtype).uniform_(-(n**-0.5), n**-0.5, generator=self.generator)
        zeros = self.weight.new_zeros(m, self.rank, dtype=self.dtype)
        return _learnable(zeros), _learnable(random.to(self.weight.device))

    @property
    def coefficients(self) -> list[Tensor]:
        """What learns at the rate of the injection: the masks P_k Q_k."""
        return [factor for p, q, _ in self.terms for factor in (p, q)]

    @property
    def repairs(self) -> list[Tensor]:
        """What learns at the small rate: the low-rank change B A."""
        return [self.b, self.a]

    def effective(self) -> Tensor:
        """W + B A + Σ_k (P_k Q_k) o W_k (d_out x d_in)."""
        weight = self.weight + self.b @ self.a
        for p, q, removed in self.terms:
            weight = weight.addcmul(p @ q, removed.to(self.dtype))
        return weight


class FusedVector:
    """b + Σ_k c_k o b_k for a bias; norms, and biases where nothing is injected, are themselves learned.

    As in the authors' code, b itself is learned too, at the small rate. There, the biases of one removed block take the
    place of those of the one before it, under the same c; here each has its own, as the weights do.
    """

    def __init__(self, own: Tensor) -> None:
        self.own = _learnable(_wide(own.detach()).clone())
        self.terms: list[tuple[Tensor, Tensor]] = []  # c_k and b_k

    def receive(self, removed: Tensor) -> None:
        """Add the term of a removed block's bias b_k, with c_k = 0."""
        self.terms.append((_learnable(torch.zeros_like(self.own)), _wide(removed.detach())))

    @property
    def coefficients(self) -> list[Tensor]:
        """What learns at the rate of the injection: c_k."""
        return [c for c, _ in self.terms]

    @property
    def repairs(self) -> list[Tensor]:
        """What learns at the small rate: b."""
        return [self.own]

    def effective(self) -> Tensor:
        """b + Σ_k c_k o b_k."""
        bias = self.own
        for c, removed in self.terms:
            bias = bias.addcmul(c, removed)
        return bias


Parts = dict[str, FusedMatrix | FusedVector]  # of one block, by parameter name within it


class FusedGroup:
    """The blocks that receive the removed block's weights: run with what is learned, then written as plain weights.

    receivers: the group without the removed block, in order; untouched until `collapse`.
    inject: False leaves the removed block's weights out, so that only low-rank changes, norms and biases are learned.
    learned: the parts of every block that has been in a group before, by its module; they go on learning, and the new
        term joins theirs. The receivers' parts are entered, and what the removed block had is forgotten: its weights
        are injected as they stand in its module, its own terms collapsed.
    """

    def __init__(
        self,
        receivers: Sequence[Block],
        removed: Block,
        rank: int,
        generator: torch.Generator,
        inject: bool = True,
        learned: dict[nn.Module, Parts] | None = None,
    ) -> None:
        learned = {} if learned is None else learned
        self.modules = [block.module for block in receivers]
        for block in receivers:
            if block.module not in learned:
                learned[block.module] = self._parts(block, rank, generator)
        self.parts = [learned[module] for module in self.modules]
        learned.pop(removed.module, None)
        weights, biases = _stored(removed)
        for name, tensor in removed.module.named_parameters():
            if inject and (id(tensor) in weights or id(tensor) in biases):
                for parts in self.parts:
                    parts[name].receive(tensor)

    @staticmethod
    def _parts(block: Block, rank: int, generator: torch.Generator) -> Parts:
        weights, _ = _stored(block)
        return {
            name: FusedMatrix(tensor, rank, generator) if id(tensor) in weights else FusedVector(tensor)
            for name, tensor in block.module.named_parameters()
        }

    @property
    def coefficients(self) -> list[Tensor]:
        """P_k, Q_k and c_k of all receivers."""
        return [tensor for parts in self.parts for part in parts.values() for tensor in part.coefficients]

    @property
    def repairs(self) -> list[Tensor]:
        """A, B, norms and biases of all receivers."""
        return [tensor for parts in self.parts for part in parts.values() for tensor in part.repairs]

    def run(self, hidden: Tensor, calls: Sequence[Call]) -> Tensor:
        """The residual stream (B, T, d) after the group. calls: the receivers' other arguments."""
        for module, parts, (args, kwargs) in zip(self.modules, self.parts, calls, strict=True):
            weights = {name: part.effective().to(hidden.dtype) for name, part in parts.items()}
            output = functional_call(module, weights, (hidden, *args), kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    @torch.no_grad()
    def collapse(self) -> None:
        """Let the receivers hold every W + B A + Σ (P Q) o W', every bias and every norm; the parts stay as they are.

        The tensors are exchanged, not written to: the parts begin from the old ones.
        """
        for module, parts in zip(self.modules, self.parts, strict=True):
            stored = dict(module.named_parameters())
            for name, part in parts.items():
                stored[name].data = part.effective().to(stored[name].dtype)


def _stored(block: Block) -> tuple[set[int], set[int]]:
    """The ids of the tensors that hold a block's matrices, and of those that hold their biases."""
    hosts = [matrix.module for matrix in block.matrices()]
    return {id(host.weight) for host in hosts}, {id(host.bias) for host in hosts if host.bias is not None}


@dataclass(frozen=True)
class Lesson:
    """One batch for a group: what enters it (B, T, d), the receivers' other arguments, what it shall put out (B, T, d).

    mask: (B, T), True where a position counts; None: all do.
    """

    hidden: Tensor
    calls: list[Call]
    target: Tensor
    mask: Tensor | None


@torch.no_grad()
def lessons_of(feeds: Iterable[Feed], blocks: Sequence[Block], first: int, removed: int, size: int) -> list[Lesson]:
    """What a group of blocks first ... first + size - 1 does now, to be learned by it without block `removed`.

    feeds: what enters block 0. The blocks before the group and the group run once.
    """
    window = range(first, first + size)
    lessons = []
    for feed in feeds:
        hidden = feed.hidden
        for index in range(first):
            hidden = run_block(blocks[index].module, hidden, feed.calls[index])
        target = hidden
        for index in window:
            target = run_block(blocks[index].module, target, feed.calls[index])
        calls = [feed.calls[index] for index in window if index != removed]
        lessons.append(Lesson(hidden, calls, target, None if feed.mask is None else feed.mask.bool()))
    return lessons


def train(
    group: FusedGroup,
    lessons: Sequence[Lesson],
    epochs: int,
    loss: Distance,
    fusion_rate: float,
    repair_rate: float,
    on_epoch: Callable[[float], None] = lambda loss: None,
) -> list[float]:
    """Train a group to put out the lessons' targets; every epoch's mean loss, of which `on_epoch` is told.

    Adam, a step a batch, in order, with both rates on a cosine down to 0. fusion_rate: of P, Q and c. repair_rate: of
    A, B, norms and biases. Raises Diverged if the loss becomes NaN or infinite.
    """
    if not lessons or not epochs:
        return []
    found = {"fusion": (group.coefficients, fusion_rate), "repair": (group.repairs, repair_rate)}
    named: dict[str, Any] = {f"{kind} {i}": one for kind, (held, _) in found.items() for i, one in enumerate(held)}
    losses: list[float] = []

    def ended(check: Check) -> None:
        losses.append(check.loss)
        on_epoch(check.loss)

    problem = Problem(
        "fusing", named, lessons,
        loss=lambda lesson: (distance(group.run(lesson.hidden, lesson.calls), lesson.target, lesson.mask, loss), 1),
        measure=None, set_mode=lambda: None,
        rates={name: found[name.partition(" ")[0]][1] for name in named},
    )  # fmt: skip
    schedule = Schedule(
        lr=1.0, epochs=epochs, every=len(lessons), warm_up=0.0, clip=None, shuffle=False,
        options={"beta1": _BETAS[0], "beta2": _BETAS[1]},
    )  # fmt: skip
    try:
        train_problem(problem, Run(schedule, Machine(lessons[0].hidden.device), State(None), None, ended), {})
    except Diverged:
        raise Diverged(
            f"training the fused group diverged; choose rates below fusion_rate={fusion_rate:g} and "
            f"repair_rate={repair_rate:g}"
        ) from None
    return losses


def distance(student: Tensor, target: Tensor, mask: Tensor | None, loss: Distance) -> Tensor:
    """How far the group's output (B, T, d) is from its target, averaged over the positions that count.

    "kl": KL(softmax(target) || softmax(student)) over the d features of a position. The authors' code takes the softmax
    over the sequences of a batch instead, so that its loss depends on how sequences are batched and is 0 for a batch of
    one. "mse": mean squared difference.
    """
    if mask is not None:
        student, target = student[mask], target[mask]
    student, target = _wide(student), _wide(target)
    if loss == "mse":
        return functional.mse_loss(student, target)
    d = target.shape[-1]
    student, target = student.reshape(-1, d).log_softmax(-1), target.reshape(-1, d).log_softmax(-1)
    return functional.kl_div(student, target, reduction="batchmean", log_target=True)


def window(removed: int, blocks: int, size: int) -> tuple[int, int]:
    """First block and number of blocks of the group: half of them before the removed one, clamped at the ends."""
    size = min(size, blocks)
    return min(max(removed - size // 2, 0), blocks - size), size


def check_alike(blocks: Sequence[Block]) -> None:
    """Refuse blocks that cannot receive one another's weights: structured ones, and ones of different shapes."""
    first = {name: tuple(tensor.shape) for name, tensor in blocks[0].module.named_parameters()}
    for block in blocks:
        if block.has_experts:
            raise NotApplicable(
                f"fusion adds whole matrices, and block {block.index} stores those of its experts together; epochs=0 "
                "removes blocks without fusing them"
            )
        for matrix in block.matrices():
            if not is_dense(matrix.module):
                raise TransectError(
                    f"{matrix.name} is stored as {type(matrix.module).__name__}, and fusion needs dense matrices; "
                    "remove blocks first and compress matrices afterwards"
                )
        shapes = {name: tuple(tensor.shape) for name, tensor in block.module.named_parameters()}
        for name in sorted(shapes.keys() | first.keys()):
            if shapes.get(name) != first.get(name):
                raise TransectError(
                    f"fusion needs blocks of one shape, but {name} is {shapes.get(name, 'absent')} in block "
                    f"{block.index} and {first.get(name, 'absent')} in block {blocks[0].index}; epochs=0 removes "
                    "blocks without fusing them"
                )


def _wide(tensor: Tensor) -> Tensor:
    """The same in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _learnable(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor)
