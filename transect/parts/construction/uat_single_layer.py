"""One attention layer and one ReLU network approximate a sequence function, by formula (arXiv:2507.10581).

The paper claims that for every continuous map f of sequences (n tokens of d numbers, from a compact set) and every
ε > 0 there is such a layer within ε of it. The construction here is ours, and elementary: attention copies, the network
computes.

Token i is [0 ... 0, x_i, e_i] with the unit vector e_i of its position, its first n d channels being empty. Head j
scores position k with β for k = j and 0 else, whoever asks: of its softmax the token x_j has p = e^β / (e^β + n - 1),
every other one (1 - p) / (n - 1). It writes into slot j what it has read, h_j, at most (n - 1) e^-β diam from x_j. Then
every token holds the whole sequence and its own position, and a network with one hidden layer gives f there, token by
token; that it exists is the classical theorem. Its first layer is random, its second one least squares on samples.

That there is such a layer says nothing about its size (the network has n d inputs, and needs a width that grows
exponentially with them), nor about what training finds, nor about data that is not the samples' kind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import TransectError

SequenceMap = Callable[[Tensor], Tensor]  # (S x n x d) -> (S x n x d_out)
_ROWS = 4096  # of features at a time


class OneLayer(nn.Module):
    """x (S x n x d) -> (S x n x d_out): attention with n heads and a ReLU network, on a stream of n d + d + n channels.

    All in float64, as standard linear layers. radius: of the cube that it was fitted on. beta: score of the position
    that a head reads. attention, positions: false for what is left without one of these.
    """

    def __init__(
        self, n: int, d: int, outputs: int, *, width: int, beta: float, radius: float, attention: bool = True,
        positions: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n, self.d, self.beta, self.radius = n, d, beta, radius
        self.attention, self.positions = attention, positions
        stream = n * d + d + n
        self.q_proj, self.k_proj = _linear(stream, n * n), _linear(stream, n * n)
        self.v_proj, self.o_proj = _linear(stream, n * d), _linear(n * d, stream)
        self.up_proj, self.down_proj = _linear(stream, width), _linear(width, outputs)
        self.rest = _linear(stream, outputs)  # reads the position: a constant for each
        with torch.no_grad():
            self.q_proj.bias.copy_(
                beta * n**0.5 * torch.eye(n, dtype=torch.float64).flatten()
            )  # attention divides by the root of n
            self.k_proj.weight[:, -n:] = torch.eye(n).repeat(n, 1)
            self.v_proj.weight[:, n * d : n * d + d] = torch.eye(d).repeat(n, 1)
            self.o_proj.weight[: n * d] = torch.eye(n * d)

    def stream(self, x: Tensor) -> Tensor:
        """What the network reads (S x n x (n d + d + n))."""
        e = torch.eye(self.n, dtype=x.dtype, device=x.device) * self.positions
        z = torch.cat([x.new_zeros(*x.shape[:2], self.n * self.d), x, e.expand(len(x), -1, -1)], dim=-1)
        if not self.attention:
            return z
        q, k, v = (
            one(z).unflatten(-1, (self.n, -1)).transpose(1, 2) for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        return z + self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def copies(self, x: Tensor) -> Tensor:
        """What the slots hold: by token, which sequence it sees (S x n x n x d)."""
        return self.stream(x)[..., : self.n * self.d].unflatten(-1, (self.n, self.d))

    @property
    def copy_bound(self) -> float:
        """How far a slot can be from the token that it is a copy of, for inputs from the cube."""
        return 2 * self.radius * self.d**0.5 * (self.n - 1) * math.exp(-self.beta)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stream(x)
        return self.rest(z) + self.down_proj(torch.relu(self.up_proj(z)))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Zeros; there may be no outputs."""
    made = nn.Linear(inputs or 1, outputs or 1, dtype=torch.float64)
    made.in_features, made.out_features = inputs, outputs
    made.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.float64))
    made.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.float64))
    return made


