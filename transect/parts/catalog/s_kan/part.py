"""S-KAN: edges and neurons whose function is chosen from several learned families (Yang et al. 2024, arXiv:2408.08338).

The paper's formulas could not be read; that families are pooled, that a node learns which it uses, and that the others
are pruned is the paper's, what stands here is our form of it. A node's input is brought into (-1, 1) by tanh, without
which what leaves the support of a spline no longer moves it; each family is divided by its root mean square there,
without which the selection would favour the larger ones.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....arguments import Range
from ....errors import TransectError
from ....operators.base import Described
from ...part import Activation, MLPPart
from ...precision import wide

ALL_FAMILIES = "spline,rbf,wavelet,chebyshev,fourier"
BasisSize = Annotated[int, Range(4, 32)]


def spline(u: Tensor, size: int) -> Tensor:
    """Cubic B-splines (... x size) on even knots over [-1, 1] and 3 more on each side; their sum is 1 in [-1, 1]."""
    step = 2 / (size - 3)
    apart = (u[..., None] - _evenly(u, size, -1 - step, step)).abs() / step  # of the centre of each
    near = 2 / 3 - apart.square() + apart**3 / 2
    return torch.where(apart < 1, near, (2 - apart).clamp_min(0) ** 3 / 6)


def rbf(u: Tensor, size: int) -> Tensor:
    """exp(-((u - m_k) / h)²) with centres evenly on [-1, 1], h apart."""
    step = 2 / (size - 1)
    return (-((u[..., None] - _evenly(u, size, -1, step)) / step).square()).exp()


def chebyshev(u: Tensor, size: int) -> Tensor:
    """T_0(u) ... T_{size - 1}(u) by their recursion, for |u| <= 1."""
    found = [torch.ones_like(u), u]
    while len(found) < size:
        found.append(2 * u * found[-1] - found[-2])
    return torch.stack(found, dim=-1)


def fourier(u: Tensor, size: int) -> Tensor:
    """sin(kπu) and cos(kπu), k = 1 ... size / 2."""
    angles = u[..., None] * _evenly(u, size // 2, math.pi, math.pi)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def wavelet(u: Tensor, size: int, place: Tensor | None = None, log_scale: Tensor | None = None) -> Tensor:
    """Mexican hats (1 - w²) exp(-w²/2), w = (u - τ) / σ.

    place, log_scale: τ and log σ of each node (nodes x size); default evenly on [-1, 1], as wide as they are apart.
    """
    step = 2 / (size - 1)
    place = _evenly(u, size, -1, step) if place is None else place
    scale = torch.full_like(place, step) if log_scale is None else log_scale.exp()
    squared = ((u[..., None] - place) / scale).square()
    return (1 - squared) * (-squared / 2).exp()


def _evenly(like: Tensor, count: int, first: float, step: float) -> Tensor:
    return first + step * torch.arange(count, dtype=like.dtype, device=like.device)


FAMILIES = {"spline": spline, "rbf": rbf, "wavelet": wavelet, "chebyshev": chebyshev, "fourier": fourier}


def families_named(families: str, size: int) -> list[str]:
    """The names in a text of them, or an error that says what is wrong."""
    names = [name.strip() for name in families.split(",") if name.strip()]
    if not names or set(names) - set(FAMILIES) or len(set(names)) != len(names):
        raise TransectError(f"families={families!r} should name some of {ALL_FAMILIES}, each once")
    if "fourier" in names and size % 2:
        raise TransectError(f"fourier has sines and cosines of as many frequencies: size={size} should be even")
    return names


class Selectable(nn.Module):
    """Nodes with an input each, and basis functions of several families of which each node learns its share.

    counts: after pruning, to how many nodes each family belongs; None before. A subclass holds the coefficients of a
    family under its name in `coefficients`.
    """

    temperature: Tensor
    nodes: Tensor

    def __init__(self, inputs: int, families: list[str], size: int, counts: list[int] | None) -> None:
        super().__init__()
        self.families, self.size, self.counts = families, size, counts
        grid = torch.linspace(-1, 1, 1001, dtype=torch.float64, device="cpu")
        self.rms = [float(FAMILIES[name](grid, size).square().mean().sqrt()) for name in families]
        if counts is None:
            self.logits = nn.Parameter(torch.zeros(inputs, len(families)))  # a
            self.register_buffer("temperature", torch.ones(()))
        else:
            if len(counts) != len(families) or sum(counts) != inputs:
                raise ValueError(f"{counts} nodes of the families {families} are not {inputs}")
            self.register_buffer("nodes", torch.arange(inputs))  # those of the first family, of the second, ...
        self.coefficients = nn.ParameterDict()
        if (waves := self.held.get("wavelet", 0)) > 0:
            step = 2 / (size - 1)
            self.place = nn.Parameter((-1 + step * torch.arange(size)).repeat(waves, 1))  # τ
            self.log_scale = nn.Parameter(torch.full((waves, size), math.log(step)))  # log σ

    @property
    def held(self) -> dict[str, int]:
        """How many nodes have a function of each family."""
        inputs = self.logits.shape[0] if self.counts is None else 0
        counts = [inputs] * len(self.families) if self.counts is None else self.counts
        return dict(zip(self.families, counts, strict=True))

    def selection(self) -> Tensor:
        """s = softmax(a / temperature): each family's share of each node (nodes x families)."""
        logits = wide(self.logits)
        return (logits / self.temperature.to(logits.dtype)).softmax(dim=-1)

    def bases(self, x: Tensor) -> dict[str, Tensor]:
        """By family, the basis functions of its nodes (... x nodes of it x size), times their share. In float32."""
        u = (x if x.dtype == torch.float64 else x.float()).tanh()
        shares = self.selection() if self.counts is None else None
        pieces = dict.fromkeys(self.families, u)
        if self.counts is not None:
            pieces = dict(zip(self.families, u[..., self.nodes].split(self.counts, dim=-1), strict=True))
        found = {}
        for i, (name, count) in enumerate(self.held.items()):
            if count:
                if name == "wavelet":
                    place, log_scale = self.place.to(u.dtype), self.log_scale.to(u.dtype)
                    basis = wavelet(pieces[name], self.size, place, log_scale)
                else:
                    basis = FAMILIES[name](pieces[name], self.size)
                found[name] = basis / self.rms[i] if shares is None else basis * (shares[:, i, None] / self.rms[i])
        return found

    def fresh(self, counts: list[int]) -> Selectable:
        """The same with other numbers, pruned so that each family has so many nodes."""
        raise NotImplementedError

    def of_nodes(self, coefficients: Tensor, nodes: Tensor) -> Tensor:
        """A family's coefficients, for some of its nodes."""
        raise NotImplementedError

    @torch.no_grad()
    def pruned(self, choice: Tensor) -> Selectable:
        """The same with one family for each node; choice: its number (nodes)."""
        counts = torch.bincount(choice, minlength=len(self.families)).tolist()
        made = self.fresh(counts).to(self.logits)
        for name, parameter in self.named_parameters(recurse=False):
            if name not in ("logits", "place", "log_scale"):
                getattr(made, name).copy_(parameter)
        made.nodes.copy_(choice.argsort(stable=True))
        for name, nodes in zip(self.families, made.nodes.split(counts), strict=True):
            if len(nodes):
                made.coefficients[name].copy_(self.of_nodes(self.coefficients[name], nodes))
                if name == "wavelet":
                    made.place.copy_(self.place[nodes])
                    made.log_scale.copy_(self.log_scale[nodes])
        return made

    @property
    def basis_flops(self) -> int:
        """Operations for the values of the basis functions: about 8 for each."""
        return 8 * self.size * sum(self.held.values())


