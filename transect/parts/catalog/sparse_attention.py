"""Softmax attention over few of the positions, chosen by where they are: strided, fixed, Longformer, BigBird, segments.

A pattern is said twice: as a rule, `sees`, by which generation picks the keys that it reads, and as blocks of keys that
are gathered for all queries at once. No N x N tensor is made in either. Positions are counted over what is real, so
that padding, wherever it stands, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ...parameters import Seed
from ..attention import Attention, joined, read
from ..part import Around

Window = Annotated[int, Range(1, 2**20)]
Few = Annotated[int, Range(0, 2**16)]


class SparseAttention(Attention):
    """What all of them share; a subclass gives the pattern as `sees` and computes it in `gathered`.

    In generation all keys and values are kept, and those that no query sees are not read.
    """

    recurrent = True  # though its state grows

    def sees(self, at: Tensor, keys: Tensor, count: int) -> Tensor:
        """Whether a query at one position sees a key at another, of `count` positions; causality aside."""
        raise NotImplementedError

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        """What is read (B x heads x N x size). real: which keys may be (1 or B x N); they are the first ones."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        real, state = around.real, around.state
        if state is not None:
            new = {"k": k, "v": v, "real": k.new_ones(len(k), k.shape[2], dtype=torch.bool) if real is None else real}
            if not state:
                state |= new
            else:
                for name, tensor in new.items():
                    state[name] = torch.cat([state[name], tensor], dim=1 if name == "real" else 2)
                return self._go_on(q, state["k"], state["v"], state["real"])
        if real is None or bool(real.all()):
            return self.gathered(q, k, v, k.new_ones(1, k.shape[2], dtype=torch.bool))
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)  # what is real comes first
        q, k, v = (one.take_along_dim(order[:, None, :, None], dim=2) for one in (q, k, v))
        y = self.gathered(q, k, v, real.take_along_dim(order, dim=1))
        return y.take_along_dim(order.argsort(dim=1)[:, None, :, None], dim=2)

    def _go_on(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        """Attention of the last positions' queries to all so far; what none of them sees is not read."""
        number = real.cumsum(dim=1) - 1
        at = number[:, -q.shape[2] :, None]
        mask = self.sees(at, number[:, None], k.shape[2]) & real[:, None]
        if self.causal:
            mask &= number[:, None] <= at
        index = torch.arange(k.shape[2], device=q.device)
        mask |= index == index[-q.shape[2] :, None]
        chosen = mask.any(dim=0).any(dim=0).nonzero()[:, 0]
        return functional.scaled_dot_product_attention(
            q, k[:, :, chosen], v[:, :, chosen], attn_mask=mask[:, None, :, chosen]
        )

    def _behind(self, at: Tensor, keys: Tensor) -> Tensor:
        """Keys that causality lets a query see."""
        return keys <= at if self.causal else torch.ones_like(keys <= at)

    @property
    def _inner(self) -> int:
        return self.heads * self.head_size


def in_blocks(x: Tensor, size: int) -> Tensor:
    """Positions in blocks, padded behind: ... x N x d -> ... x blocks x size x d."""
    return functional.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


def surrounding(x: Tensor, size: int, before: int, behind: int) -> Tensor:
    """Each block with so many positions on its sides: ... x N x d -> ... x blocks x (before + size + behind) x d."""
    whole = functional.pad(x, (0, 0, before, behind + -x.shape[-2] % size))
    return whole.unfold(-2, before + size + behind, size).mT


def positions_of(count: int, size: int, before: int, behind: int, device: torch.device) -> Tensor:
    """The positions that `surrounding` gathers for `count` of them (blocks x wide); some are below 0 or too large."""
    first = torch.arange(0, count, size, device=device)
    return first[:, None] + torch.arange(-before, size + behind, device=device)


def real_at(real: Tensor, at: Tensor) -> Tensor:
    """Which of the positions (blocks x wide) exist and are real (1 or B x blocks x wide)."""
    return real[:, at.clamp(0, real.shape[1] - 1)] & (at >= 0) & (at < real.shape[1])


class Strided(SparseAttention):
    """Each position sees those less than `stride` away and every `stride`-th from it on, as one softmax.

    The strided pattern of Sparse Transformers (Section 4.2, A⁽¹⁾ and A⁽²⁾, as one head over their union).

    stride: best about the square root of the length.
    """

    kind = "mixer.strided"
    paper = "arXiv:1904.10509"
    limit = "with a stride of 1, or of all positions, it is softmax attention"
    cost = "N (stride + N / stride)"

    def __init__(self, width: int, heads: int, head_size: int, causal: bool, *, stride: Window = 64) -> None:
        super().__init__(width, heads, head_size, causal)
        self.stride = stride

    def sees(self, at: Tensor, keys: Tensor, count: int) -> Tensor:
        return ((at - keys).abs() < self.stride) | ((at - keys) % self.stride == 0)

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        count, size = q.shape[2], self.stride
        ahead = 0 if self.causal else size
        q = in_blocks(q * self.head_size**-0.5, size)  # B x heads x blocks x stride x size
        at = positions_of(count, size, 0, 0, q.device)[:, :, None]
        keys = positions_of(count, size, size, ahead, q.device)
        near = ((at - keys[:, None]).abs() < size) & self._behind(at, keys[:, None]) & real_at(real, keys)[:, :, None]
        near |= at == keys[:, None]
        pieces = [read(q, surrounding(k, size, size, ahead), surrounding(v, size, size, ahead), near[:, None])]
        columns, k, v = (one.transpose(2, 3) for one in (q, in_blocks(k, size), in_blocks(v, size)))
        at = at[..., 0].T  # stride x blocks: what sees one another at a distance
        far = self._behind(at[:, :, None], at[:, None]) & (at[:, :, None] != at[:, None])
        far = far & real_at(real, at)[:, :, None]
        y, sums = read(columns, k, v, far[:, None])
        pieces.append((y.transpose(2, 3), sums.transpose(2, 3)))
        return joined(pieces).flatten(2, 3)[:, :, :count]

    def mixing_flops(self, length: int) -> int:
        near = (2 if self.causal else 3) * min(self.stride, length)
        return 4 * length * (near + -(-length // self.stride)) * self._inner


class Fixed(SparseAttention):
    """Each position sees its own block of `stride` and the last `summary` positions of every other, as one softmax.

    The fixed pattern of Sparse Transformers (Section 4.2): what a block ends with can carry it on.

    stride: positions of a block; best about the square root of the length.
    summary: of these, how many all others see.
    """

    kind = "mixer.fixed"
    paper = "arXiv:1904.10509"
    limit = "with a summary of the whole block, or a block of all positions, it is softmax attention"
    cost = "N (stride + N summary / stride)"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, stride: Window = 64,
        summary: Annotated[int, Range(1, 2**20)] = 4,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal)
        if summary > stride:
            raise TransectError(f"{self.kind}: a summary of {summary} is more than its block of {stride} positions has")
        self.stride, self.summary = stride, summary

    def sees(self, at: Tensor, keys: Tensor, count: int) -> Tensor:
        own = at.div(self.stride, rounding_mode="floor") == keys.div(self.stride, rounding_mode="floor")
        return own | (keys % self.stride >= self.stride - self.summary)

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        count, size = q.shape[2], self.stride
        at = positions_of(count, size, 0, 0, q.device)  # blocks x stride
        k, v = (
            torch.cat([one, _everywhere(one[:, :, :, -self.summary :].flatten(2, 3), len(at))], dim=3)
            for one in (in_blocks(k, size), in_blocks(v, size))
        )
        ends = at[:, -self.summary :].flatten()
        keys = torch.cat([at, ends.expand(len(at), -1)], dim=1)
        others = ends // size != torch.arange(len(at), device=q.device)[:, None]  # its own end a block has already
        counted = torch.cat([torch.ones_like(at, dtype=torch.bool), others], dim=1)
        return _blocked(q, k, v, at, keys, counted & real_at(real, keys), self._behind)[:, :, :count]

    def mixing_flops(self, length: int) -> int:
        return 4 * length * (min(self.stride, length) + length // self.stride * self.summary) * self._inner


class Longformer(SparseAttention):
    """Each position sees those less than `window` away and the first few, the global ones; these see all.

    The global positions use the same matrices as the others, where the authors' have their own.

    window: how far, the position itself included.
    global_tokens: how many global positions there are at the beginning.
    """

    kind = "mixer.longformer"
    paper = "arXiv:2004.05150"
    limit = "with a window of all positions, or all of them global, it is softmax attention"
    cost = "N"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, window: Window = 64, global_tokens: Few = 1,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal)
        self.window, self.global_tokens = window, global_tokens
        self.random, self.seed = 0, 0

    def sees(self, at: Tensor, keys: Tensor, count: int) -> Tensor:
        near = ((at - keys).abs() < self.window) | (keys < self.global_tokens) | (at < self.global_tokens)
        if not self.random:
            return near
        blocks = -(-count // self.window)
        drawn = random_blocks(blocks, self.random, self.causal, self.seed, at.device)
        block = keys.div(self.window, rounding_mode="floor")
        row = at.div(self.window, rounding_mode="floor").clamp(0, blocks - 1)
        return near | (drawn[row] == block[..., None]).any(-1)

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        count, size, few = q.shape[2], self.window, min(self.global_tokens, q.shape[2])
        ahead = 0 if self.causal else size
        at = positions_of(count, size, 0, 0, q.device)  # blocks x window
        beside = positions_of(count, size, size, ahead, q.device)
        keys, counted = [beside, torch.arange(few, device=q.device).expand(len(at), -1)], [beside >= few]
        counted.append(torch.ones_like(keys[1], dtype=torch.bool))
        from_k, from_v = ([surrounding(x, size, size, ahead), _everywhere(x[:, :, :few], len(at))] for x in (k, v))
        if self.random:
            drawn = random_blocks(len(at), self.random, self.causal, self.seed, q.device)
            again = (drawn[:, :, None] == drawn[:, None]).tril(-1).any(-1)  # blocks x random: drawn before
            chosen = at[drawn].flatten(1)
            for pieces, x in ((from_k, k), (from_v, v)):
                pieces.append(in_blocks(x, size)[:, :, drawn].flatten(3, 4))
            keys.append(chosen)
            counted.append(~again.repeat_interleave(size, dim=1) & (chosen >= few))
        at_keys = torch.cat(keys, dim=1)
        allowed = torch.cat(counted, dim=1) & real_at(real, at_keys)
        near = beside.shape[1] + few

        def seen(rows: Tensor, columns: Tensor) -> Tensor:
            """Of what is gathered: in the window, global, or drawn and not in the window."""
            number = torch.arange(columns.shape[-1], device=q.device)
            close = (rows - columns).abs() < size
            return (close & (number < near) | ~close & (number >= near) | (columns < few)) & self._behind(rows, columns)

        y = _blocked(q, torch.cat(from_k, dim=3), torch.cat(from_v, dim=3), at, at_keys, allowed, seen)[:, :, :count]
        if self.causal or not few:
            return y
        whole = functional.scaled_dot_product_attention(q[:, :, :few], k, v, attn_mask=real[:, None, None])
        return torch.cat([whole, y[:, :, few:]], dim=2)

    def mixing_flops(self, length: int) -> int:
        window, few = min(self.window, length), min(self.global_tokens, length)
        keys = (2 if self.causal else 3) * window + few + self.random * window
        return 4 * length * (keys + (0 if self.causal else few)) * self._inner


class BigBird(Longformer):
    """Longformer's window and global positions, and `random` blocks of a window's size for each block of queries.

    Which blocks is drawn once, from the seed, the block's number and nothing else; in a causal model from those before.
    A block that is drawn twice, or lies in the window, counts once.

    window: how far, the position itself included; also the size of the blocks.
    global_tokens: how many global positions there are at the beginning.
    random: blocks drawn for each block.
    seed: of the draw.
    """

    kind = "mixer.bigbird"
    paper = "arXiv:2007.14062"
    limit = "with a window of all positions, or all of them global, it is softmax attention"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, layer: int, *, window: Window = 32,
        global_tokens: Few = 2, random: Annotated[int, Range(0, 1024)] = 3, seed: Seed = 0,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, window=window, global_tokens=global_tokens)
        self.random, self.seed = random, seed + layer


class Segments(SparseAttention):
    """Each position sees its own segment and so many positions before it, as Transformer-XL's memory lets it.

    No gradient goes through the memory to what it was computed from (Section 3.2), only to the matrices.

    segment: positions of a segment.
    memory: how many before it are seen.
    """

    kind = "mixer.transformer-xl"
    paper = "arXiv:1901.02860"
    limit = "with a segment of all positions it is softmax attention"
    cost = "N"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, segment: Window = 64, memory: Few = 64
    ) -> None:
        super().__init__(width, heads, head_size, causal)
        self.segment, self.memory = segment, memory

    def sees(self, at: Tensor, keys: Tensor, count: int) -> Tensor:
        start = at.div(self.segment, rounding_mode="floor") * self.segment
        return (keys >= start - self.memory) & (keys < start + self.segment)

    def project(self, x: Tensor, around: Around) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v; in training, k and v have behind their channels those through which no gradient goes to x."""
        q, k, v = super().project(x, around)
        if torch.is_grad_enabled() and around.state is None:
            _, old_k, old_v = super().project(x.detach(), around)
            k, v = torch.cat([k, old_k], dim=-1), torch.cat([v, old_v], dim=-1)
        return q, k, v

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        count, size = q.shape[2], self.segment
        at, keys = (positions_of(count, size, before, 0, q.device) for before in (0, self.memory))
        k, v = (self._behind_memory(one, count) for one in (k, v))
        return _blocked(q, k, v, at, keys, real_at(real, keys), self._behind)[:, :, :count]

    def _behind_memory(self, one: Tensor, count: int) -> Tensor:
        """Each segment's keys or values behind those of its memory (B x heads x blocks x (memory + segment) x size)."""
        old = one[..., -self.head_size :]
        memory = surrounding(old, self.segment, self.memory, 0)[..., : self.memory, :]
        return torch.cat([memory, in_blocks(one[..., : self.head_size], self.segment)], dim=3)

    def mixing_flops(self, length: int) -> int:
        return 4 * length * min(self.segment + self.memory, length) * self._inner


class Compressive(Segments):
    """Transformer-XL's segments, behind whose memory older positions are seen as means of `rate` of them each.

    The mean is the simplest of the paper's compressions (Section 3.2); no gradient goes through it, as through memory.

    segment: positions of a segment.
    memory: how many before it are seen as they are.
    compressed: how many means before these are seen.
    rate: positions in a mean; segment and memory are multiples of it.
    """

    kind = "mixer.compressive"
    paper = "arXiv:1911.05507"
    recurrent = False  # a rule of which positions are seen does not say it

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, segment: Window = 64, memory: Few = 64,
        compressed: Few = 64, rate: Annotated[int, Range(1, 2**16)] = 4,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, segment=segment, memory=memory)
        if segment % rate or memory % rate:
            raise TransectError(
                f"{self.kind}: a segment of {segment} and a memory of {memory} should be multiples of the rate, {rate}"
            )
        self.compressed, self.rate = compressed, rate

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        count, size, rate = q.shape[2], self.segment, self.rate
        each, before = size // rate, self.memory // rate + self.compressed  # means of a segment, and in front of it
        at, keys = (positions_of(count, size, before, 0, q.device) for before in (0, self.memory))
        means = (in_blocks(one[..., -self.head_size :], rate).mean(-2) for one in (k, v))
        old_k, old_v = (surrounding(one, each, before, 0)[:, :, : len(at), : self.compressed] for one in means)
        last = positions_of(-(-count // size) * each, each, before, 0, q.device)[:, : self.compressed] * rate + rate - 1
        k, v = (torch.cat([old, self._behind_memory(one, count)], 3) for old, one in ((old_k, k), (old_v, v)))
        keys = torch.cat([last, keys], dim=1)
        return _blocked(q, k, v, at, keys, real_at(real, keys), self._behind)[:, :, :count]

    def mixing_flops(self, length: int) -> int:
        return super().mixing_flops(length) + 4 * length * min(self.compressed, length // self.rate) * self._inner


def _everywhere(keys: Tensor, blocks: int) -> Tensor:
    """The same keys for each block: B x heads x n x d -> B x heads x blocks x n x d."""
    return keys.unsqueeze(2).expand(-1, -1, blocks, -1, -1)


def _blocked(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, keys: Tensor, allowed: Tensor, seen: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Attention of blocks of queries, each to keys of its own (B x heads x (blocks of N) x size).

    q: B x heads x N x size. k, v: B x heads x blocks x n x size. at: positions of the queries (blocks x block).
    keys: of the keys (blocks x n). allowed: which keys may be seen by any (1 or B x blocks x n). seen: of positions of
    queries and keys, which see one another. A query that would see nothing sees itself.
    """
    at, keys = at[:, :, None], keys[:, None]
    mask = seen(at, keys) & allowed[:, :, None]
    mask = mask | (at == keys) & ~mask.any(-1, keepdim=True)
    # Blocks go to the batch: torch's fused kernels take no fifth dimension.
    mask = mask.expand(len(q), -1, -1, -1).flatten(0, 1)[:, None]
    folded = (one.transpose(1, 2).flatten(0, 1) for one in (in_blocks(q, at.shape[1]), k, v))
    y = functional.scaled_dot_product_attention(*folded, attn_mask=mask)
    return y.unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2, 3)


def random_blocks(blocks: int, each: int, causal: bool, seed: int, device: torch.device) -> Tensor:
    """Numbers of blocks drawn for each block (blocks x each); of earlier ones if causal, where there are any.

    An integer hash of the numbers: the draw for a block does not depend on how many there are, except in a model that
    sees all of them.
    """
    number = torch.arange(blocks, device=device)
    drawn = number[:, None] * 0x9E37 + torch.arange(each, device=device) * 0x85EBCA + seed % 2**31 * 0x27D4 + 1
    for _ in range(2):
        drawn = ((drawn >> 16) ^ drawn) * 0x45D9F3B & 0xFFFFFFFF
    most = (number - 1).clamp(min=1) if causal else torch.full_like(number, max(blocks, 1))
    return ((drawn >> 16) ^ drawn) % most[:, None]
