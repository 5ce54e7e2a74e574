"""DSFormer's training: the gradient through the projection, its variants, and what is stored."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import transect
from transect.anatomy import Anatomy
from transect.errors import OutOfReach, TransectError
from transect.operators import stored_bytes
from transect.training import Parametrized
from transect.training.parametrizations.dsformer import Factorized, Following

from .models import VOCABULARY, tiny

DATA = torch.randint(3, VOCABULARY, (20, 12), generator=torch.Generator().manual_seed(5))


def matrix(d_out=24, d_in=20, seed=1, dtype=torch.float64):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def made(variant="stf", weight=None, blocks=3, bases=6, nonzeros=2, pull=0.0, bias=None):
    return Factorized(matrix() if weight is None else weight, bias, variant, blocks, bases, nonzeros, 20, pull)


def together(one, refresh=3):
    return Following({"one": one}, {"refresh": refresh})


def error(one, weight):
    return float((weight - one.factorized().detach()).square().sum())


def steps_of(one, count, target, refresh=3, steps=None):
    """Plain gradient descent towards a target, with what the frame does after each step."""
    optimizer, whole = torch.optim.AdamW(one.parameters(), lr=0.05, weight_decay=0.1), together(one, refresh)
    for step in range(1, count + 1):
        optimizer.zero_grad()
        (one.weight - target).square().sum().backward()
        optimizer.step()
        whole.after_step(step, steps or count, optimizer)
    return optimizer


@pytest.mark.parametrize("variant", ["stf", "m"])
def test_the_dense_weight_gets_the_gradient_of_what_is_used(variant):
    one, x = made(variant), torch.randn(5, 20, dtype=torch.float64)
    used = one.weight.detach().requires_grad_()
    one(x).square().sum().backward()
    nn.functional.linear(x, used).square().sum().backward()
    assert torch.equal(one.master.grad, used.grad)
    assert (one.master - used).abs().max() > 0.1  # it is not the weight itself
    assert all(p.grad is None for name, p in one.named_parameters() if name != "master")


def test_where_the_projection_is_exact_training_is_dense_training():
    weight, x = matrix(), torch.randn(40, 20, dtype=torch.float64)
    target = matrix(seed=2)
    one, dense = made(weight=weight, blocks=2, bases=10, nonzeros=10), nn.Linear(20, 24, bias=False).double()
    dense.weight.data.copy_(weight)
    whole = together(one)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.05) for module in (one, dense)]
    for step in range(1, 9):
        for module, optimizer in zip((one, dense), optimizers, strict=True):
            optimizer.zero_grad()
            (module(x) - x @ target.T).square().sum().backward()
            optimizer.step()
        whole.after_step(step, 8, optimizers[0])
        torch.testing.assert_close(one.weight, dense.weight, rtol=0, atol=1e-6)
    assert (dense.weight - weight).abs().max() > 0.3


def test_variant_f_starts_at_the_projection_and_its_support_stays():
    one, projected, target = made("f"), made("stf").weight, matrix(seed=2)
    assert torch.equal(one.weight, projected)
    assert [name for name, _ in one.named_parameters()] == ["values", "bases"]
    support, before = one.indices.clone(), error(one, target)
    steps_of(one, 10, target)
    assert torch.equal(one.indices, support) and error(one, target) < 0.8 * before


def test_variant_m_follows_the_dense_weight_and_then_trains_the_factors_alone():
    one, target = made("m"), matrix(seed=2)
    steps_of(one, 6, target, steps=10)
    assert not one.settled and not torch.equal(one.indices, made("m").indices)
    assert error(one, one.master.detach()) < 0.8 * error(made("m"), one.master.detach())
    optimizer = steps_of(one, 7, target, steps=10)
    assert one.settled and one.values not in optimizer.state and one.bases not in optimizer.state
    support, master, values = one.indices.clone(), one.master.detach().clone(), one.values.detach().clone()
    (one.weight - target).square().sum().backward()
    assert one.values.grad.any() and one.bases.grad.any()
    together(one).after_step(8, 10, optimizer)
    assert torch.equal(one.indices, support) and torch.equal(one.values, values) and torch.equal(one.master, master)


def test_the_factors_follow_and_the_support_only_where_it_is_chosen_anew():
    one, other = made(), matrix(seed=2)
    support = one.indices.clone()
    with torch.no_grad():
        one.master.copy_(other)
    left = [error(one, other)]
    for anew in (False, False, True, True):
        one.follow(anew)
        left.append(error(one, other))
        assert torch.equal(one.indices, support) or anew
    assert not torch.equal(one.indices, support)
    assert all(later < earlier for earlier, later in pairwise(left)) and left[3] < 0.95 * left[2]


def test_the_pull_is_the_squared_distance_and_draws_the_dense_weight_near():
    one = made(pull=0.3)
    apart = one.master.detach() - one.weight.detach()
    one.penalty().backward()
    torch.testing.assert_close(one.master.grad, 0.3 * apart)
    assert together(one).told() == {
        "distance of the trained weights from those that are stored, over their norm": pytest.approx(
            float(apart.norm() / one.master.detach().norm())
        )
    }
    assert made("f", pull=0.3).penalty() is None and made(pull=0.0).penalty() is None
    assert together(made("f")).told() == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_stored_is_what_was_trained(dtype):
    bias, x = torch.randn(24).to(dtype), matrix(5, 20, 3, dtype)
    one = made(weight=matrix(dtype=dtype), bias=bias)
    stored = one.finished()
    stored.set_bias(bias)
    assert torch.equal(stored.indices(), one.indices)
    torch.testing.assert_close(stored.double().to_dense(), one.factorized().double(), rtol=0, atol=1e-5)
    if dtype != torch.bfloat16:
        torch.testing.assert_close(stored.to(dtype)(x), one(x), rtol=0, atol=1e-5)


def test_a_model_ends_within_its_bytes_and_says_how_far_its_weights_went():
    model, options = (
        tiny("llama"),
        dict(width=16, iterations=2, refresh=2, lr=1e-2, steps=3, batch_size=4, device="cpu"),
    )
    whole = Anatomy(model).matrix_bytes()
    outcome = transect.adapt(model, "dsformer", DATA, keep=0.7, **options).outcome
    assert 0.5 * whole < sum(stored_bytes(one.module) for one in Anatomy(model).matrices()) <= 0.7 * whole
    assert all(0 < number < 1 for number in outcome["told"].values()) and len(outcome["told"]) == 1


def test_what_has_no_factors_is_refused():
    with pytest.raises(OutOfReach, match=r"dsformer, blocks\.0\..*leaves no non-zero"):
        Parametrized(Anatomy(tiny("llama")), "dsformer", {"keep": 0.05})
    with pytest.raises(TransectError, match="not finite"):
        made(weight=torch.full((4, 4), torch.nan))
