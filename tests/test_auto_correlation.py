"""Auto-Correlation: the sum over delays, equivariance, periods, what training and evaluation do differently."""

import math

import pytest
import torch

from transect.errors import TransectError
from transect.parts import Around
from transect.parts.catalog.auto_correlation import AutoCorrelation, correlation, shifted

N = 24
X = torch.randn(3, N, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def made(**settings):
    torch.manual_seed(0)
    return AutoCorrelation(16, 4, 4, False, **settings).double().eval()


@pytest.mark.parametrize("count", [24, 7, 1])
def test_the_transform_gives_the_sum_over_positions(count):
    q, k = X[0, :count], X[1, :count]
    brute = torch.stack([(q.roll(-delay, 0) * k).sum(0).mean() for delay in range(count)])
    torch.testing.assert_close(correlation(q, k), brute, atol=1e-10, rtol=0)
    own = correlation(q, q)
    torch.testing.assert_close(own, own.roll(-1).flip(0), atol=1e-10, rtol=0)  # even in the delay
    assert int(own.argmax()) == 0


@torch.no_grad()
@pytest.mark.parametrize("direction", ["ahead", "behind"])
def test_it_averages_shifts_of_the_values(direction):
    one = made(factor=2.0, direction=direction)
    q, k, v = one.q_proj(X), one.k_proj(X), one.v_proj(X)
    expected = torch.zeros_like(v)
    for row in range(3):
        best = correlation(q[row], k[row]).topk(math.floor(2 * math.log(N)))
        for weight, delay in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
            expected[row] += weight * v[row].roll(-delay if direction == "ahead" else delay, 0)
    torch.testing.assert_close(one(X, Around()), one.o_proj(expected))
    torch.testing.assert_close(one(X.roll(5, 1), Around()), one(X, Around()).roll(5, 1))
    one.v_proj.weight.zero_()  # values that are the same everywhere come out as they are
    torch.testing.assert_close(one(X, Around()), one.o_proj(one.v_proj.bias).expand(3, N, -1))


@torch.no_grad()
def test_of_a_sum_of_sines_the_delays_are_multiples_of_the_period_and_the_values_come_out_unchanged():
    t = torch.arange(48, dtype=torch.float64)[:, None]
    x = torch.sin(2 * math.pi * t / 12 + torch.arange(16)) + torch.cos(2 * math.pi * t / 6 * torch.ones(16))
    assert {int(delay) % 12 for delay in correlation(x, x).topk(3).indices} == {0}
    one = made()
    for proj in (one.q_proj, one.k_proj, one.v_proj, one.o_proj):
        proj.weight.copy_(torch.eye(16))
        proj.bias.zero_()
    torch.testing.assert_close(one(x[None], Around())[0], x)
    late = x[:24].roll(5, 0) * torch.linspace(1, 2, 24)[:, None]  # a query that repeats its key 5 later
    key, weights = late.roll(-5, 0), torch.zeros(24, dtype=torch.float64)
    weights[int(correlation(late, key).argmax())] = 1
    torch.testing.assert_close(shifted(key, weights, ahead=False), late)
    torch.testing.assert_close(shifted(key, weights, ahead=True), key.roll(-5, 0))


def test_training_takes_the_delays_of_the_batch_and_evaluation_each_its_own():
    one = made()
    alone = torch.cat([one(row[None], Around()) for row in X])
    torch.testing.assert_close(one(X, Around()), alone)
    one.train()
    together = one(X, Around())
    torch.testing.assert_close(torch.cat([one(row[None], Around()) for row in X]), alone)
    assert not torch.allclose(together, alone)


def test_short_series_and_what_it_cannot_be():
    one = made()
    for count in (1, 2):  # floor(log N) is 0
        q, k, v = (proj(X[:, :count]) for proj in (one.q_proj, one.k_proj, one.v_proj))
        best = correlation(q, k).argmax(1)
        moved = torch.stack([row.roll(-int(delay), 0) for row, delay in zip(v, best, strict=True)])
        torch.testing.assert_close(one(X[:, :count], Around()), one.o_proj(moved))
    with pytest.raises(TransectError, match="cannot be causal"):
        AutoCorrelation(16, 4, 4, True)
