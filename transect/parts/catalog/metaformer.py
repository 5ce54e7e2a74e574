"""MetaFormer (Yu et al., CVPR 2022, arXiv:2111.11418): how little a mixer may do. Identity, pooling, random, spatial.

Each takes the normed stream and gives what is added to it, as in the paper's block; the block itself is the model's.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import TransectError
from ...parameters import Range, Seed
from ..part import Around, Mixer


def _masked(x: Tensor, real: Tensor | None) -> Tensor:
    return x if real is None else x * real[..., None].to(x.dtype)


class Identity(Mixer):
    """Gives its input back: positions learn nothing of each other."""

    kind = "mixer.identity"
    paper = "arXiv:2111.11418"
    limit = "none: it mixes nothing"
    cost = "N"
    recurrent = True

    def __init__(self, causal: bool) -> None:
        super().__init__(causal)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        return x

    def mixing_flops(self, length: int) -> int:
        return 0


class Pooling(Mixer):
    """The mean over a window of positions, less the input itself, since the stream adds that already.

    The window is centred on the position, or, in a causal model, ends at it. Only positions that exist count.

    size: of the window, odd.
    """

    kind = "mixer.pooling"
    paper = "arXiv:2111.11418"
    limit = "none: every position weighs alike"
    cost = "N"

    def __init__(self, causal: bool, *, size: Annotated[int, Range(1, 2**20)] = 3) -> None:
        super().__init__(causal)
        if size % 2 == 0:
            raise TransectError(f"the window of pooling should have an odd size, not {size}")
        self.size = size

    def mix(self, x: Tensor, around: Around) -> Tensor:
        counted = torch.ones(x.shape[:2], device=x.device, dtype=x.dtype) if around.real is None else around.real.to(x)
        after = 0 if self.causal else self.size // 2
        padding = (self.size - 1 - after, after)
        sums = functional.pad((x * counted[..., None]).transpose(1, 2), padding).unfold(2, self.size, 1).sum(-1)
        counts = functional.pad(counted, padding).unfold(1, self.size, 1).sum(-1)
        return (sums / counts[:, None].clamp(min=1)).transpose(1, 2) - x

    def mixing_flops(self, length: int) -> int:
        return 0  # additions of the stream's size alone


class _Fixed(Mixer):
    """What mixes by an N x N matrix that is the same for all inputs and channels."""

    cost = "N²"

    def __init__(self, width: int, length: int, causal: bool) -> None:
        super().__init__(causal)
        if length < 1:
            raise TransectError(
                f"{self.kind} needs a fixed number of positions, which this model's config does not give"
            )
        self.width, self.length = width, length

    def positions(self) -> Tensor:
        """The matrix (length x length): a row says what its position is given of the others."""
        raise NotImplementedError

    def mix(self, x: Tensor, around: Around) -> Tensor:
        count = x.shape[1]
        if count > self.length:
            raise TransectError(f"{self.kind} mixes {self.length} positions at most, and there are {count}")
        weights = self.positions()[:count, :count]
        return (weights.tril() if self.causal else weights) @ _masked(x, around.real)

    def mixing_flops(self, length: int) -> int:
        return 2 * length * length * self.width


class Random(_Fixed):
    """A random matrix over positions whose rows sum to one by a softmax; it is not trained.

    seed: of the matrix.
    """

    kind = "mixer.random"
    paper = "arXiv:2111.11418"
    limit = "none: which positions are read does not depend on them"
    mixture: Tensor

    def __init__(self, width: int, length: int, causal: bool, *, seed: Seed = 0) -> None:
        super().__init__(width, length, causal)
        mixture = torch.empty(length, length)
        if mixture.device.type != "meta":
            drawn = torch.rand(length, length, generator=torch.Generator().manual_seed(seed), device="cpu")
            unseen = torch.ones(length, length, dtype=torch.bool, device="cpu").triu(1)
            mixture.copy_((drawn.masked_fill(unseen, float("-inf")) if causal else drawn).softmax(-1))
        self.register_buffer("mixture", mixture)

    def positions(self) -> Tensor:
        return self.mixture


class Spatial(_Fixed):
    """A trained matrix over positions, the same for all channels (SpatialFc): it knows a fixed number of them."""

    kind = "mixer.spatial"
    paper = "arXiv:2111.11418"
    limit = "none: which positions are read does not depend on them"

    def __init__(self, width: int, length: int, causal: bool) -> None:
        super().__init__(width, length, causal)
        self.mixture = nn.Parameter(nn.init.trunc_normal_(torch.empty(length, length), std=0.02))

    def positions(self) -> Tensor:
        return self.mixture
