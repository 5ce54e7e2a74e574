"""depth-efficiency: until which layer a token is needed, by erasure and by integrated gradients."""

import pytest
import torch

from tests.depth import specimen, tokens
from tests.models import CAUSAL
from transect.forward import changed, watch
from transect.probes.catalog.depth_efficiency.erasure import erasure_effects
from transect.probes.catalog.depth_efficiency.integrated import integrated_gradients, legendre


@torch.no_grad()
def continued(one, ids, start):
    """Distributions that the whole model predicts from position `start` on."""
    return one.model(ids, use_cache=False).logits[:, start:].softmax(-1)


def erased(one, ids, layer, where, mean, start):
    """The same with what block `layer` reads replaced by `mean` where `where` is True."""
    erase = lambda h: torch.where(where[..., None], mean.to(h), h)  # noqa: E731
    with changed(one.anatomy, {("residual", layer): erase}):
        return continued(one, ids, start)


@pytest.mark.parametrize("name", CAUSAL)
def test_effects_of_erased_tokens_are_those_of_passes_of_the_whole_model(name):
    one, ids, start = specimen(name), tokens(2, 12), 8
    means = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(len(ids), 3, start, dtype=torch.float64)
    for token in range(start):
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, token] = True
        for layer in range(3):
            moved = erased(one, ids, layer, where, means[layer], start) - continued(one, ids, start)
            expected[:, layer, token] = moved.norm(dim=-1).amax(1)
    found = erasure_effects(one, ids, means, start)
    torch.testing.assert_close(found.double(), expected.amax(0), rtol=1e-5, atol=1e-7)


def test_erasing_every_token_at_the_start_makes_the_tokens_irrelevant():
    one = specimen("llama")  # rotary positions: nothing but the tokens is in the embedding
    mean = torch.randn(32, dtype=torch.float64)
    everywhere = torch.ones(3, 24, dtype=torch.bool)
    first, second = (erased(one, tokens(seed=seed), 0, everywhere, mean, 4) for seed in (5, 6))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    assert (continued(one, tokens(seed=5), 4) - continued(one, tokens(seed=6), 4)).abs().max() > 1e-3


def test_erasing_a_token_reaches_only_what_comes_after_it():
    one, ids = specimen("llama"), tokens()
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, 10] = True
    moved = (erased(one, ids, 1, where, torch.zeros(32), 0) - continued(one, ids, 0)).abs().amax(-1)
    assert moved[:, :10].max() <= 1e-12
    assert moved[:, 10:].min() > 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_attributions_sum_to_what_the_states_do(name):
    """Completeness, against outputs that the whole model gives with the mean states in place."""
    one, ids, start = specimen(name), tokens(2), 18
    means = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) / 2
    found = integrated_gradients(one, ids, means, start, 48)
    assert found.attribution.shape == (3, start)
    assert found.error.max() < 1e-3 < found.change.abs().min()
    rough = integrated_gradients(one, ids, means, start, 1)  # one point is not enough, and it says so
    assert rough.error.max() > 10 * found.error.max()
    for one_of_them in (found, rough):
        missing = (one_of_them.attribution.sum(1) - one_of_them.change).abs()
        assert bool((missing <= one_of_them.error + 1e-6).all())
    where = (torch.arange(24) < start).expand_as(ids)
    for layer in range(3):
        values = []
        for probabilities in (continued(one, ids, start), erased(one, ids, layer, where, means[layer], start)):
            right = probabilities[:, :-1].gather(-1, ids[:, start + 1 :, None])
            values.append(right.log().mean())
        torch.testing.assert_close(found.change[layer].double(), values[0] - values[1], rtol=1e-5, atol=1e-7)


def test_attributions_are_integrals_of_finite_differences():
    one, ids, start, layer, token = specimen("gpt2"), tokens(1), 18, 1, 5
    means = torch.zeros(3, 32)
    found = integrated_gradients(one, ids, means, start, 6)
    with torch.no_grad(), watch(one.anatomy, ["residual"]) as clean:
        one.model(ids)
    h, total, small_step = clean.residual[layer], 0.0, 1e-5
    for point, weight in zip(*legendre(6), strict=True):
        ends = []
        for sign in (1, -1):
            state = torch.cat([h[:, :start] * point, h[:, start:]], 1)
            state[0, token] += sign * small_step * h[0, token]
            with torch.no_grad(), changed(one.anatomy, {("residual", layer): lambda x, state=state: state}):
                scores = one.model(ids).logits[0, start:-1].log_softmax(-1)
            ends.append(scores.gather(-1, ids[0, start + 1 :, None]).mean())
        total += float(weight * (ends[0] - ends[1]) / (2 * small_step))
    assert found.attribution[layer, token].item() == pytest.approx(total, rel=1e-4)
    means[layer] = h[0, token].float()
    one.model.float()  # so that the mean is the very state
    assert integrated_gradients(one, ids, means, start, 6).attribution[layer, token].abs() < 1e-6


def test_quadrature_is_exact_for_polynomials():
    for count in (1, 2, 5, 20):
        points, weights = legendre(count)
        powers = torch.arange(2 * count, dtype=torch.float64)
        torch.testing.assert_close((points[:, None] ** powers * weights[:, None]).sum(0), 1 / (powers + 1))
