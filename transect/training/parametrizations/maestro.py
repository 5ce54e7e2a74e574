"""Maestro: factors whose components are ordered by importance and die out in training (Horváth et al., ICML 2024,
arXiv:2308.14929).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import OutOfReach, TransectError
from ...operators import LowRank, Operator
from ...parameters import Range
from .registry import parametrization
from .stand_in import StandIn, Together

ROUNDS = 4  # in which the final cut is made
_BELOW_ROOT = 1e-12  # the root of a sum of squares has no gradient at 0


class Ordered(StandIn):
    """y = U (V x) + b with U (m x R) and V (R x n), R = min(m, n), of which the first components are used.

    Component j is U[:, j] and V[j, :]. From W = P Σ Qᵀ: U = P Σ^½, V = Σ^½ Qᵀ. A component that has died out is masked
    and really cut only at the end.
    """

    kept: Tensor  # R of the components that have not died out, while it is trained
    cut: Tensor  # how many of them stay at the end: what evaluation mode uses

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if not bool(wide.isfinite().all()):
            raise TransectError("the weight is not finite, so that it has no singular values")
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        root = values.sqrt()
        self.u = nn.Parameter((left * root).to(weight.dtype))
        self.v = nn.Parameter((root[:, None] * right).to(weight.dtype))
        self.register_buffer("kept", torch.tensor(len(root)))
        self.register_buffer("cut", torch.tensor(len(root)))
        self._limit: int | None = None

    @property
    def rank(self) -> int:
        """How many components are in use."""
        if self._limit is not None:
            return self._limit
        return int(self.kept if self.training else self.cut)

    def prefix(self, share: float) -> int:
        """⌈p R⌉ components, R being those that have not died out."""
        return math.ceil(share * int(self.kept) - 1e-9)  # 3/7 of 7 is 3

    @contextmanager
    def limited(self, rank: int) -> Iterator[None]:
        """Inside the `with` only so many components are used."""
        self._limit = rank
        try:
            yield
        finally:
            self._limit = None

    @property
    def weight(self) -> Tensor:
        rank = self.rank
        return self.u[:, :rank] @ self.v[:rank]

    def forward(self, x: Tensor) -> Tensor:
        rank = self.rank
        return functional.linear(functional.linear(x, self.v[:rank]), self.u[:, :rank], self.bias)

    def suffixes(self) -> tuple[Tensor, Tensor]:
        """‖U[:, j:]‖ and ‖V[j:, :]‖ of every component j that has not died out."""
        kept = int(self.kept)
        with torch.autocast(self.u.device.type, enabled=False):
            wide = torch.promote_types(self.u.dtype, torch.float32)
            squares = (self.u[:, :kept].to(wide).square().sum(0), self.v[:kept].to(wide).square().sum(1))
        left, right = ((one.flip(0).cumsum(0).flip(0) + _BELOW_ROOT).sqrt() for one in squares)
        return left, right

    def penalty(self) -> Tensor:
        """The hierarchical group lasso, Σ_j (‖U[:, j:]‖ + ‖V[j:, :]‖): later components are in more of the groups."""
        left, right = self.suffixes()
        return left.sum() + right.sum()

    @torch.no_grad()
    def importance(self) -> Tensor:
        """‖U[:, j:]‖ ‖V[j:, :]‖ of every component that has not died out: it does not rise in j."""
        left, right = self.suffixes()
        return left * right

    def shrink(self, threshold: float) -> None:
        """Let the components die out of which the importance is below the threshold: always the last ones."""
        self.kept.fill_(int((self.importance() >= threshold).sum()))
        self.cut.clamp_(max=int(self.kept))

    @property
    def size(self) -> int:
        """Numbers of a component."""
        return self.in_features + self.out_features

    def numbers(self, rank: int) -> int:
        """Stored for so many components: no more than of the dense matrix, and for none as for one."""
        return min(max(rank, 1) * self.size, self.in_features * self.out_features)

    @torch.no_grad()
    def finished(self) -> Tensor | Operator:
        rank = int(self.cut)
        if rank * self.size > self.in_features * self.out_features:
            return self.u[:, :rank] @ self.v[:rank]
        if not rank:  # nothing is left, and an operator holds one component at least
            return LowRank.from_factors(torch.zeros_like(self.u[:, :1]), torch.zeros_like(self.v[:1]))
        return LowRank.from_factors(self.u[:, :rank], self.v[:rank])


class Nested(Together):
    """Samples a prefix of one matrix in each pass, lets components die out, and cuts to the budget; see `maestro`."""

    stand_ins: dict[str, Ordered]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, stand_ins: Mapping[str, StandIn], settings: Mapping[str, Any]) -> None:
        super().__init__(stand_ins, settings)
        largest = max(float(one.importance()[0]) for one in self.stand_ins.values())
        if largest < settings["threshold"]:
            raise TransectError(
                f"threshold {settings['threshold']:g} would let every component of every matrix die out: the largest "
                f"importance is {largest:.3g}. Lower it"
            )
        each = list(self.stand_ins.values())
        self.budget = settings["keep"] * sum(one.in_features * one.out_features for one in each)
        if (least := sum(one.numbers(1) for one in each)) > self.budget:
            share = least / sum(one.in_features * one.out_features for one in each)
            raise OutOfReach(f"one component of each matrix is {share:.4f} of their bytes: keep must be at least that")
        self._cut_by_importance()

    def penalty(self, again: Callable[[], Tensor]) -> Tensor | None:
        """The loss with a prefix of one matrix, all others whole, and the hierarchical group lasso of all.

        Every pair of a matrix and a prefix is as likely. The authors visit all pairs in turn, shuffled; drawn anew each
        time they need no memory, and every process draws its own.
        """
        terms = []
        if self.settings["lasso"]:
            shrunk = [one.penalty() for one in self.stand_ins.values()]
            terms.append(self.settings["lasso"] * torch.stack(shrunk).sum())
        if self.settings["sample"]:
            one, rank = self.drawn()
            with one.limited(rank):
                terms.append(again())
        return torch.stack([term.float() for term in terms]).sum() if terms else None

    def drawn(self) -> tuple[Ordered, int]:
        """A matrix, with a probability as its rank, and how many of its components are used, from 1 to all."""
        each = list(self.stand_ins.values())
        ranks = torch.tensor([int(one.kept) for one in each])
        place = int(torch.randint(int(ranks.sum()), ()))
        number = int(torch.searchsorted(ranks.cumsum(0), place, right=True))
        return each[number], place - int(ranks[:number].sum()) + 1

    def after_step(self, step: int, steps: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Shrink every so many steps; and choose what would stay now, by which the state is judged."""
        if step and step % self.settings["interval"] == 0:
            each = list(self.stand_ins.values())
            for one in each:
                one.shrink(self.settings["threshold"])
            if (ramp := self.settings["ramp"]) and self.settings["keep"] < 1:
                whole = sum(one.in_features * one.out_features for one in each)
                budget = whole - min(1.0, step / steps / ramp) * (whole - self.budget)
                for one, rank in zip(each, most_important(each, [int(one.kept) for one in each], budget), strict=True):
                    one.kept.fill_(rank)
            if not any(int(one.kept) for one in each):
                raise TransectError(
                    f"after {step} steps every component of every matrix has died out: lower lasso or threshold"
                )
        self._cut_by_importance()

    def finish(self, measure: Callable[[], float]) -> float | None:
        """Cut to the budget where the held-out loss rises least; the loss that results, if it was measured."""
        loss = self._cut_by_loss(measure)
        if gone := [name for name, one in self.stand_ins.items() if not int(one.cut)]:
            warnings.warn(f"nothing is left of {', '.join(gone)}: zeros are stored for it", stacklevel=2)
        return loss

    def _cut_by_importance(self) -> None:
        each = list(self.stand_ins.values())
        ranks = [int(one.kept) for one in each]
        self._cut(ranks if self.settings["keep"] == 1 else most_important(each, ranks, self.budget))

    def _cut(self, ranks: Sequence[int]) -> None:
        for one, rank in zip(self.stand_ins.values(), ranks, strict=True):
            one.cut.fill_(rank)

    def _cut_by_loss(self, measure: Callable[[], float]) -> float | None:
        """Choose the prefixes by what they cost on the held-out text; the loss, or None where nothing has to go.

        In each of the rounds an equal part of the numbers that are too many goes. The `tries` matrices whose last
        components are the least important are made smaller one at a time, all by the same part, twice what has to go of
        them together; those then stay smaller whose loss rose least for a number, until it is enough. So the loss is
        measured at most ROUNDS (tries + 1) + 2 times. What importance alone would choose stays unless this is better.
        """
        each, tries = list(self.stand_ins.values()), self.settings["tries"]
        ranks, plain = [int(one.kept) for one in each], [int(one.cut) for one in each]
        if not tries or stored(each, ranks) <= self.budget or not math.isfinite(best := measure()):
            return None
        for left in range(ROUNDS, 0, -1):
            now = stored(each, ranks)
            goal = now - (now - self.budget) / left
            self._cut(ranks)
            before, rises = measure(), []
            tried = least_important(each, ranks, tries)
            part = min(1.0, 2 * (now - goal) / max(1, sum(each[i].numbers(ranks[i]) for i in tried)))
            for i in tried:
                all_of_it = each[i].numbers(ranks[i])
                lower = max(1, int((1 - part) * all_of_it / each[i].size))
                each[i].cut.fill_(lower)
                rises.append(((measure() - before) / max(1, all_of_it - each[i].numbers(lower)), i, lower))
                each[i].cut.fill_(ranks[i])
            for _, i, lower in sorted(rises):
                if (over := stored(each, ranks) - goal) <= 0:
                    break
                ranks[i] = max(lower, int((each[i].numbers(ranks[i]) - over) / each[i].size))
            ranks = most_important(each, ranks, goal)  # where those that were tried were not enough
        self._cut(ranks)
        if (found := measure()) < best:
            return found
        self._cut(plain)
        return best


