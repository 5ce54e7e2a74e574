"""PolyReLU and PolyNorm: limits, invariances, statistics at the start, gradients."""

import pytest
import torch
from torch.nn import functional

import transect
from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.parts import insert
from transect.parts.catalog.polycom import (
    NormedPowers,
    PolyNorm,
    PolyNormMLP,
    PolyReLU,
    PolyReLUMLP,
    ReLUPowers,
)

from .models import VOCABULARY, tiny

TOKENS = torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(5))


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
    assert float(norm.mean()) == pytest.approx(0.19, rel=0.02)
    assert float(norm.square().mean().sqrt()) == pytest.approx(0.71, rel=0.02)
    assert float(relu.square().mean().sqrt()) == pytest.approx(1.51, rel=0.02)


@pytest.mark.parametrize("one", [ReLUPowers(3), NormedPowers(3, 1e-6)])
def test_gradients(one):
    x = drawn(2, 6).requires_grad_()
    one = one.double()
    one.coefficients.data = drawn(4)

    def called(x, coefficients):
        return torch.func.functional_call(one, {"coefficients": coefficients}, (x,))

    assert torch.autograd.gradcheck(called, (x, one.coefficients))
    one(x).square().sum().backward()
    assert one.coefficients.numel() == 4 and bool((one.coefficients.grad != 0).all())


def test_half_precision_does_not_overflow():
    x = torch.full((2, 8), 200.0, dtype=torch.float16)
    assert PolyNorm()(x).isfinite().all()


def test_what_is_no_number_of_a_neuron_is_refused():
    for one in (PolyReLU(), PolyNorm()):
        with pytest.raises(TransectError, match="int64 would lose its fractions"):
            one(torch.arange(6).view(2, 3))
    with pytest.raises(TransectError, match="no neurons has no norm"):
        PolyNorm()(torch.empty(2, 0))
    for part in (PolyReLUMLP, PolyNormMLP):
        with pytest.raises(TransectError, match="0 neurons are none"):
            part(8, 0)
    for slot, name in (("mlp", "poly-relu"), ("activation", "poly-norm")):
        with pytest.raises(TransectError, match="order=0 must be of type int from 1 to 16"):
            insert(tiny("llama"), slot, name, settings={"order": 0})


@torch.no_grad()
def test_a_neuron_that_goes_changes_what_a_normed_polynomial_makes_of_the_others():
    """So none is taken away; of a polynomial of ReLU any can be."""
    x = drawn(3, 8)
    assert torch.equal(PolyReLU()(x)[:, :7], PolyReLU()(x[:, :7]))
    assert not torch.allclose(PolyNorm()(x)[:, :7], PolyNorm()(x[:, :7]), atol=1e-2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(PolyNorm()(x[:, order]), PolyNorm()(x)[:, order])
    plain, normed = tiny("llama"), tiny("llama")
    insert(plain, "activation", "poly-relu")
    Anatomy(plain).blocks[0].mlp.keep(range(8))
    assert Anatomy(plain).blocks[0].mlp.neurons == 8
    insert(normed, "activation", "poly-norm")
    before = {key: tensor.clone() for key, tensor in normed.state_dict().items()}
    for narrow in (
        lambda: Anatomy(normed).blocks[0].mlp.keep(range(8)),
        lambda: transect.compress(normed, "amp", 0.7, TOKENS),
        lambda: transect.compress(normed, "modegpt", 0.7, TOKENS),
        lambda: transect.convert(normed, "matformer", TOKENS, steps=0),
    ):
        with pytest.raises(TransectError, match="none can be taken away"):
            narrow()
        assert all(torch.equal(before[key], tensor) for key, tensor in normed.state_dict().items())
    transect.compress(normed, "svd", 0.7)


def test_a_function_that_knows_its_neurons_is_fitted_as_it_is():
    model = tiny("llama")
    insert(model, "activation", "s-kan")
    (error,) = transect.convert(model, "polycom", TOKENS, steps=0).outcome["told"].values()
    assert error < 1