class KANLayer(Selectable):
    """y_o = Σ_i [w_oi silu(x_i) + Σ_f s_if Σ_k c^f_oik B^f_k(tanh x_i)], B of root mean square 1."""

    def __init__(
        self, inputs: int, outputs: int, families: list[str], size: int, counts: list[int] | None = None
    ) -> None:
        super().__init__(inputs, families, size, counts)
        self.base = nn.Parameter(torch.randn(outputs, inputs) * 0.5 / math.sqrt(inputs))  # w
        for name, count in self.held.items():
            if count:
                drawn = torch.randn(outputs, count * size) * 0.1 / math.sqrt(inputs)  # c, K numbers for each node
                self.coefficients[name] = nn.Parameter(drawn)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(functional.silu(x), self.base)
        for name, basis in self.bases(x).items():
            y = y + functional.linear(basis.flatten(-2).to(x.dtype), self.coefficients[name])
        return y

    def fresh(self, counts: list[int]) -> KANLayer:
        return KANLayer(self.base.shape[1], self.base.shape[0], self.families, self.size, counts)

    def of_nodes(self, coefficients: Tensor, nodes: Tensor) -> Tensor:
        return coefficients.unflatten(1, (-1, self.size))[:, nodes].flatten(1)

    @property
    def flops(self) -> int:
        """Operations for one position."""
        return self.basis_flops + 2 * (self.base.numel() + sum(c.numel() for c in self.coefficients.values()))


