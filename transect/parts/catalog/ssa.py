"""Stochastically subsampled self-attention (Hussain et al., KDD 2023, arXiv:2306.01705): trained with fewer keys.

In training each query sees a random share of the keys, drawn anew for every sequence, layer and step, the same for all
heads; the softmax is over these alone, with no other scale. Otherwise it is softmax attention, and the paper ends the
training with a short phase of that (`thinned(model, 1)`). How local keys are preferred is our reading of the abstract:
the paper's own rule was not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ...parameters import Seed
from ..part import Around
from .softmax import Softmax


class SSA(Softmax):
    """Softmax attention that sees a random share of the keys while it is trained, and all of them otherwise.

    A causal query always sees itself as well. Of a generation only the prompt can be thinned, by `thinned`. Draws are
    from torch's own generator on the CPU, which a resumed training and a checkpointed gradient repeat.

    rate: share of the positions that a query sees, above 0; 1 is softmax attention.
    sampling: `unbiased`, the same random positions for all queries; `local`, queries in windows of that share see the
        positions that come into their window where all are shuffled with their neighbours.
    spread: of the shuffling, in widths of a window: 0 is attention within the window.
    neighbours: of the windows of shuffled positions, how many on each side are seen too, of a total of that share.
    first: so many first positions are in every unbiased sample, such as an image's class token.
    """

    kind = "mixer.ssa"
    paper = "arXiv:2306.01705"
    limit = "at a rate of 1, and wherever it is not trained, it is softmax attention"
    cost = "N², in training times the rate"

    def __init__(
        self, width: int, heads: int, key_value_heads: int, head_size: int, causal: bool, *,
        rate: Annotated[float, Range(0, 1, above=True)] = 0.5, sampling: Literal["unbiased", "local"] = "unbiased",
        spread: Annotated[float, Range(0)] = 0.5, neighbours: Annotated[int, Range(0, 64)] = 0,
        first: Annotated[int, Range(0, 2**20)] = 1,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, key_value_heads, head_size, causal)
        self.rate, self.sampling, self.spread = rate, sampling, spread
        self.neighbours, self.first = neighbours, first
        self.forced: tuple[float, torch.Generator | None] | None = None  # by `thinned`: rate, and what draws

    def mix(self, x: Tensor, around: Around) -> Tensor:
        rate, generator = self.forced or (self.rate if self.training else 1.0, None)
        count = x.shape[1]
        if rate == 1 or around.past:
            return super().mix(x, around)
        if rate * count < 1:
            raise TransectError(f"a share of {rate} of {count} positions is none: raise ssa's rate, or train on more")
        q, k, v = self.project(x, around)
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if around.real is None else around.real
        if around.state is not None:  # which transformers also gives in training; what comes next sees all of it
            around.state |= {"k": k, "v": v, "real": real}
        k, v = self.for_queries(k, v)
        if self.sampling == "unbiased":
            kept = some_positions(real, math.ceil(rate * count), self.first, generator)
            y = torch.cat(list(_of_sample(q, k, v, kept, real, self.causal)), dim=2)
        else:
            window = math.ceil(rate * count / (1 + 2 * self.neighbours))
            kept = shuffled_windows(real, window, self.spread * window, self.neighbours, generator)
            y = of_kept(q, k, v, kept, real, self.causal)
        return self.put_out(y, x)


def _of_sample(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, real: Tensor, causal: bool) -> Iterator[Tensor]:
    """Attention of all queries to one sample of positions in order (B x r), by eighths of the queries.

    In a causal model each eighth only meets what is kept up to its end.
    """
    count = q.shape[2]
    step = -(-count // 8) if causal else count
    for begin in range(0, count, step):
        end = min(begin + step, count)
        behind = kept[:, : int((kept < end).sum(1).max())] if causal else kept
        yield of_kept(q[:, :, begin:end], k, v, behind[:, None], real, causal, begin)


def some_positions(real: Tensor, size: int, first: int, generator: torch.Generator | None) -> Tensor:
    """Random real positions of each sequence (B x size), in order, the first few real ones among them.

    Where there are fewer real ones, padding fills up.
    """
    score = torch.rand(real.shape, generator=generator, device="cpu").to(real.device)
    score = score + (real & (real.cumsum(1) <= first)) - 2 * (~real)
    return score.topk(size, dim=1).indices.sort(dim=1).values


def shuffled_windows(
    real: Tensor, window: int, spread: float, neighbours: int, generator: torch.Generator | None
) -> Tensor:
    """Which positions each window of queries sees (B x windows x (1 + 2 neighbours) window); -1 is none.

    Position j goes to where j + spread N(0, 1) comes in order, so that every one is in one window. Real positions keep
    the windows of their numbers at a spread of 0; padding is nowhere.
    """
    count = real.shape[1]
    windows = -(-count // window)
    moved = torch.randn(real.shape, generator=generator, device="cpu").to(real.device) * spread
    order = (torch.arange(count, device=real.device) + moved).argsort(dim=1)
    order = order.masked_fill(~real.gather(1, order), -1)
    beside = neighbours * window
    order = functional.pad(order, (beside, windows * window - count + beside), value=-1)
    return order.unfold(1, (1 + 2 * neighbours) * window, window)


def of_kept(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, real: Tensor, causal: bool, begin: int = 0) -> Tensor:
    """Attention over the kept keys and oneself (B x h x n x d) by n queries, the first at position `begin`.

    kept: positions (B x W x r), -1 for none; the queries are W windows of equal length, the last perhaps shorter. real:
    of the keys. A query sees itself where it is kept, in a causal model always; one that would see nothing sees itself.
    """
    count, windows = q.shape[2], kept.shape[1]
    window = -(-count // windows)
    batch = torch.arange(len(kept), device=q.device)[:, None, None]
    some = kept.clamp(min=0)
    there = (kept >= 0) & real[batch, some]  # B x W x r
    alone = causal or not bool(there.any(-1).all())  # whether oneself is needed as a key
    block = min(window, max(64, kept.shape[2] // 4)) if alone else window  # of queries, whose own keys stand beside
    blocks = -(-window // block)

    def in_blocks(x: Tensor) -> Tensor:
        """B x h x n x d to B W blocks x h x block x d, with zeros where a window ends within a block."""
        x = functional.pad(x, (0, 0, 0, windows * window - count)).unflatten(2, (windows, window))
        x = functional.pad(x, (0, 0, 0, blocks * block - window)).unflatten(3, (blocks, block))
        return x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)

    def for_blocks(x: Tensor) -> Tensor:
        """B x W x ... to B W blocks x ..."""
        return x[:, :, None].expand(*x.shape[:2], blocks, *x.shape[2:]).flatten(0, 2)

    queries = in_blocks(q)
    keys, values = (for_blocks(one.transpose(1, 2)[batch, some].transpose(2, 3)) for one in (k, v))
    if not alone and bool(there.all()):
        mask = None
    else:
        seen = for_blocks(there)[:, None, None].expand(-1, 1, block, -1)  # B W blocks x 1 x block x r
        if causal:
            at = begin + torch.arange(windows * window, device=q.device).view(1, 1, -1, 1).expand(len(q), 1, -1, 1)
            seen = seen & (for_blocks(kept)[:, None, None] < in_blocks(at.to(q.dtype)).long())
        mask = seen
    if alone:
        itself = torch.eye(block, dtype=torch.bool, device=q.device)
        itself = itself & (True if causal else ~seen.any(-1, keepdim=True))
        mask = torch.cat([seen, itself.expand(len(seen), 1, -1, -1)], dim=-1)
        own = slice(begin, begin + count)
        keys, values = (torch.cat([of, in_blocks(one[:, :, own])], dim=2) for of, one in ((keys, k), (values, v)))
    y = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    y = y.unflatten(0, (len(q), windows, blocks)).permute(0, 3, 1, 2, 4, 5)  # B x h x W x blocks x block x d
    return y.flatten(3, 4)[:, :, :, :window].flatten(2, 3)[:, :, :count]


@contextmanager
def thinned(model: nn.Module, rate: float, seed: Seed | None = None) -> Iterator[None]:
    """Within it every `ssa` mixer of the model sees that share of the keys, in training or not; 1 is all of them.

    seed: of the draws, each layer's and pass's its own; default torch's own generator.
    Raises TransectError for a rate that is no share, or a model without such a mixer.
    """
    mixers = [module for module in model.modules() if isinstance(module, SSA)]
    if not mixers:
        raise TransectError('no mixer of this model is `ssa`: build one with it, or insert(model, "mixer", "ssa")')
    if not 0 < rate <= 1:
        raise TransectError(f"the share of positions that are seen should be above 0 and at most 1, not {rate}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    before = [mixer.forced for mixer in mixers]
    try:
        for mixer in mixers:
            mixer.forced = (rate, generator)
        yield
    finally:
        for mixer, forced in zip(mixers, before, strict=True):
            mixer.forced = forced


@torch.no_grad()
def ensemble(model: Any, inputs: Mapping[str, Tensor], rate: float, passes: int, seed: Seed = 0) -> Tensor:
    """Log of the mean probability over so many thinned passes: log probabilities in the shape of the model's logits."""
    if passes < 1:
        raise TransectError(f"an ensemble is of at least one pass, not {passes}")
    with thinned(model, rate, seed):
        total = model(**inputs).logits.log_softmax(-1)
        for _ in range(passes - 1):
            total = torch.logaddexp(total, model(**inputs).logits.log_softmax(-1))
    return total - math.log(passes)
