"""FIT (Chen & Li 2023, arXiv:2305.12689): attention within groups, and between them by a few latent vectors.

In the mixer's place stands one stage of the paper: a local layer, latents that read their group, one global layer of
them, and its positions reading them back. Latents begin anew in every block, since a mixer hands on nothing but the
stream; the paper's MLPs and its stages of several layers are the model's blocks.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..attention import Attention
from ..part import Around


class LatentReading(nn.Module):
    """Attention of one set of vectors to another, with a LayerNorm on both sides, by heads."""

    def __init__(self, width: int, heads: int, head_size: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_norm, self.from_norm = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, heads * head_size, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(heads * head_size, width, bias=False)

    def forward(self, to: Tensor, of: Tensor, seen: Tensor) -> Tensor:
        """What `to` (B x Q x d) reads of `of` (B x K x d), nothing where it sees nothing. seen: B x Q or 1 x K."""
        of = self.from_norm(of)
        pairs = ((self.q_proj, self.to_norm(to)), (self.k_proj, of), (self.v_proj, of))
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear, x in pairs)
        nothing = ~seen.any(-1, keepdim=True)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=(seen | nothing)[:, None])
        return self.o_proj(y.transpose(1, 2).flatten(2)).masked_fill(nothing, 0.0)


class FIT(Attention):
    """Softmax attention within groups of positions, plus what a few latents of each group learn from one another.

    After it each group's latents read the whole group, then the latents of all groups (causal: up to their own) attend
    to one another, and the group's positions read its own latents, in a causal model those of the group before.

    group: positions of a group; 0 for (length latents²)^(1/3), where local and global attention cost alike.
    latents: of each group; 0 for groups that know nothing of each other.
    """

    kind = "mixer.fit"
    paper = "arXiv:2305.12689"
    limit = "with one group and no latents it is softmax attention"
    cost = "N^(4/3)"

    def __init__(
        self, width: int, heads: int, head_size: int, length: int, causal: bool, eps: float, *,
        group: Annotated[int, Range(0, 2**20)] = 0, latents: Annotated[int, Range(0, 2**12)] = 4,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal)
        if length < 1:
            raise TransectError("fit needs a fixed number of positions, which this model's config does not give")
        self.length, self.latents = length, latents
        self.group = min(length, group or max(1, round((length * max(1, latents) ** 2) ** (1 / 3))))
        if latents:
            self.slots = nn.Parameter(torch.randn(-(-length // self.group), latents, width) * 0.02)  # as they begin
            self.read, self.between, self.write = (LatentReading(width, heads, head_size, eps) for _ in range(3))

    def mix(self, x: Tensor, around: Around) -> Tensor:
        count = x.shape[1]
        if count > self.length:
            raise TransectError(f"fit has latents for {self.length} positions at most, and there are {count}")
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if around.real is None else around.real
        q, k, v = self.project(x, around)
        group = min(self.group, count)
        groups, behind = -(-count // group), -count % group
        x = functional.pad(x, (0, 0, 0, behind)).unflatten(1, (groups, group)).flatten(0, 1)  # B t x n x d
        real = functional.pad(real, (0, behind)).unflatten(1, (groups, group))  # B x t x n
        q, k, v = (
            functional.pad(one, (0, 0, 0, behind)).unflatten(2, (groups, group)).transpose(1, 2).flatten(0, 1)
            for one in (q, k, v)
        )  # B t x heads x n x size
        own = torch.eye(group, dtype=torch.bool, device=x.device)
        seen = real.flatten(0, 1)[:, None] & (own.new_ones(group, group).tril() if self.causal else True) | own
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
        y = self.put_out(y, x)
        if self.latents:
            y = y + self._of_latents(x + y, real)
        return y.unflatten(0, (-1, groups)).flatten(1, 2)[:, :count]

    def _of_latents(self, x: Tensor, real: Tensor) -> Tensor:
        """What the groups' positions are told (B t x n x d). x: B t x n x d. real: B x t x n."""
        batch, groups, _ = real.shape
        slots = self.slots[:groups].expand(batch, -1, -1, -1).flatten(0, 1)  # B t x m x d
        latents = slots + self.read(slots, x, real.flatten(0, 1)[:, None])
        latents = latents.unflatten(0, (batch, groups)).flatten(1, 2)  # B x t m x d
        of_group = torch.arange(groups, device=x.device).repeat_interleave(self.latents)
        seen = real.any(-1).repeat_interleave(self.latents, dim=1)[:, None]  # B x 1 x t m
        if self.causal:
            seen = seen & (of_group <= of_group[:, None])
        latents = latents + self.between(latents, latents, seen)
        latents = latents.unflatten(1, (groups, -1))  # B x t x m x d
        if self.causal:  # a group's latents know all of it, so that only the next may read them
            latents = functional.pad(latents[:, :-1], (0, 0, 0, 0, 1, 0))
        latents = latents.flatten(0, 1)
        return self.write(x, latents, torch.ones(1, 1, self.latents, dtype=torch.bool, device=x.device))

    @property
    def flops(self) -> int:
        """Of one position; the latents' maps are counted with what depends on length."""
        maps = [self.q_proj, self.k_proj, self.v_proj, self.o_proj]
        if self.latents:
            maps += [self.read.k_proj, self.read.v_proj, self.write.q_proj, self.write.o_proj]
        return sum(2 * one.weight.numel() for one in maps)

    def mixing_flops(self, length: int) -> int:
        group = min(self.group, length)
        slots = -(-length // group) * self.latents
        scores = length * group + 2 * length * self.latents + slots * slots
        of_a_latent = 8 * 2 * self.q_proj.weight.numel()  # q and o of read, all of between, k and v of write
        return 4 * scores * self.q_proj.out_features + slots * of_a_latent
