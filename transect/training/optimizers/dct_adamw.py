"""AdamW whose moments live in a few directions of each matrix, picked at every step from one fixed cosine basis.

Modoranu et al. 2025, "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language
Models", arXiv:2505.17967. A matrix with a long side n and a short side c is taken as n x c, transposed if need be. Its
basis is B (c x c), one orthonormal vector a row, the same for all matrices of that c. A step with gradient G:

    A = G + E                               E: what earlier steps left out, if there is feedback
    S = A Bᵀ, i = the r strongest columns   at the first step and at every `every`-th
    a = A B_iᵀ, E = A - a B_i               a: n x r
    M, V                                    the moments of a; at a change of i each goes with its basis vector
    W = (1 - lr decay) W - lr adam(M, V) B_i

So a matrix needs 2 n r numbers and r indices, where AdamW needs 2 n c numbers. There is no SVD.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from ...arguments import Range, accepted, shown
from ...errors import TransectError
from .adamw import Beta, Decay
from .registry import Groups, optimizer

Feedback = Literal["none", "float32", "int8"]
Kind = Literal["dct", "random"]
Norm = Literal["l1", "l2"]
Share = Annotated[float, Range(0, 1, above=True)]

PLAIN_FROM = 32_000  # a matrix with such a side, an embedding or a head, gets plain AdamW (the authors' rule)
FFT_FROM = 256  # c from which the FFT is the faster route: measured on one core, n = c and n = 2 c, primes included


def cosines(size: int) -> Tensor:
    """The basis of the discrete cosine transform (DCT-II), c x c in float64: row k is cos(pi k (2 j + 1) / (2 c)).

    Rows have length 1 and are orthogonal. The cosine's argument is reduced in integers: a large c loses no digits.
    """
    place = torch.arange(size)
    angle = torch.outer(place, 2 * place + 1).remainder_(4 * size)  # 4 c are a full turn
    wave = torch.cos(torch.arange(4 * size, dtype=torch.float64) * (math.pi / (2 * size)))
    rows = wave[angle].mul_(math.sqrt(2 / size))
    rows[0] /= math.sqrt(2)
    return rows


def random_basis(size: int) -> Tensor:
    """A random orthogonal matrix, c x c in float64; the same for the same size."""
    generator = torch.Generator().manual_seed(size)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def turns(size: int) -> Tensor:
    """What `cosine_products` multiplies a Fourier transform with: c // 2 + 1 numbers in complex128."""
    frequency = torch.arange(size // 2 + 1, dtype=torch.float64)
    scale = torch.full_like(frequency, math.sqrt(2 / size))
    scale[0] = math.sqrt(1 / size)
    return torch.polar(scale, frequency * (-math.pi / (2 * size)))


def cosine_products(matrix: Tensor, turns: Tensor) -> Tensor:
    """matrix @ cosines(c).T of a matrix n x c, by a real FFT of its rows (Makhoul 1980).

    With the even places of a row followed by the odd ones backwards, and F its Fourier transform, the k-th product is
    the real part of w = F_k exp(-i pi k / (2 c)), scaled, and the (c - k)-th the negative imaginary part of the same w.
    """
    size = matrix.shape[1]
    turned = torch.fft.rfft(torch.cat((matrix[:, ::2], matrix[:, 1::2].flip(1)), dim=1)) * turns
    return torch.cat((turned.real, -turned.imag[:, 1 : size - size // 2].flip(1)), dim=1)


@dataclass(frozen=True)
class Basis:
    """rows: c x c, a vector each. turns: of `cosine_products`, where that is the faster route."""

    rows: Tensor
    turns: Tensor | None

    @classmethod
    def of(cls, kind: Kind, like: Tensor) -> Basis:
        """For matrices n x c of this c, type and device."""
        size = like.shape[1]
        if kind == "random":
            return cls(random_basis(size).to(like), None)
        complex_type = torch.promote_types(like.dtype, torch.complex64)
        fast = turns(size).to(like.device, complex_type) if size >= FFT_FROM else None
        return cls(cosines(size).to(like), fast)

    def products(self, matrix: Tensor) -> Tensor:
        """Of the matrix's rows and every vector, n x c."""
        return matrix @ self.rows.T if self.turns is None else cosine_products(matrix, self.turns)


def strongest(products: Tensor, rank: int, norm: Norm) -> Tensor:
    """Indices of the `rank` columns with the largest norm, rising; of equal ones those with the lowest index.

    By l2 no other choice reconstructs the matrix better: the squared error is what the other columns hold.
    """
    scores = products.abs().sum(0) if norm == "l1" else products.square().sum(0)
    return scores.sort(descending=True, stable=True).indices[:rank].sort().values


def moved(moment: Tensor, old: Tensor, new: Tensor, size: int) -> Tensor:
    """Columns of a moment (n x r) from the slots of the indices `old` to those of `new`; 0 for what was not in `old`.

    This is the product with B_old B_newᵀ, which has a 1 where the indices agree, and otherwise zeros.
    """
    slot = torch.full((size,), -1, device=moment.device)
    slot[old] = torch.arange(len(old), device=moment.device)
    source = slot[new]
    return torch.where(source >= 0, moment.index_select(1, source.clamp_min(0)), 0)


def quantised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int8, n x c) and a scale for each row (n x 1); codes * scale is the matrix to half a scale."""
    scale = matrix.abs().amax(1, keepdim=True) / 127
    return (matrix / scale.where(scale > 0, 1)).round().to(torch.int8), scale


class DCTAdamW(torch.optim.Optimizer):
    """AdamW with low-rank moments; plain AdamW for vectors and for matrices with a side of at least `PLAIN_FROM`.

    What has more than two dimensions is a matrix of its first by all others. The short side is what is projected; of
    square matrices, the columns. Parameters of less than 32 bits are stepped with moments and basis in float32.
    Gradients are only read.

    rank: how many basis vectors each matrix has: a whole number, or their share of its short side as a float.
    every: steps between two choices of the vectors; the first step always chooses.
    feedback: whether what a step's vectors do not hold is added to the next gradient, and how it is kept: not at all,
        as it is ("float32"; float64 for such parameters), or in 8 bits with a scale for each row.
    rotate: at a new choice each moment stays with its vector, and a new vector starts with none. False leaves it in its
        place among the vectors, as the authors' code does by default: then it goes on under another vector.
    basis: cosines, or a random orthogonal basis to compare with (with `every` beyond the last step, a fixed subspace).
    norm: which columns of S are strongest; "l2" is the smallest error, "l1" the authors' default.
    All of them, lr, betas, eps and weight_decay may differ between parameter groups.
    Raises TransectError for settings out of their range, a rank above a short side, complex parameters and sparse
    gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | float = 0.25,
        every: int = 1,
        feedback: Feedback = "none",
        rotate: bool = True,
        basis: Kind = "dct",
        norm: Norm = "l1",
    ) -> None:
        self._bases: dict[tuple[Any, ...], Basis] = {}
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "every": every}
        super().__init__(params, settings | {"feedback": feedback, "rotate": rotate, "basis": basis, "norm": norm})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_bases", {})  # a copy makes its own

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; the optimizer stays as it was if they are refused."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except TransectError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As of every optimizer, and exact: torch alone would turn indices and codes into the parameter's type."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, own, strict=True):
            state = state_dict["state"].get(number, {})
            for key in state.keys() - {"step"} if "indices" in state else ():
                kind = _wide(parameter) if state[key].is_floating_point() else state[key].dtype
                self.state[parameter][key] = state[key].to(parameter.device, kind)

    @property
    def basis_bytes(self) -> int:
        """Of the bases that were needed so far: one of each short side, shared, beside the state."""
        return sum(basis.rows.numel() * basis.rows.element_size() for basis in self._bases.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in due:
            _check_gradient(parameter.grad)
        for parameter, group in due:
            state = self.state[parameter]
            state["step"] = state.get("step", torch.tensor(0.0)) + 1
            if group["weight_decay"] != 0:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if _is_plain(parameter):
                mean, root, rate = adam(state, parameter.grad, group)
                parameter.addcdiv_(mean, root, value=-rate)
            else:
                change = self.low_rank(state, _as_matrix(parameter.grad).to(_wide(parameter)), group)
                parameter.sub_(_as_parameter(change, parameter))
        return loss

    def low_rank(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """What a step takes from a matrix n x c, of its gradient, which is left as it is."""
        size = gradient.shape[1]
        basis = self._basis(group["basis"], gradient)
        if group["feedback"] != "none" and "residual" in state:
            kept = state["residual"]
            gradient = gradient + (kept * state["scale"] if kept.dtype == torch.int8 else kept)
        if state["step"] == 1 or state["step"] % group["every"] == 0:
            products = basis.products(gradient)
            chosen = strongest(products, _rank(group["rank"], size), group["norm"])
            small = products.index_select(1, chosen)
            if group["rotate"] and "indices" in state:
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = moved(state[key], state["indices"].long(), chosen, size)
            state["indices"] = chosen.int()
            rows = basis.rows[chosen]
        else:
            rows = basis.rows[state["indices"].long()]
            small = gradient @ rows.T
        if group["feedback"] != "none":
            left = gradient - small @ rows
            if group["feedback"] == "int8":
                state["residual"], state["scale"] = quantised(left)
            else:
                state["residual"] = left
        mean, root, rate = adam(state, small, group)
        return (mean / root) @ rows * rate

    def _basis(self, kind: Kind, like: Tensor) -> Basis:
        """The basis for matrices like this one; made once."""
        key = (kind, like.shape[1], like.dtype, like.device)
        if key not in self._bases:
            self._bases[key] = Basis.of(kind, like)
        return self._bases[key]


def adam(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """Update the moments in place; numerator and denominator of the update, and its rate, in torch's arithmetic."""
    first, second = group["betas"]
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    step = state["step"].item()
    root = (state["exp_avg_sq"].sqrt() / (1 - second**step) ** 0.5).add_(group["eps"])
    return state["exp_avg"], root, group["lr"] / (1 - first**step)


def _is_plain(parameter: Tensor) -> bool:
    """Whether it gets plain AdamW."""
    return parameter.ndim < 2 or not parameter.numel() or max(_sides(parameter)) >= PLAIN_FROM


def _as_matrix(tensor: Tensor) -> Tensor:
    """n x c with n >= c, contiguous: a gradient and its transpose make the same steps, bit for bit."""
    first, rest = _sides(tensor)
    matrix = tensor.reshape(first, rest)
    return (matrix.T if first < rest else matrix).contiguous()


def _as_parameter(matrix: Tensor, like: Tensor) -> Tensor:
    """What `_as_matrix` made of something of this shape, turned back."""
    first, rest = _sides(like)
    return (matrix.T if first < rest else matrix).reshape(like.shape)


def _sides(tensor: Tensor) -> tuple[int, int]:
    """Of the first dimension, and of all others."""
    return len(tensor), tensor.numel() // len(tensor)


def _wide(parameter: Tensor) -> torch.dtype:
    """What is computed in: half precision has no FFT on CPUs, and cosines that are rounded to it are not orthogonal."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _rank(rank: int | float, size: int) -> int:
    """How many of `size` vectors."""
    return max(1, round(rank * size)) if isinstance(rank, float) else int(rank)


def _check(group: dict[str, Any]) -> None:
    """Raise TransectError for what is out of range; a number is left in the type that it is meant in."""
    name = "DCTAdamW"
    for key, annotation in _ACCEPTED.items():
        group[key] = accepted(annotation, group[key], f"{name}: {key}")
    group["betas"] = tuple(group["betas"])
    if len(group["betas"]) != 2:
        raise TransectError(f"{name}: betas must be two numbers, got {shown(group['betas'])}")
    wanted = Share if isinstance(group["rank"], float) else Annotated[int, Range(1)]
    rank = group["rank"] = accepted(wanted, group["rank"], f"{name}: rank, {_RANK}")
    for place, parameter in enumerate(group["params"]):
        if not parameter.is_floating_point():
            raise TransectError(f"{name}: parameters must be real numbers, got one of {parameter.dtype}")
        if not _is_plain(parameter) and rank > (size := min(_sides(parameter))):
            called = group["param_names"][place] if "param_names" in group else "a parameter"
            raise TransectError(
                f"{name}: rank {rank} is above the short side of {called}, {tuple(parameter.shape)}. Give at most "
                f"{size}, a share such as 0.25, or the matrix a group with a rank of its own"
            )


_RANK = "a whole number of vectors or as a float their share"
_ACCEPTED: dict[str, Any] = {
    "lr": Annotated[float, Range(0)],
    "betas": list[Beta],
    "eps": Decay,
    "weight_decay": Decay,
    "every": Annotated[int, Range(1)],
    "feedback": Feedback,
    "rotate": bool,
    "basis": Kind,
    "norm": Norm,
}


def _check_gradient(gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise TransectError(
            "DCTAdamW: a gradient is sparse, and its similarity to every basis vector is not. Make it dense "
            "(nn.Embedding(..., sparse=False)), or leave that parameter to torch.optim.SparseAdam"
        )


@optimizer("dct-adamw", paper="arXiv:2505.17967")
def dct_adamw(
    groups: Groups,
    lr: float,
    *,
    share: Share = 0.25,
    every: Annotated[int, Range(1)] = 1,
    feedback: Feedback = "none",
    rotate: bool = True,
    basis: Kind = "dct",
    norm: Norm = "l1",
    weight_decay: Decay = 0.0,
    beta1: Beta = 0.9,
    beta2: Beta = 0.999,
    eps: Decay = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW whose moments live in a few directions of each matrix, picked at every step from one cosine basis.

    share: how many directions, as a share of each matrix's short side.
    every: steps between two choices of the directions.
    feedback: whether what a step leaves out is added to the next gradient, and in how many bits it is kept.
    rotate: at a new choice each moment stays with its direction.
    basis: cosines, or a random orthogonal basis to compare with.
    norm: by which directions are picked; l2 leaves out least.
    weight_decay: share of a number that every step takes away, times the rate.
    beta1: of the mean gradient.
    beta2: of the mean square.
    eps: below the root.
    """
    return DCTAdamW(
        groups,  # type: ignore
        lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        rank=share,
        every=every,
        feedback=feedback,
        rotate=rotate,
        basis=basis,
        norm=norm,
    )