@torch.no_grad()
def one_layer_approximator(
    f: SequenceMap, n: int, d: int, *, width: int = 256, beta: float = 20.0, samples: int = 4000, radius: float = 1.0,
    attention: bool = True, positions: bool = True, ridge: float = 1e-8, seed: int = 0,
) -> OneLayer:  # fmt: skip
    """The layer that approximates f on the cube of that radius, without training.

    f: (S x n x d) -> (S x n x d_out), float64; continuous, or nothing is promised. width: hidden units, drawn as
    N(0, 1); the second layer solves least squares over `samples` random sequences, with a penalty of `ridge` times the
    mean square of the hidden units. beta: the larger, the more exact the copies. attention, positions: false for the
    layer without one of these: then a token sees itself alone, or itself and the mean of all.
    Raises TransectError for sizes below 1, a beta below 0, and an f that gives something else.
    """
    if min(n, d, samples) < 1 or width < 0:
        raise TransectError(f"n, d and samples should be 1 or more and width 0 or more: {n}, {d}, {samples}, {width}")
    if not (0 <= beta < math.inf and 0 < radius < math.inf and ridge >= 0):
        raise TransectError(
            f"beta and ridge should be 0 or more, and the domain compact: radius above 0, all finite; got beta {beta}, "
            f"ridge {ridge}, radius {radius}"
        )
    x = drawn(samples, n, d, radius, seed)
    y = values(f, x)
    made = OneLayer(
        n, d, y.shape[-1], width=width, beta=beta, radius=radius, attention=attention, positions=positions
    )  # fmt: skip
    draw = torch.Generator().manual_seed(seed + 1)
    made.up_proj.weight.copy_(torch.randn(made.up_proj.weight.shape, generator=draw, dtype=torch.float64))
    made.up_proj.bias.copy_(torch.randn(width, generator=draw, dtype=torch.float64))
    if attention and positions:
        made.up_proj.weight[:, n * d : n * d + d] = 0  # the slots hold it
    _solve(made, x, y, ridge)
    return made


