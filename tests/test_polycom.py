"""PolyReLU and PolyNorm: limits, invariances, statistics at the start, gradients."""

import pytest
import torch
from torch.nn import functional

from transect.parts.catalog.polycom import NormedPowers, PolyNorm, PolyReLU, ReLUPowers


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("at", "power"), [(1, 1), (2, 2)])
def test_poly_relu_is_relu_and_its_square_in_the_limits(at, power):
    one, x = PolyReLU().double(), drawn(5, 9)
    one.polynomial.coefficients.data = torch.eye(4, dtype=torch.float64)[at]
    assert torch.equal(one(x), functional.relu(x) ** power)
    one.polynomial.coefficients.data = torch.tensor([0.3, 1, 2, 3], dtype=torch.float64)
    assert (one(-x.abs()) == 0.3).all()


def test_poly_norm_does_not_see_the_size_and_each_power_has_rms_one():
    one, x = NormedPowers(3, 0.0).double(), drawn(5, 40)
    torch.testing.assert_close(one(7 * x), one(x))
    for power in one.powers(x):
        torch.testing.assert_close(power.square().mean(-1), torch.ones(5, dtype=torch.float64))
    odd = one.coefficients.data.clone()
    one.coefficients.data = odd * torch.tensor([0, 1, 0, 1.0])
    torch.testing.assert_close(one(-x), -one(x))


def test_statistics_at_the_start_are_the_published_ones():
    x = drawn(400, 1024)
    norm, relu = PolyNorm()(x), PolyReLU()(x)
    assert float(norm.mean()) == pytest.approx(0.19, rel=0.03)
    assert float(norm.square().mean().sqrt()) == pytest.approx(0.71, rel=0.02)
    assert float(relu.square().mean().sqrt()) == pytest.approx(1.51, rel=0.02)


@pytest.mark.parametrize("one", [ReLUPowers(3), NormedPowers(3, 1e-6)])
def test_gradients(one):
    x = drawn(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(one.double(), x)
    one(x).square().sum().backward()
    assert one.coefficients.numel() == 4 and bool((one.coefficients.grad != 0).all())


def test_half_precision_does_not_overflow():
    x = torch.full((2, 8), 200.0, dtype=torch.float16)
    assert PolyNorm()(x).isfinite().all()
