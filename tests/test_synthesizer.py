"""Synthesizers and pooled queries: against their formulas, padding, limits, refusals."""

import pytest
import torch

from transect.errors import TransectError
from transect.parts import Around
from transect.parts.catalog.funnel import Funnel
from transect.parts.catalog.softmax import Softmax
from transect.parts.catalog.synthesizer import DenseSynthesizer, RandomSynthesizer

N = 21
X = torch.randn(2, N, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
REAL = torch.ones(2, N, dtype=torch.bool)
REAL[1, :5] = False


def made(kind, *sizes, **settings):
    torch.manual_seed(0)
    return kind(16, 4, 4, *sizes, **settings).double()


def scores(one, x):
    """heads x N x N: the formula, as it stands."""
    if isinstance(one, RandomSynthesizer):
        return (one.reading @ one.read.mT)[:, : len(x), : len(x)]
    hidden = torch.relu(x @ one.q_proj.weight.T + one.q_proj.bias).unflatten(-1, (4, -1)).transpose(0, 1)
    return (hidden @ one.places.mT)[..., : len(x)]


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [DenseSynthesizer, RandomSynthesizer])
def test_weights_are_a_softmax_of_what_is_synthesized(kind, causal):
    one = made(kind, 32, causal)
    for row, real in ((0, REAL[0]), (1, REAL[1])):
        x = X[row, real]
        found = scores(one, x)
        if causal:
            found = found.masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), float("-inf"))
        v = one.v_proj(x).unflatten(-1, (4, -1)).transpose(0, 1)
        expected = one.o_proj((found.softmax(-1) @ v).transpose(0, 1).flatten(1))
        torch.testing.assert_close(one(X, Around(REAL))[row, real], expected)
    torch.testing.assert_close(one(X, Around()), one(X, Around(torch.ones_like(REAL))))


@torch.no_grad()
def test_a_group_of_positions_reads_by_the_mean_of_its_queries():
    one, dense = made(Funnel, False, stride=1), made(Softmax, 4, False)
    dense.load_state_dict(one.state_dict())
    for real in (None, REAL):
        torch.testing.assert_close(one(X, Around(real))[REAL], dense(X, Around(real))[REAL])
    one.stride = 4
    q, k, v = one.project(X, Around())
    means = torch.stack([part.mean(2) for part in q.split(4, dim=2)], dim=2)
    y = ((means @ k.mT / 2).softmax(-1) @ v).repeat_interleave(4, dim=2)[:, :, :N]
    torch.testing.assert_close(one(X, Around()), one.o_proj(y.transpose(1, 2).flatten(2)))


def test_what_does_not_fit_is_refused():
    for call, said in (
        (lambda: DenseSynthesizer(16, 4, 4, 0, True), "a fixed number of positions"),
        (lambda: made(RandomSynthesizer, 20, True)(X, Around()), "knows 20 positions, and there are 21"),
        (lambda: Funnel(16, 4, 4, True), "cannot be causal"),
    ):
        with pytest.raises(TransectError, match=said):
            call()
    for one in (made(Funnel, False), made(RandomSynthesizer, 21, False)):
        assert one(X, Around(torch.zeros(2, N, dtype=torch.bool))).isfinite().all()