def _solve(made: OneLayer, x: Tensor, y: Tensor, ridge: float) -> None:
    """Set what is linear in the layer's output so that the squared error over the samples is least."""
    width, n = made.down_proj.in_features, made.n
    gram, cross = x.new_zeros(width + n, width + n), x.new_zeros(width + n, y.shape[-1])
    for inputs, wanted in zip(x.split(_ROWS // n + 1), y.split(_ROWS // n + 1), strict=True):
        z = made.stream(inputs)
        constants = torch.eye(n, dtype=x.dtype) if made.positions else x.new_ones(n, n) / n**0.5
        features = torch.cat([torch.relu(made.up_proj(z)), constants.expand(len(z), -1, -1)], dim=-1).flatten(0, 1)
        gram += features.T @ features
        cross += features.T @ wanted.flatten(0, 1)
    scale = gram.diagonal()[:width].mean() if width else gram.new_ones(())
    penalty = torch.full((width + n,), 1e-14, dtype=x.dtype)
    penalty[:width] = max(ridge, 1e-14)
    solved = torch.linalg.solve(gram + torch.diag(penalty * scale), cross)
    made.down_proj.weight.copy_(solved[:width].T)
    if made.positions:
        made.rest.weight[:, -n:] = solved[width:].T
    else:
        made.rest.bias.copy_(solved[width:].sum(0) / n**0.5)


def drawn(samples: int, n: int, d: int, radius: float, seed: int) -> Tensor:
    """Random sequences from the cube (S x n x d), float64."""
    draw = torch.Generator().manual_seed(seed)
    return radius * (2 * torch.rand(samples, n, d, generator=draw, dtype=torch.float64) - 1)


def values(f: SequenceMap, x: Tensor) -> Tensor:
    """f at some sequences (S x n x d_out), float64; TransectError for another shape, and for what is not finite."""
    y = f(x)
    if y.dim() != 3 or y.shape[:2] != x.shape[:2]:
        raise TransectError(
            f"f should give (samples x n x outputs), here {tuple(x.shape[:2])} and the outputs, not {tuple(y.shape)}"
        )
    if not torch.isfinite(y).all():
        raise TransectError("f is not finite everywhere on the cube: it has to be continuous there")
    return y.double()


@torch.no_grad()
def approximation_report(f: SequenceMap, module: OneLayer, *, samples: int = 2000, seed: int = 1) -> dict[str, float]:
    """How far the layer is from f on fresh random sequences.

    rms: root mean square error. sup: the largest over the samples, which is a lower bound of the true one. spread: the
    standard deviation of f, which a constant would have for an error. copy_error, copy_bound: how far slots are from
    the tokens that they copy, at most, and how far they can be, where the layer copies.
    """
    x = drawn(samples, module.n, module.d, module.radius, seed + 1_000_003)
    y = values(f, x)
    error = module(x) - y
    report = {
        "rms": float(error.square().mean().sqrt()), "sup": float(error.abs().max()),
        "spread": float((y - y.mean((0, 1))).square().mean().sqrt()),
    }  # fmt: skip
    if module.attention and module.positions:
        report["copy_error"] = float((module.copies(x) - x[:, None]).norm(dim=-1).max())
        report["copy_bound"] = module.copy_bound
    return report


def error_curve(
    f: SequenceMap, n: int, d: int, *, widths: Sequence[int] = (16, 64, 256, 1024), betas: Sequence[float] = (20.0,),
    samples: int = 4000, radius: float = 1.0, seed: int = 0,
) -> list[dict[str, float]]:  # fmt: skip
    """The report for each width and beta, whole, without attention and without positions: a row each."""
    rows = []
    for beta, width, (attention, positions) in itertools.product(
        betas, widths, ((True, True), (False, True), (True, False))
    ):
        made = one_layer_approximator(
            f, n, d, width=width, beta=beta, samples=samples, radius=radius, attention=attention, positions=positions,
            seed=seed,
        )  # fmt: skip
        settings = {"width": width, "beta": beta, "attention": attention, "positions": positions}
        rows.append({**settings, **approximation_report(f, made, seed=seed + 1)})
    return rows


class Lookup(nn.Module):
    """One head that looks values up: x (... x d) -> (... x d_out), Σ_k softmax_k(-β |x - c_k|²) f(c_k).

    The keys are m learned tokens, one for each centre: partition and route, for a single token. For β = 0 it is the
    mean of the values; for β → ∞ it gives the nearest centre's, so that the error is at most what f changes over the
    distance to it, and m has to grow as (diameter / distance)^d.

    centres: (m x d). values: f there (m x d_out).
    """

    def __init__(self, centres: Tensor, values: Tensor, beta: float) -> None:
        super().__init__()
        if not 0 <= beta < math.inf or len(centres) != len(values) or not len(centres):
            raise TransectError(
                f"a lookup needs a value for each of its centres and a beta of 0 or more, finite: got {len(centres)} "
                f"centres, {len(values)} values and beta {beta}"
            )
        keys = torch.cat([2 * beta * centres, -beta * centres.square().sum(-1, keepdim=True)], dim=-1)
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values.clone())

    def forward(self, x: Tensor) -> Tensor:
        query = functional.pad(x, (0, 1), value=1.0).flatten(0, -2)
        found = functional.scaled_dot_product_attention(query, self.keys, self.values, scale=1.0)
        return found.unflatten(0, x.shape[:-1])


def interpolator(f: Callable[[Tensor], Tensor], low: float, high: float, knots: int) -> nn.Sequential:
    """f(t_0) + Σ_k c_k ReLU(x - t_k), which is f at evenly spaced knots and straight between: (... x 1) -> (... x 1).

    c_k are the changes of slope. Off by what f changes over a mesh at most, and by mesh² max |f''| / 8 if it is smooth.
    """
    if knots < 2 or not low < high:
        raise TransectError(f"an interpolation needs two knots or more between low < high: {knots}, {low}, {high}")
    t = torch.linspace(low, high, knots, dtype=torch.float64)
    y = f(t)
    slopes = y.diff() / t.diff()
    first, last = _linear(1, knots - 1), _linear(knots - 1, 1)
    with torch.no_grad():
        first.weight.fill_(1)
        first.bias.copy_(-t[:-1])
        last.weight[0] = torch.cat([slopes[:1], slopes.diff()])
        last.bias.fill_(float(y[0]))
    return nn.Sequential(first, nn.ReLU(), last)