def stored(each: Sequence[Ordered], ranks: Sequence[int]) -> int:
    """Numbers of all matrices with so many components each."""
    return sum(one.numbers(rank) for one, rank in zip(each, ranks, strict=True))


def least_important(each: Sequence[Ordered], ranks: Sequence[int], count: int) -> list[int]:
    """So many of the matrices that can lose components, by the importance of their last one for each number of it."""
    able = [i for i, rank in enumerate(ranks) if rank > 1]
    return sorted(able, key=lambda i: float(each[i].importance()[ranks[i] - 1]) / each[i].size)[:count]


def most_important(each: Sequence[Ordered], ranks: Sequence[int], budget: float) -> list[int]:
    """How many components of each matrix stay, at most so many as now, and no more numbers in all than the budget.

    Those with the most importance for each of their numbers stay, and one of each matrix that has any. That is a
    prefix, since importance does not rise. A component costs nothing where the matrix is as large as dense before it.
    """
    values, prices, owners = [], [], []
    for i, (one, rank) in enumerate(zip(each, ranks, strict=True)):
        value = one.importance()[:rank].cpu() / one.size
        value[:1] = torch.inf
        values.append(value)
        prices.append((one.size * torch.arange(rank + 1)).clamp(max=one.in_features * one.out_features).diff())
        owners.append(torch.full((rank,), i))
        budget -= 0 if rank else one.numbers(0)
    order = torch.cat(values).argsort(descending=True, stable=True)
    chosen = order[torch.cat(prices)[order].cumsum(0) <= budget]
    return torch.bincount(torch.cat(owners)[chosen], minlength=len(each)).tolist()