class Functions(Selectable):
    """y_i = w_i silu(x_i) + Σ_f s_if Σ_k c^f_ik B^f_k(tanh x_i): w begins at 1 and c at 0."""

    def __init__(self, neurons: int, families: list[str], size: int, counts: list[int] | None = None) -> None:
        super().__init__(neurons, families, size, counts)
        self.base = nn.Parameter(torch.ones(neurons))
        for name, count in self.held.items():
            if count:
                self.coefficients[name] = nn.Parameter(torch.zeros(count, size))

    def forward(self, x: Tensor) -> Tensor:
        given = wide(x)
        y = self.base.to(given.dtype) * functional.silu(given)
        found = {
            name: torch.einsum("...ik,ik->...i", basis, self.coefficients[name].to(given.dtype))
            for name, basis in self.bases(x).items()
        }
        if self.counts is None:
            return sum(found.values(), y).to(x.dtype)
        return (y + torch.cat(list(found.values()), dim=-1)[..., self.nodes.argsort()]).to(x.dtype)

    def fresh(self, counts: list[int]) -> Functions:
        return Functions(self.base.shape[0], self.families, self.size, counts)

    def of_nodes(self, coefficients: Tensor, nodes: Tensor) -> Tensor:
        return coefficients[nodes]

    @property
    def flops(self) -> int:
        """Operations for one position."""
        return self.basis_flops + 2 * sum(c.numel() for c in self.coefficients.values())


class SKANPart(Described):
    """What both parts share: once pruned, their description also says to how many nodes of a layer each family belongs.

    layers: names of the layers, in their order.
    """

    layers: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        counts = [getattr(self, name).counts for name in self.layers]
        if all(each is None for each in counts):
            return super().describe()
        return {**super().describe(), "pruned": ";".join(",".join(map(str, each)) for each in counts)}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Described:
        made: Any = super().from_description({key: value for key, value in description.items() if key != "pruned"})
        if (told := description.get("pruned")) is not None:
            each = [[int(count) for count in text.split(",")] for text in str(told).split(";")]
            for name, counts in zip(made.layers, each, strict=True):
                setattr(made, name, getattr(made, name).fresh(counts))
        return made

    @property
    def flops(self) -> int:
        return sum(getattr(self, name).flops for name in self.layers)


class SelectableKAN(SKANPart, MLPPart):
    """Two KAN layers whose nodes learn from which families of functions theirs are.

    Of as many neurons it has families x size + 1 times the numbers of an MLP without a gate, and once pruned size + 1
    times: give it fewer.

    families: what is tried, of spline, rbf, wavelet (with learned places and scales), chebyshev and fourier.
    size: basis functions of a family.
    """

    kind = "mlp.s-kan"
    paper = "arXiv:2408.08338"
    limit = "with all coefficients 0 it is the MLP of two matrices, with silu in front of both; with one family, a KAN"
    layers = ("first", "second")

    def __init__(self, width: int, neurons: int, *, families: str = ALL_FAMILIES, size: BasisSize = 6) -> None:
        super().__init__()
        names = families_named(families, size)
        self.first = KANLayer(width, neurons, names, size)
        self.second = KANLayer(neurons, width, names, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class SelectableActivation(SKANPart, Activation):
    """A learned function for each neuron, which learns from which family it is.

    families: what is tried, of spline, rbf, wavelet (with learned places and scales), chebyshev and fourier.
    size: basis functions of a family.
    """

    kind = "activation.s-kan"
    of_neurons = True
    paper = "arXiv:2408.08338"
    limit = "it begins as silu"
    layers = ("functions",)

    def __init__(self, neurons: int, *, families: str = ALL_FAMILIES, size: BasisSize = 6) -> None:
        super().__init__()
        self.functions = Functions(neurons, families_named(families, size), size)

    def forward(self, x: Tensor) -> Tensor:
        return self.functions(x)
