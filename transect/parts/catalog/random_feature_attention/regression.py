"""One layer of random heads as a regression of a number from a query and a set of keys, fitted in closed form.

f(x_0; x_1..x_N) = Σ_m mean_i ReLU(x̃_0ᵀ W_m x̃_i) <v_m, x̃_i> with x̃ = [x; 1] is linear in the values v: f = <Φ, V>.
Batches of n examples: query (n x d), keys (n x N x d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import pi

import torch
from torch import Tensor
from torch.nn import functional

from ....errors import TransectError

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the ridge, in units of the kernel's mean diagonal
_DEVIATION = 0.5  # of the random weights: variance 1/4
_NUMBERS = 2**24  # of scores at once


def random_heads(size: int, heads: int, bias: float = 0.0, seed: int = 0) -> Tensor:
    """W (heads x d+1 x d+1) for points of `size` d: N(0, 1/4), around `bias` times the identity on the points."""
    drawn = _drawn(seed, heads, size + 1, size + 1)
    centre = torch.eye(size + 1, dtype=drawn.dtype)
    centre[-1, -1] = 0.0
    return drawn + bias * centre


def random_units(size: int, units: int, seed: int = 0) -> Tensor:
    """Directions (units x size+1) of a random network of one hidden layer, N(0, 1/4); the last is its bias."""
    return _drawn(seed, units, size + 1)


def _drawn(seed: int, *shape: int) -> Tensor:
    return _DEVIATION * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _extended(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 1), value=1.0)


def attention_features(query: Tensor, keys: Tensor, heads: Tensor) -> Tensor:
    """Φ_m = mean_i ReLU(x̃_0ᵀ W_m x̃_i) x̃_i for heads W (M x d+1 x d+1): n x M x d+1.

    Raises TransectError where there are no keys, or they are not finite.
    """
    _check(query, keys)
    query, keys = _extended(query), _extended(keys)
    at_once = max(1, _NUMBERS // (len(query) * max(keys.shape[1:])))
    pieces = []
    for some in heads.split(at_once):
        asked = torch.einsum("na,mab->nmb", query, some)
        scores = (asked @ keys.mT).relu()  # n x m x N
        pieces.append(scores @ keys / keys.shape[1])
    return torch.cat(pieces, dim=1)


def mlp_features(query: Tensor, keys: Tensor, units: Tensor) -> Tensor:
    """ReLU(<w, [x_0 .. x_N; 1]>) of random directions w (units x (N+1)d+1), which know no keys: n x units."""
    _check(query, keys)
    return (_extended(torch.cat([query[:, None], keys], dim=1).flatten(1)) @ units.T).relu()


def _check(query: Tensor, keys: Tensor) -> None:
    if keys.dim() != 3 or not keys.shape[1] or query.shape != keys[:, 0].shape:
        raise TransectError(
            f"queries should be n x d and keys n x N x d with at least one key, not {tuple(query.shape)} and "
            f"{tuple(keys.shape)}"
        )
    if not (query.isfinite().all() and keys.isfinite().all()):
        raise TransectError("queries and keys should be finite numbers, and some are not: leave those examples out")


def attention_kernel(query: Tensor, keys: Tensor, other_query: Tensor, other_keys: Tensor) -> Tensor:
    """What the mean over heads of Φ Φ'ᵀ comes to with ever more unbiased heads (n x n').

    The scores of x and x' are Gaussian together, with covariance <x̃_0, x̃'_0> <x̃_i, x̃'_j> / 4, so that their ReLUs'
    mean product is the arc-cosine kernel of first order (Cho and Saul, NIPS 2009).
    """
    _check(query, keys)
    _check(other_query, other_keys)
    query, keys, other_query, other_keys = (_extended(one) for one in (query, keys, other_query, other_keys))
    size, other_size = (
        _DEVIATION * one.norm(dim=-1, keepdim=True) * all_.norm(dim=-1)
        for one, all_ in ((query, keys), (other_query, other_keys))
    )  # deviations of the scores: n x N
    alike = torch.einsum("nid,mjd->nmij", keys, other_keys)
    sizes = torch.einsum("ni,mj->nmij", size, other_size)
    cosine = (_DEVIATION**2 * (query @ other_query.T)[:, :, None, None] * alike / sizes).clamp(-1, 1)
    angle = cosine.arccos()
    return (sizes / (2 * pi) * (angle.sin() + (pi - angle) * cosine) * alike).mean((2, 3))


def ridge(features: Tensor, targets: Tensor, strengths: Sequence[float]) -> Tensor:
    """V (strengths x p x t) that minimises |Φ V - y|² + λ c |V|², c the mean diagonal of Φ Φᵀ: for every λ at once.

    features: Φ (n x p). targets: t functions y (n x t), which should be centred. One eigendecomposition, of the smaller
    of ΦᵀΦ and ΦΦᵀ, serves them all.
    """
    dual = features.shape[1] > features.shape[0]
    gram = features @ features.T if dual else features.T @ features
    values, vectors = torch.linalg.eigh(gram)
    scale = features.square().sum() / len(features)
    added = scale * torch.tensor(strengths, dtype=values.dtype, device=values.device)
    asked = vectors.T @ (targets if dual else features.T @ targets)
    found = vectors @ (asked / (values.clamp_min(0) + added[:, None])[..., None])
    return features.T @ found if dual else found


@dataclass
class RandomHeadsRegression:
    """Fits the values of random heads to examples, with the ridge that predicts a held-out fifth of them best.

    heads: how many. bias, seed: see `random_heads`.
    """

    heads: int = 300
    bias: float = 0.0
    seed: int = 0
    strength: float = field(default=0.0, init=False)
    values: Tensor | None = field(default=None, init=False)
    mean: float = field(default=0.0, init=False)

    def fit(self, query: Tensor, keys: Tensor, targets: Tensor) -> RandomHeadsRegression:
        """From at least two examples; what `targets` (n) come to is predicted of others."""
        features = self._features(query, keys)
        values, mean, strength = fitted(features, targets[:, None])
        self.values, self.mean, self.strength = values[:, 0], float(mean), float(strength)
        return self

    def predict(self, query: Tensor, keys: Tensor) -> Tensor:
        """The targets of examples (n)."""
        if self.values is None:
            raise TransectError("the regression was not fitted yet: call fit first")
        return self._features(query, keys) @ self.values + self.mean

    def _features(self, query: Tensor, keys: Tensor) -> Tensor:
        heads = random_heads(query.shape[-1], self.heads, self.bias, self.seed)
        return attention_features(query, keys, heads.to(query)).flatten(1)


def fitted(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V (p x t), the means of the targets (n x t) and the strength of the ridge for each, chosen by the last fifth."""
    if len(features) < 2 or targets.shape[:1] != features.shape[:1] or not targets.isfinite().all():
        raise TransectError(
            f"{len(features)} examples and targets {tuple(targets.shape)} came: a fit needs at least two, with a "
            "finite number each"
        )
    held = max(1, len(features) // 5)
    mean = targets[:-held].mean(0)
    tried = features[-held:] @ ridge(features[:-held], targets[:-held] - mean, STRENGTHS) + mean
    best = (tried - targets[-held:]).square().mean(1).argmin(0)
    mean = targets.mean(0)
    every = ridge(features, targets - mean, STRENGTHS)
    chosen = torch.stack([every[number, :, target] for target, number in enumerate(best.tolist())], dim=1)
    return chosen, mean, torch.tensor(STRENGTHS)[best.cpu()]
