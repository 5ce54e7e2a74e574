"""Weight compander: the curves, their inverses and gradients, limits, folding."""

import pytest
import torch
from torch import nn

from transect.errors import TransectError
from transect.training.parametrizations.weight_compander import LIMITS, Companded, squash, unsquash

CURVES = list(LIMITS)
A, B = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)


def made(curve="arctan", **options):
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    return layer, Companded(
        layer.weight, layer.bias, curve, **{"headroom": 1.5, "slope": 1.5, "learned": True, **options}
    ).double()


@pytest.mark.parametrize("curve", CURVES)
def test_the_curve_is_odd_increasing_bounded_and_inverted(curve):
    v = torch.linspace(-1, 1, 201, dtype=torch.float64)
    w = squash(curve, v, A, B)
    torch.testing.assert_close(squash(curve, -v, A, B), -w)
    assert (w.diff() > 0).all()
    assert w.abs().max() < A * LIMITS[curve]
    torch.testing.assert_close(unsquash(curve, w, A, B), v, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(squash(curve, v, 3 * A, B), 3 * w)
    torch.testing.assert_close(squash(curve, 3 * v, A, 3 * B), w)
    at_zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(squash(curve, at_zero, A, B), at_zero)
    torch.testing.assert_close(slope, A / B)


@pytest.mark.parametrize("curve", CURVES)
def test_it_starts_as_the_layer_and_is_folded_into_one(curve):
    layer, one = made(curve)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(one(x), layer(x), atol=1e-6, rtol=1e-6)
    largest, limit = float(one.weight.abs().max()), float(one.log_a.exp()) * LIMITS[curve]
    assert 1.5 * largest == pytest.approx(limit, rel=1e-5)
    layer.weight.data.copy_(one.finished())
    assert torch.equal(one(x), layer(x))


def test_gradients_are_those_of_the_formulas():
    _, one = made()
    g = torch.randn(4, 6, dtype=torch.float64)
    (one.weight * g).sum().backward()
    v, a, b = one.values.detach(), one.log_a.detach().exp(), one.log_b.detach().exp()
    torch.testing.assert_close(one.values.grad, (a / b) / (1 + (v / b) ** 2) * g)
    torch.testing.assert_close(one.log_a.grad, (torch.arctan(v / b) * g).sum() * a)
    torch.testing.assert_close(one.log_b.grad, (-a * v / (b**2 + v**2) * g).sum() * b)


def test_a_wide_curve_is_the_plain_layer_and_fixed_curves_are_not_trained():
    layer, one = made(headroom=1e4, slope=1.0)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(one(x), layer(x), atol=1e-6, rtol=1e-6)
    one(x).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(one.values.grad, layer.weight.grad, atol=1e-4, rtol=1e-4)
    _, fixed = made(learned=False)
    assert [name for name, p in fixed.named_parameters() if p.requires_grad] == ["bias", "values"]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_layer_without_a_size_is_refused(value):
    with pytest.raises(TransectError, match="zero or not finite"):
        Companded(torch.full((2, 2), value), None, "arctan", 1.5, 1.5, True)
