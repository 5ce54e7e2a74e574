"""GR-KAN: published starts, the form without poles, groups, gradients, variance, counts."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import transect
from transect.errors import TransectError
from transect.parts import insert
from transect.parts.catalog.kat import COEFFICIENTS, GRKAN, Rational

from .models import tiny

X = torch.linspace(-3, 3, 601, dtype=torch.float64)[:, None].expand(-1, 8)


@pytest.mark.parametrize(
    ("start", "function", "most"),
    [("identity", lambda x: x, 0.0), ("swish", functional.silu, 1e-5), ("gelu", functional.gelu, 5e-3)],
)
def test_it_starts_as_the_function_that_it_is_named_after(start, function, most):
    one = Rational(8, 4, start).double().requires_grad_(False)
    assert float((one(X) - function(X)).abs().max()) <= most
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    density = (-x.square() / 2).exp()
    gain = float(density.sum() / (density * one(x[:, None].expand(-1, 8))[:, 0].square()).sum())
    assert gain == pytest.approx(COEFFICIENTS[start][2], abs=0.001)  # 1 / E[F(x)²], x ~ N(0, 1), by quadrature


def test_the_formula_its_groups_and_gradients():
    one = Rational(6, 3, "swish").double()
    one.denominator.data = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    a, expected = one.numerator, torch.empty_like(x)
    for channel in range(6):
        v, b = x[:, channel], one.denominator[channel // 2].abs()
        below = 1 + sum(b[j] * v.abs() ** (j + 1) for j in range(4))
        expected[:, channel] = sum(a[i] * v**i for i in range(6)) / below
    torch.testing.assert_close(one(x), expected)
    order = [1, 0, 3, 2, 5, 4]  # within groups
    torch.testing.assert_close(one(x[:, order]), one(x)[:, order])
    assert one(1e3 * x.float()).isfinite().all()
    with pytest.raises(TransectError, match="4 groups do not divide 6"):
        Rational(6, 4, "swish")


def test_its_gradients_are_the_published_formulas():
    one = Rational(4, 2, "swish").double()
    one.denominator.data = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def called(x, a, b):
        return torch.func.functional_call(one, {"numerator": a, "denominator": b}, (x,))

    assert torch.autograd.gradcheck(called, (x, one.numerator, one.denominator))
    upstream = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    one(x).backward(upstream)
    v, b = x.detach(), one.denominator.detach()[[0, 0, 1, 1]]  # of each channel (4 x 4)
    below = 1 + sum(b[:, j].abs() * v.abs() ** (j + 1) for j in range(4))  # Q
    above = sum(one.numerator.detach()[i] * v**i for i in range(6))  # P
    for i in range(6):
        torch.testing.assert_close(one.numerator.grad[i], (upstream * v**i / below).sum())
    for j in range(4):
        of = upstream * (-above / below**2) * b[:, j].sign() * v.abs() ** (j + 1)
        torch.testing.assert_close(one.denominator.grad[:, j], of.unflatten(1, (2, 2)).sum((0, 2)))


def test_a_denominator_that_starts_at_zero_can_leave_it():
    one = Rational(8, 2, "identity")
    one(torch.randn(20, 8)).square().sum().backward()
    assert bool((one.denominator.grad != 0).all())


def test_it_is_the_mlp_of_its_function_with_a_few_numbers_more():
    one = GRKAN(16, 64, groups=8, start="swish").double()
    x = torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    mlp = nn.functional.linear(functional.silu(one.up_proj(x)), one.down_proj.weight, one.down_proj.bias)
    torch.testing.assert_close(one(x), mlp, atol=1e-3, rtol=1e-3)
    plain = 2 * 16 * 64 + 64 + 16
    assert sum(p.numel() for p in one.parameters()) == plain + 2 * (6 + 4 * 8)


def test_the_start_keeps_the_variance():
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    for _ in range(5):
        x = GRKAN(64, 256)(x).detach()
    assert 0.5 < float(x.var()) < 2


@pytest.mark.parametrize("function", ["poly-norm", "s-kan", "softmax"])
def test_a_function_that_sees_more_than_one_neuron_is_not_followed(function):
    """Such as one that norms over them: what it makes of a list of points says nothing of what it makes of each."""
    model = tiny("llama")
    if function == "softmax":
        model.model.layers[1].mlp.act_fn = nn.Softmax(-1)
    else:
        insert(model, "activation", function, layers=[1])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(TransectError, match=r"block 1, \w+, is not the same for each neuron by itself"):
        transect.convert(model, "kat", steps=0)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
