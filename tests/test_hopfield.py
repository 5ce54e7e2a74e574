"""Hopfield layers: energy and update, retrieval and its bound, limits, pooling."""

import itertools
import math

import pytest
import torch
from torch import nn

from transect.parts import Around
from transect.parts.catalog.hopfield import Hopfield, HopfieldLayer, HopfieldPooling, energy, retrieved

DRAW = dict(dtype=torch.float64)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DRAW)


@pytest.mark.parametrize("beta", [0.1, 1.0, 8.0])
def test_an_update_is_a_gradient_step_and_never_raises_the_energy(beta):
    patterns = drawn(12, 6)
    most = float(patterns.norm(dim=1).max())
    state = drawn(4, 6, seed=1)
    state = (state / state.norm(dim=1, keepdim=True) * most * 0.9).requires_grad_()
    (gradient,) = torch.autograd.grad(energy(state, patterns, beta).sum(), state)
    new = retrieved(state.detach(), patterns, beta, 1, None)
    torch.testing.assert_close(new, state.detach() - gradient, atol=1e-12, rtol=1e-12)
    energies = [energy(retrieved(state.detach(), patterns, beta, n, None), patterns, beta) for n in range(6)]
    assert all(bool((b <= a + 1e-12).all()) for a, b in itertools.pairwise(energies))
    assert all(bool((e >= 0).all() and (e <= 2 * most**2).all()) for e in energies)


def test_well_separated_patterns_are_retrieved_in_one_step_within_the_bound():
    patterns, beta = nn.functional.normalize(drawn(20, 64), dim=1), 40.0
    gram = patterns @ patterns.T
    separation = 1 - (gram - 2 * torch.eye(20, **DRAW)).max(1).values
    noise = 0.01 * drawn(20, 64, seed=2) / 8
    found = retrieved(patterns + noise, patterns, beta, 1, None)
    fixed = retrieved(patterns, patterns, beta, 50, None)
    reach = torch.maximum(noise.norm(dim=1), (fixed - patterns).norm(dim=1))
    bound = 2 * 19 * torch.exp(-beta * (separation - 2 * reach))
    assert bool(((found - fixed).norm(dim=1) <= bound).all())


def test_the_limits_of_beta():
    patterns, state = drawn(9, 5), drawn(3, 5, seed=1)
    torch.testing.assert_close(retrieved(state, patterns, 1e-9, 1, None), patterns.mean(0).expand(3, 5))
    nearest = patterns[(state @ patterns.T).argmax(1)]
    torch.testing.assert_close(retrieved(state, patterns, 1e4, 1, None), nearest)


def test_without_updates_it_is_attention_behind_a_norm():
    torch.manual_seed(0)
    one, x = Hopfield(16, 4, 4, False, updates=0).double(), drawn(2, 7, 16)
    whole = nn.MultiheadAttention(16, 4, batch_first=True).double()
    whole.in_proj_weight.data = torch.cat([one.q_proj.weight, one.k_proj.weight, one.v_proj.weight])
    whole.in_proj_bias.data.zero_()
    whole.out_proj.load_state_dict(one.o_proj.state_dict())
    normed = one.q_norm(x)
    torch.testing.assert_close(one(x, Around()), whole(normed, normed, normed)[0])
    order = torch.randperm(7)
    torch.testing.assert_close(Hopfield.mix(one, x[:, order], Around()), one(x, Around())[:, order])


def test_updates_are_differentiable_and_converge_on_a_cluster():
    patterns, state = drawn(6, 4), drawn(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: retrieved(s, patterns, 1.5, 3, None), state)
    cluster = 0.05 * drawn(5, 4) + torch.tensor([3.0, 0, 0, 0], **DRAW)
    away = torch.cat([cluster, -4 * torch.eye(4, **DRAW)])
    ends = retrieved(cluster, away, 2.0, 60, None)
    assert float((ends - ends[0]).abs().max()) < 1e-8


def test_pooling_takes_sets_of_any_size_and_ignores_what_is_no_member():
    torch.manual_seed(0)
    one, members = HopfieldPooling(8, quantity=3).double(), drawn(2, 5, 8)
    out = one(members)
    assert out.shape == (2, 3, 8)
    more = torch.cat([members, 9 * torch.ones(2, 4, 8, **DRAW)], dim=1)
    real = torch.arange(9).expand(2, 9) < 5
    torch.testing.assert_close(one(more, real), out)
    torch.testing.assert_close(one(members.flip(1)), out)
    nothing = one(members, torch.zeros(2, 5, dtype=torch.bool))
    torch.testing.assert_close(nothing, one.o_proj.bias.expand(2, 3, 8))


def test_the_lookup_sees_each_position_alone():
    torch.manual_seed(0)
    one, x = HopfieldLayer(16, 4, 24, updates=2).double(), drawn(2, 7, 16)
    torch.testing.assert_close(one(x)[1:, 3:4], one(x[1:, 3:4]))
    assert one.flops == 2 * 2 * 16 * 16 + 4 * 3 * 24 * 16 and math.isfinite(float(one(x).sum()))
