"""Kernel and window attention: their limits, forms, and statistics."""

import pytest
import torch
from torch.nn import functional

from transect.parts import Around
from transect.parts.catalog.linear import Linear
from transect.parts.catalog.local import Local
from transect.parts.catalog.performer import Performer, orthogonal_directions, positive_features

X = torch.randn(2, 21, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
REAL = torch.ones(2, 21, dtype=torch.bool)
REAL[1, :5] = False


def made(kind, causal, **settings):
    torch.manual_seed(0)
    return kind(16, 4, 4, causal, **settings).double()


def projected(one):
    return (f(X).unflatten(-1, (4, -1)).transpose(1, 2) for f in (one.q_proj, one.k_proj, one.v_proj))


def seen(causal):
    mask = REAL[:, None, None, :].expand(2, 1, 21, 21)
    return mask & torch.ones(21, 21, dtype=torch.bool).tril() if causal else mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [Linear, Performer])
def test_kernel_attention_is_its_quadratic_form(kind, causal):
    one = made(kind, causal)
    q, k, v = projected(one)
    scores = one.features(q, False) @ one.features(k, True).transpose(-1, -2) * seen(causal)
    y = scores / scores.sum(-1, keepdim=True).clamp_min(1e-6) @ v
    expected = one.o_proj(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(one(X, Around(REAL))[REAL], expected[REAL])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 4, 6, 21, 40])
def test_a_window_is_masked_attention_and_with_all_positions_softmax(window, causal):
    one = made(Local, causal, window=window)
    q, k, v = projected(one)
    apart = torch.arange(21)[:, None] - torch.arange(21)
    mask = seen(causal) & (apart.abs() < window) | (apart == 0)
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = one.o_proj(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(one(X, Around(REAL)), expected)


def test_random_features_are_unbiased_and_better_the_more_and_the_more_orthogonal():
    q, k = (torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) / 2 for s in (1, 2))
    truth = torch.exp((q * k).sum(-1) / 8**0.5)

    def estimate(directions):
        exact = positive_features(q, directions, True)  # with nothing taken off
        return (exact * positive_features(k, directions, True)).sum(-1)

    def error(count, orthogonal):
        found = []
        for seed in range(300):
            independent = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
            directions = orthogonal_directions(count, 8, seed) if orthogonal else independent
            found.append(estimate(directions.double()))
        return float((torch.stack(found) - truth).square().mean().sqrt())

    torch.testing.assert_close(estimate(orthogonal_directions(200_000, 8, 0).double()), truth, rtol=0.05, atol=0.05)
    assert error(256, True) < error(16, True) / 2 and error(8, True) < error(8, False)
    directions = orthogonal_directions(8, 8, 3)
    gram = directions @ directions.T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-4, rtol=0)


def test_many_features_come_near_to_softmax():
    few, many = (made(Performer, True, features=count) for count in (4, 4096))
    for one in (few, many):  # small scores, of which the features scatter less
        one.q_proj.weight.data /= 2
        one.k_proj.weight.data /= 2
    q, k, v = projected(few)
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    exact = few.o_proj(y.transpose(1, 2).flatten(2))
    many.load_state_dict({**few.state_dict(), "directions": many.directions})  # the same matrices
    off = [float((one(X, Around()) - exact).norm() / exact.norm()) for one in (few, many)]
    assert off[1] < off[0] / 3
