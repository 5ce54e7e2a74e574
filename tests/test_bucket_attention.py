"""Reformer and Routing attention: against brute force over what is seen, limits, buckets, refusals."""

import pytest
import torch
from torch.nn import functional

from transect.errors import TransectError
from transect.parts import Around
from transect.parts.catalog.reformer import Reformer
from transect.parts.catalog.routing import Routing

N = 21
X = torch.randn(2, N, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
REAL = torch.ones(2, N, dtype=torch.bool)
REAL[1, :5] = False


def made(kind, causal, **settings):
    torch.manual_seed(0)
    return kind(16, 4, 4, causal, *([1] if kind is Reformer else []), **settings).double().eval()


def brute(one, real):
    """Position by position: softmax over the union of what is seen in each round, itself only if alone."""
    q, v = (f(X).unflatten(-1, (4, -1)).transpose(1, 2) for f in (one.q_proj, one.v_proj))
    buckets = one.buckets(q, None)
    q, k = one.matched(q, buckets, None)
    y = torch.zeros_like(v)
    for row in range(2):
        for head in range(4):
            for i in range(N):
                seen = set()
                for bucket in buckets[:, row, head]:
                    mine = [j for j in range(N) if bucket[j] == bucket[i] and (real is None or real[row, j])]
                    place = mine.index(i) if i in mine else 0
                    near = [j for number, j in enumerate(mine) if abs(number - place) < one.window]
                    seen |= {j for j in near if not one.causal or j <= i}
                seen = sorted(seen - {i}) or [i]
                weights = (k[row, head, seen] @ q[row, head, i] / 2).softmax(0)
                y[row, head, i] = weights @ v[row, head, seen]
    return one.o_proj(y.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Reformer, dict(window=3, buckets=4, rounds=1)), (Reformer, dict(window=3, buckets=4, rounds=3)),
        (Reformer, dict(window=1, buckets=2)), (Routing, dict(window=4, clusters=3)),
    ],
)  # fmt: skip
def test_it_is_a_softmax_over_what_is_near_in_the_bucket(kind, settings, causal):
    one = made(kind, causal, **settings)
    torch.testing.assert_close(one(X, Around()), brute(one, None))
    torch.testing.assert_close(one(X, Around(REAL))[REAL], brute(one, REAL)[REAL])


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("kind", "settings"), [(Reformer, dict(buckets=1, rounds=3)), (Routing, dict(clusters=1))]
)  # fmt: skip
def test_with_one_bucket_it_is_softmax_attention_with_shared_queries_and_keys(kind, settings, causal):
    one = made(kind, causal, window=N, **settings)
    q, v = (f(X).unflatten(-1, (4, -1)).transpose(1, 2) for f in (one.q_proj, one.v_proj))
    itself = torch.eye(N, dtype=torch.bool)
    mask = ~itself & torch.ones(N, N, dtype=torch.bool).tril() if causal else ~itself
    mask[0, 0] |= causal
    q, k = (q, functional.normalize(q, dim=-1)) if kind is Reformer else (functional.layer_norm(q, (4,)),) * 2
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(one(X, Around()), one.o_proj(y.transpose(1, 2).flatten(2)))


def test_near_vectors_share_a_bucket_more_often_and_each_round_hashes_anew():
    one = made(Reformer, True, buckets=8, rounds=64)
    q = torch.randn(1, 1, 64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    buckets = [one.buckets(q + noise * torch.ones_like(q), None) for noise in (0.0, 0.1, 1.0)]
    kept = [float((other == buckets[0]).double().mean()) for other in buckets]
    assert kept[0] == 1 and kept[0] > kept[1] > kept[2] + 0.1
    assert not torch.equal(buckets[0][0], buckets[0][1]) and int(buckets[0].max()) <= 7
    torch.testing.assert_close(one.buckets(3 * q, None), buckets[0])  # by direction alone


def test_centres_are_pulled_to_the_mean_of_what_they_take_and_nothing_else_is():
    one = made(Routing, True, clusters=3)
    y = one(X, Around(REAL))
    y.square().sum().backward()
    normed = functional.layer_norm(one.q_proj(X).unflatten(-1, (4, -1)).transpose(1, 2), (4,))
    unit = functional.normalize(normed, dim=-1)
    for head, centres in enumerate(one.centres.detach()):
        points = unit[:, head][REAL].detach()
        nearest = (points @ functional.normalize(centres, dim=-1).T).argmax(1)
        for cluster, centre in enumerate(centres):
            mine = points[nearest == cluster]
            expected = 1e-3 * (centre - mine.mean(0)) if len(mine) else torch.zeros_like(centre)
            torch.testing.assert_close(one.centres.grad[head, cluster], expected)
    pulled, one.centres.grad = one.q_proj.weight.grad.clone(), None
    one.zero_grad()
    one.centres.requires_grad_(False)
    one(X, Around(REAL)).square().sum().backward()
    assert one.centres.grad is None
    torch.testing.assert_close(one.q_proj.weight.grad, pulled)


def test_what_does_not_fit_is_refused_and_nothing_real_gives_finite_numbers():
    with pytest.raises(TransectError, match="so that 3 are none"):
        made(Reformer, True, buckets=3)
    for kind in (Reformer, Routing):
        one = made(kind, False)
        y = one(X, Around(torch.zeros(2, N, dtype=torch.bool)))
        y.sum().backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in one.parameters())
