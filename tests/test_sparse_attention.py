"""Attention over few positions: each pattern against masked softmax, its limits, padding, gradients, refusals."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from transect.errors import TransectError
from transect.parts import Around
from transect.parts.catalog.bigbird import BigBird
from transect.parts.catalog.compressive import Compressive
from transect.parts.catalog.longformer import Longformer, random_blocks
from transect.parts.catalog.softmax import Softmax
from transect.parts.catalog.sparse_transformer import Fixed, Strided
from transect.parts.catalog.transformer_xl import TransformerXL

N = 21
X = torch.randn(2, N, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
REAL = torch.ones(2, N, dtype=torch.bool)
REAL[1, :3] = False
REAL[0, 18:] = False


def made(kind, causal, *sizes, **settings):
    torch.manual_seed(0)
    return kind(16, 4, 4, causal, *([2] if kind is BigBird else []), **settings).double()


def brute(one, rule):
    """Masked softmax attention with `rule(i, j)` over the real positions of each sequence."""
    out = torch.zeros_like(X)
    for row, real in enumerate(REAL):
        q, k, v = one.eval().project(X[row : row + 1, real], Around())
        count = q.shape[2]
        mask = torch.tensor(
            [[bool(rule(i, j)) and (j <= i or not one.causal) for j in range(count)] for i in range(count)]
        )
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out[row, real] = one.o_proj(y.transpose(1, 2).flatten(2))[0]
    return out


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.size = max(self.size, one.numel())
        return out


def rules():
    """Each pattern as a naive rule."""
    for stride in (3, 4):
        yield Strided, dict(stride=stride), lambda i, j, s=stride: abs(i - j) < s or (i - j) % s == 0
        yield (
            Fixed, dict(stride=stride, summary=2), lambda i, j, s=stride: i // s == j // s or j % s >= s - 2
        )  # fmt: skip
    for window, few in ((4, 0), (3, 2), (1, 5)):
        settings = dict(window=window, global_tokens=few)
        yield Longformer, settings, lambda i, j, w=window, g=few: abs(i - j) < w or i < g or j < g
    for segment, memory in ((4, 0), (4, 3), (5, 9)):
        yield (
            TransformerXL, dict(segment=segment, memory=memory),
            lambda i, j, s=segment, m=memory: i // s * s - m <= j < (i // s + 1) * s,
        )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_each_pattern_is_masked_attention_over_what_is_real(causal):
    for kind, settings, rule in rules():
        one = made(kind, causal, **settings)
        torch.testing.assert_close(one(X, Around(REAL))[REAL], brute(one, rule)[REAL], msg=f"{kind.kind} {settings}")


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_bigbird_adds_blocks_that_the_seed_and_the_layer_draw(causal):
    one = made(BigBird, causal, window=2, global_tokens=1, random=2, seed=5)
    blocks = {}
    for count in (18, N):
        drawn = random_blocks(-(-count // 2), 2, causal, 7, X.device).tolist()
        blocks[count] = drawn

    def rule(i, j, count):
        return abs(i - j) < 2 or i < 1 or j < 1 or j // 2 in blocks[count][i // 2]

    torch.testing.assert_close(
        one(X, Around(REAL))[REAL], brute(one, lambda i, j: rule(i, j, N if not causal else 18))[REAL]
    )
    if causal:  # what is drawn for a block does not depend on those behind it, and lies before it
        assert blocks[18] == blocks[N][:9]
        assert all(number < max(block, 1) for block, row in enumerate(blocks[N]) for number in row)
    assert random_blocks(64, 3, causal, 1, X.device).unique().numel() > 20


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("memory", "compressed"), [(2, 2), (0, 3), (4, 50)])
def test_behind_the_memory_means_are_seen(causal, memory, compressed):
    one = made(Compressive, causal, segment=4, memory=memory, compressed=compressed, rate=2)
    q, k, v = one.project(X, Around())
    read = []
    for i in range(N):
        start = i // 4 * 4
        oldest = max(start - memory, 0)
        seen = list(range(oldest, i + 1 if causal else min(start + 4, N)))
        pairs = [(first, first + 1) for first in range(0, oldest, 2)][-compressed:]
        keys, values = (
            torch.stack([x[:, :, p].mean(2) for p in pairs] + [x[:, :, j] for j in seen], 2) for x in (k, v)
        )
        read.append(functional.scaled_dot_product_attention(q[:, :, i : i + 1], keys, values))
    expected = one.o_proj(torch.cat(read, dim=2).transpose(1, 2).flatten(2))
    torch.testing.assert_close(one(X, Around()), expected)
    short = torch.cat([X[1:, 3:], X[1:, :3]], dim=1)  # what is real, in front
    torch.testing.assert_close(
        one(X[1:], Around(REAL[1:]))[:, 3:], one(short, Around(torch.arange(N)[None] < 18))[:, :18]
    )


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_where_a_pattern_covers_everything_it_is_softmax_attention(causal):
    for kind, settings in (
        (Strided, dict(stride=1)), (Strided, dict(stride=30)), (Fixed, dict(stride=4, summary=4)),
        (Fixed, dict(stride=21)), (Longformer, dict(window=21)), (Longformer, dict(window=2, global_tokens=21)),
        (BigBird, dict(window=21)), (BigBird, dict(window=3, global_tokens=30)), (TransformerXL, dict(segment=21)),
        (Compressive, dict(segment=24, memory=0)),
        (TransformerXL, dict(segment=7, memory=14) if causal else dict(segment=30)),
    ):  # fmt: skip
        one, dense = made(kind, causal, **settings), Softmax(16, 4, 4, 4, causal).double()
        dense.load_state_dict(one.state_dict())
        for real in (None, REAL):
            y, expected = one(X, Around(real)), dense(X, Around(real))
            torch.testing.assert_close(y[REAL], expected[REAL], msg=f"{kind.kind} {settings}")


def test_no_gradient_goes_through_the_memory_but_to_the_matrices():
    one, x = made(TransformerXL, True, segment=7, memory=7), X.clone().requires_grad_()
    one(x, Around())[:, 14:].square().sum().backward()
    assert float(x.grad[:, :14].abs().max()) == 0 and float(x.grad[:, 14:].abs().min()) > 0
    from_all = one.v_proj.weight.grad.clone()
    one.zero_grad()
    q, k, v = TransformerXL.__mro__[1].project(one, X, Around())
    mask = torch.arange(7)[:, None] + 7 >= torch.arange(14)
    y = functional.scaled_dot_product_attention(q[:, :, 14:], k[:, :, 7:], v[:, :, 7:], attn_mask=mask)
    one.o_proj(y.transpose(1, 2).flatten(2)).square().sum().backward()
    torch.testing.assert_close(one.v_proj.weight.grad, from_all)


@pytest.mark.parametrize("causal", [True, False])
def test_memory_is_linear_in_the_number_of_positions(causal):
    """The largest tensor that any step makes grows as fast as the input (strided and fixed: with their N² / stride)."""
    for kind, settings, growth in (
        (Longformer, dict(window=8, global_tokens=2), 2), (BigBird, dict(window=8, random=2), 2),
        (TransformerXL, dict(segment=8, memory=8), 2), (Compressive, dict(segment=8, memory=8, compressed=8), 2),
        (Strided, dict(stride=32), 4), (Fixed, dict(stride=32), 4),
    ):  # fmt: skip
        sizes = []
        for count in (512, 1024):
            with Largest() as seen, torch.no_grad():
                made(kind, causal, **settings).float()(torch.zeros(1, count, 16), Around())
            sizes.append(seen.size)
        assert sizes[1] <= growth * sizes[0] and sizes[1] < 4 * 1024 * 1024 / 3, (kind.kind, sizes)  # 4 heads


def test_what_does_not_fit_is_refused_and_nothing_real_gives_finite_numbers():
    with pytest.raises(TransectError, match="a summary of 9 is more than its block of 8"):
        Fixed(16, 4, 4, True, stride=8, summary=9)
    with pytest.raises(TransectError, match="should be multiples of the rate, 4"):
        Compressive(16, 4, 4, True, segment=6)
    for kind in (Strided, Fixed, Longformer, BigBird, TransformerXL, Compressive):
        one = made(kind, True)
        y = one(X, Around(torch.zeros(2, N, dtype=torch.bool)))
        y.sum().backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in one.parameters())
