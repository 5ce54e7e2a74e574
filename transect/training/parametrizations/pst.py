"""Parameter-efficient sparse training (Li et al., IJCAI 2022, arXiv:2205.11005)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ...errors import TransectError
from ...operators import Operator
from ...operators.sparse import Sparse, sparse_bytes
from ...parameters import Range
from .registry import parametrization
from .stand_in import StandIn

Share = Annotated[float, Range(0, 1, below=True)]


def kept(scores: Tensor, pruned: int) -> Tensor:
    """The mask (bool, of the scores' shape) of all but the `pruned` smallest; of equal ones the last stay."""
    if pruned < 1:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.detach().flatten()
    bound = flat.kthvalue(pruned).values
    equal = flat == bound
    spare = pruned - (flat < bound).sum()  # of those at the bound, as many go, too
    return ((flat > bound) | (equal & (equal.cumsum(0) > spare))).view_as(scores)


class _Masked(torch.autograd.Function):
    """M ⊙ W. ∂L/∂S is ∂L/∂M = G ⊙ W, as if the mask were the scores S themselves (straight-through)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, pruned: int) -> Tensor:  # pyright: ignore
        mask = kept(scores, pruned)
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        weight, mask = ctx.saved_tensors
        return gradient * mask, gradient * weight, None


def ramp(gone: float, warm_up: float, settle: float) -> float:
    """Share of the final sparsity when this share of the steps is done: 0, then a cubic curve, then 1."""
    if gone <= warm_up:
        return 0.0
    if gone > 1 - settle:
        return 1.0
    return 1 - (1 - (gone - warm_up) / (1 - warm_up - settle)) ** 3


class Pruned(StandIn):
    """Ŵ = M ⊙ W with W = W₀ + β U V; M is 0 at the ⌊v d_out d_in⌋ smallest of the scores S.

    S = |W| + α₁ A B + α₂ (R 1ᵀ + 1 Cᵀ). W₀ and b stay; U (d_out x r₁), V (r₁ x d_in), A (d_out x r₂), B (r₂ x d_in),
    R (d_out) and C (d_in) are trained, in at least 32 bits. See `pst` for the settings.
    """

    zeros: Tensor  # how many entries are 0 at the moment, while it is trained

    def __init__(
        self, weight: Tensor, bias: Tensor | None, sparsity: float, weight_rank: int, score_rank: int, beta: float,
        alpha1: float, alpha2: float, warm_up: float, settle: float,
    ) -> None:  # fmt: skip
        super().__init__(weight, bias)
        if warm_up + settle >= 1:
            raise TransectError(
                f"warm_up {warm_up:g} and settle {settle:g} leave no steps in which the sparsity rises: together they "
                "must stay below 1"
            )
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.start = nn.Parameter(weight.detach().clone(), requires_grad=False)  # W₀
        (d_out, d_in), dtype = weight.shape, torch.promote_types(weight.dtype, torch.float32)

        def trained(start: Tensor, counts: bool = True) -> nn.Parameter:
            return nn.Parameter(start.to(weight.device, dtype), requires_grad=counts)

        self.u, self.v = trained(torch.randn(d_out, weight_rank)), trained(torch.zeros(weight_rank, d_in))
        by_rank, by_line = alpha1 != 0, alpha2 != 0
        self.a = trained(torch.randn(d_out, score_rank), by_rank)
        self.b = trained(torch.zeros(score_rank, d_in), by_rank)
        self.r, self.c = trained(torch.zeros(d_out), by_line), trained(torch.zeros(d_in), by_line)
        self.sparsity, self.warm_up, self.settle = sparsity, warm_up, settle
        self.beta, self.alpha1, self.alpha2 = beta, alpha1, alpha2
        self.register_buffer("zeros", torch.zeros((), dtype=torch.long))

    def pruned(self, share: float = 1.0) -> int:
        """How many entries are zero at this share of the final sparsity."""
        return int(share * self.sparsity * self.start.numel() + 1e-9)  # 0.7 of 10 is 7

    def parts(self) -> tuple[Tensor, Tensor]:
        """W and S (d_out x d_in)."""
        with torch.autocast(self.start.device.type, enabled=False):  # scores of 8 bits would be equal by the thousand
            wide = self.start.to(self.u.dtype) + self.beta * self.u @ self.v
            lines = self.r[:, None] + self.c
            return wide, wide.abs() + self.alpha1 * self.a @ self.b + self.alpha2 * lines

    @property
    def weight(self) -> Tensor:
        pruned = int(self.zeros) if self.training else self.pruned()
        weight, scores = self.parts()
        apply: Any = _Masked.apply
        return apply(weight, scores, pruned).to(self.start.dtype)

    def after_step(self, gone: float) -> None:
        self.zeros.fill_(self.pruned(ramp(gone, self.warm_up, self.settle)))

    @torch.no_grad()
    def finished(self) -> Tensor | Operator:
        weight, scores = self.parts()
        mask, weight = kept(scores, self.pruned()), weight.to(self.start.dtype)
        (d_out, d_in), itemsize = weight.shape, weight.element_size()
        smaller = sparse_bytes(d_out, d_in, int(mask.sum()), itemsize) < weight.numel() * itemsize
        return Sparse.from_dense(weight, mask) if smaller else weight * mask


@parametrization("pst", paper="arXiv:2205.11005", rate=3e-3, rest=False)
def pst(
    weight: Tensor, bias: Tensor | None, *, sparsity: Annotated[float, Range(0, 1, below=True)] = 0.9,
    weight_rank: Annotated[int, Range(1)] = 8, score_rank: Annotated[int, Range(1)] = 8, beta: float = 1.0,
    alpha1: float = 1.0, alpha2: float = 1.0, warm_up: Share = 0.1, settle: Share = 0.3,
) -> Pruned:  # fmt: skip
    """A frozen weight with a low-rank update is pruned, entry by entry, by learned scores: few numbers are trained.

    What stays is a sparse matrix, W₀ plus its update where the scores say so: the values and a bit for every entry.
    Each matrix loses the same share. Biases, embeddings and norms stay as they are. The update is no LoRA: it is pruned
    together with the weight. The first factors start at random with deviation 1, as the authors have them, so that a
    step moves a weight by the root of the rank times the rate.

    sparsity: share of the entries that are zero at the end; it is judged at that share from the start.
    weight_rank: of the update, r₁.
    score_rank: of the low-rank part of the scores, r₂.
    beta: factor of the update.
    alpha1: factor of the low-rank part of the scores; at 0 it is not trained.
    alpha2: factor of the rows' and columns' part of the scores; at 0 it is not trained.
    warm_up: share of the steps before any entry is pruned.
    settle: share of the steps at the end in which the sparsity does not rise any more.
    """
    return Pruned(weight, bias, sparsity, weight_rank, score_rank, beta, alpha1, alpha2, warm_up, settle)