@parametrization("maestro", paper="arXiv:2308.14929", rate=1e-3, together=Nested)
def maestro(
    weight: Tensor, bias: Tensor | None, *, lasso: Annotated[float, Range(0)] = 1e-6, sample: bool = True,
    threshold: Annotated[float, Range(0)] = 1e-5, interval: Annotated[int, Range(1)] = 10,
    keep: Annotated[float, Range(0, 1, above=True)] = 1.0, ramp: Annotated[float, Range(0, 1)] = 0.5,
    tries: Annotated[int, Range(0)] = 32,
) -> Ordered:  # fmt: skip
    """Factors with components in an order of importance, of which the last die out in training or are cut at the end.

    Each step also lowers the loss of the model with only the first components of one matrix, so that the first matter
    most; and a penalty pulls the components to zero, later ones harder. What stays is a low-rank matrix, or a dense one
    where that is smaller. With `keep` every state is judged as the most important components that the budget pays for,
    the start too. That the ranks also fall to the budget while it is trained (`ramp`) is our addition: the authors cut
    at the end alone, which costs much more where many matrices are cut at once.

    lasso: weight of the penalty, λ: the sum over components of the norms of all from it on.
    sample: lower the loss with a prefix of one matrix, too, which is another pass.
    threshold: components die out whose importance is below this: the product of the two norms of all from it on.
    interval: steps between two times when components die out.
    keep: share of the bytes of these matrices that may be stored; at 1 only what has died out is cut.
    ramp: share of the steps in which the least important components die out as well, until the budget is kept; at 0
        the cut is made at the end, by the loss on the held-out text.
    tries: matrices that are made smaller by turns in each of the four rounds of a cut at the end, each with a pass over
        the held-out text; at 0 that cut is by importance alone.
    """
    return Ordered(weight, bias)
