"""DSFormer's training: the Straight-Through Factorizer (Chand, Prabhu and Kumar, 2023, arXiv:2312.13211).

Of the paper only the abstract was at hand, and summaries of it: the form of the factors, the name, and that training
all of them for the loss of the task is better than factors without. The update is our reading of the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ...errors import TransectError
from ...layers.dense_sparse import Projection, column_blocks, fitting, project, refined, starting_bases
from ...operators.dense_sparse import DenseSparse
from ...parameters import Range
from .registry import parametrization
from .stand_in import StandIn, Together
from .straight_through import straight_through

Variant = Literal["stf", "f", "m"]

_WARM_ROUNDS = 2  # of the projection where the support is chosen anew
_SETTLED = 0.7  # share of the steps after which variant M trains the factors


class Factorized(StandIn):
    """Ŵ = Π(W): blocks S_β D_β as `DenseSparse` stores them, that follow a trained dense W, or are trained themselves.

    At the start they are the projection of the layer's weight. W (d_out x d_in), the values of S (B x d_out x s) and D
    (B x k x c) are held in at least 32 bits. blocks: B. bases: k. nonzeros: s. For the rest see `dsformer`.
    """

    values: Tensor
    bases: Tensor
    indices: Tensor  # of the values' bases (B x d_out x s)
    settled: Tensor  # whether the factors are trained, and no longer W

    def __init__(
        self, weight: Tensor, bias: Tensor | None, variant: Variant, blocks: int, bases: int, nonzeros: int,
        iterations: int, pull: float,
    ) -> None:  # fmt: skip
        super().__init__(weight, bias)
        if not torch.isfinite(weight).all():
            raise TransectError("the weight is not finite, so that it has no factors")
        self.variant, self.pull, self.dtype = variant, pull, weight.dtype
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        parts = column_blocks(wide, blocks)
        begun = starting_bases(parts.float(), bases, "svd", int(torch.randint(2**31, ())))
        made = project(parts, begun, nonzeros, iterations)
        self.master = None if variant == "f" else nn.Parameter(wide)
        for name, tensor in (("values", made.values.to(wide)), ("bases", made.bases.to(wide))):
            if variant == "stf":
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        self.register_buffer("indices", made.indices)
        self.register_buffer("settled", torch.tensor(variant == "f", device=weight.device))

    def factorized(self) -> Tensor:
        """Ŵ (d_out x d_in) of the factors as they will be stored, with their gradient."""
        values, bases = (part.to(self.dtype).to(part.dtype) for part in (self.values, self.bases))
        with torch.autocast(values.device.type, enabled=False):
            blocks = Projection(bases, values, self.indices).blocks()
        return blocks.transpose(0, 1).flatten(1)[:, : self.in_features]

    @property
    def weight(self) -> Tensor:
        used = self.factorized()
        return used if self.master is None or self.settled else straight_through(self.master, used)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    def distance(self) -> Tensor:
        """||W - Π(W)||², with W's gradient."""
        assert self.master is not None
        return (self.master - self.factorized().detach()).square().sum()

    def penalty(self) -> Tensor | None:
        if self.master is None or not self.pull or self.settled:
            return None
        return self.pull / 2 * self.distance()

    @torch.no_grad()
    def follow(self, anew: bool) -> None:
        """Fit the factors to W as it is now. anew: choose the support too, if that leaves less of a block."""
        assert self.master is not None
        parts = column_blocks(self.master, len(self.bases))
        made = refined(parts, Projection(self.bases, self.values, self.indices))
        if anew:
            other = project(parts, made.bases, self.values.shape[2], _WARM_ROUNDS)
            left = [(parts - one.blocks().to(parts)).square().sum((1, 2)) for one in (made, other)]
            better = (left[1] < left[0])[:, None, None]
            made = Projection(*(torch.where(better, new, old) for new, old in zip(other, made, strict=True)))
        for held, tensor in ((self.bases, made.bases), (self.values, made.values), (self.indices, made.indices)):
            held.copy_(tensor)

    @torch.no_grad()
    def finished(self) -> DenseSparse:
        bases, values = (part.to(self.dtype) for part in (self.bases, self.values))
        return DenseSparse.from_blocks(bases, values, self.indices, self.in_features)


class Following(Together):
    """Fits the factors anew after every step, and in variant M hands over to them."""

    @property
    def _following(self) -> list[Factorized]:
        found = [one for one in self.stand_ins.values() if isinstance(one, Factorized)]
        return [one for one in found if one.master is not None and not one.settled]

    def after_step(self, step: int, steps: int, optimizer: torch.optim.Optimizer | None) -> None:
        for one in self._following if step else ():
            one.follow(step % self.settings["refresh"] == 0)
            if one.variant == "m" and step >= _SETTLED * steps:
                one.settled.fill_(True)
                for part in (one.values, one.bases):
                    if optimizer is not None:
                        optimizer.state.pop(part, None)  # its averages are of steps in which they had no gradient

    @torch.no_grad()
    def told(self) -> Mapping[str, float]:
        found = self._following
        if not found:
            return {}
        size = sum(float(one.master.square().sum()) for one in found if one.master is not None)
        left = sum(float(one.distance()) for one in found)
        return {"distance of the trained weights from those that are stored, over their norm": (left / size) ** 0.5}


@parametrization("dsformer", paper="arXiv:2312.13211", rate=5e-5, together=Following)
def dsformer(
    weight: Tensor, bias: Tensor | None, *, variant: Variant = "stf",
    keep: Annotated[float, Range(0, 1, above=True)] = 0.5, width: Annotated[int, Range(1, 65_536)] = 64,
    ratio: Annotated[float, Range(1, 64)] = 4.0, iterations: Annotated[int, Range(1, 10_000)] = 20,
    refresh: Annotated[int, Range(1)] = 50, pull: Annotated[float, Range(0)] = 1e-3,
) -> Factorized:  # fmt: skip
    """Train a dense weight through its projection to small dense bases and row-sparse coefficients.

    W_β ≈ S_β D_β for each block of columns, as the compression method of this name has it; what stays are these
    factors, of a size that `keep` pays for in each matrix. Forward uses the projection of W, and W gets the gradient as
    if it were used itself (the Straight-Through Factorizer). After every step the factors are fitted to W by one round
    of least squares each on their support, which is chosen anew every `refresh` steps. The form is the paper's, the
    rest our reading. The loss at the start is that of the projection. It takes the memory of dense training.

    variant: stf; f, which trains the factors themselves on the support of the start; or m, stf for the first 70 % of
        the steps and then f.
    keep: share of a matrix's bytes that its factors may take.
    width: most columns of a block; blocks are as even as possible.
    ratio: bases per non-zero of a row.
    iterations: rounds of coding and least squares at the start.
    refresh: steps from one choice of the support to the next.
    pull: weight of ||W - Π(W)||² / 2 in the loss, of all matrices together, which keeps W near what can be stored.
    """
    _, sizes = fitting((weight.shape[0], weight.shape[1]), weight.element_size(), keep, width, ratio)
    return Factorized(weight, bias, variant, iterations=iterations, pull=pull, **sizes)
