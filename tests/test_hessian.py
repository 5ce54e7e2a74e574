"""Products with the Hessian, its largest eigenvalue and its trace."""

import copy
import math

import pytest
import torch
from torch import nn

from transect.errors import TransectError
from transect.studies.catalog.model_zoo_phases import (
    hessian_trace,
    hessian_vector_product,
    top_eigenvalue,
)
from transect.training import own_loss

from .models import inputs, tiny
from .networks import Numbers, cross_entropy, directions, examples, inner, network, quadratic, symmetric


def test_eigenvalue_and_trace_of_a_quadratic_loss():
    a = symmetric(12)
    model, batches = Numbers(torch.randn(12)), [3, 1, 8]
    eigenvalues = torch.linalg.eigvalsh(a)
    found = top_eigenvalue(model, quadratic(a), batches, tolerance=1e-9, steps=2000)
    assert found.settled and found.value == pytest.approx(float(eigenvalues[-1]), rel=1e-3)
    shifted = a - 2 * float(eigenvalues[-1]) * torch.eye(12, dtype=torch.float64)  # all below 0
    lowest = float(torch.linalg.eigvalsh(shifted)[0])
    assert top_eigenvalue(model, quadratic(shifted), [1], tolerance=1e-9, steps=5000).value == pytest.approx(
        lowest, rel=1e-3
    )
    found = hessian_trace(model, quadratic(a), batches, tolerance=0)
    assert found.steps == 100 and abs(found.value - float(a.trace())) < 3 * found.error
    assert math.isnan(hessian_trace(model, quadratic(a), [1], probes=1).error)


def test_trace_of_a_diagonal_takes_one_probe():
    values = torch.linspace(-1, 3, 9, dtype=torch.float64)
    found = hessian_trace(Numbers(torch.randn(9)), quadratic(values.diag()), [2, 5], probes=1)
    assert found.value == pytest.approx(float(values.sum()), rel=1e-12)


def test_a_negative_running_mean_does_not_end_the_trace():
    a = symmetric(8) - 5 * torch.eye(8, dtype=torch.float64)
    found = hessian_trace(Numbers(torch.randn(8)), quadratic(a), [1], tolerance=1e-12, probes=20)
    assert found.value < 0 and found.steps == 20 and not found.settled


def test_a_linear_loss_has_no_curvature():
    found = top_eigenvalue(Numbers(torch.randn(4)), lambda model, _: (model.x.sum(), 1), [0])
    assert found.value == 0 and found.settled
    assert hessian_trace(Numbers(torch.randn(4)), lambda model, _: (model.x.sum(), 1), [0]).value == 0


def assert_product_is_a_difference_of_gradients(model, loss, batches, rel=1e-3, step=1e-4):
    v = directions(model, 1)
    product = hessian_vector_product(model, loss, batches, v)

    def gradient(sign):
        moved = copy.deepcopy(model).eval()
        with torch.no_grad():
            for name, one in moved.named_parameters():
                one.add_(sign * step * v[name])
        total = sum(loss(moved, batch)[0] for batch in batches) / sum(loss(moved, batch)[1] for batch in batches)
        return dict(zip(v, torch.autograd.grad(total, list(moved.parameters()), materialize_grads=True), strict=True))

    up, down = gradient(1), gradient(-1)
    for name, one in product.items():
        expected = (up[name] - down[name]) / (2 * step)
        assert float((one - expected).norm()) <= rel * float(expected.norm()) + 1e-9


def test_product_with_the_hessian():
    model, batches = network(), [examples(9), examples(4, seed=1)]
    assert_product_is_a_difference_of_gradients(model, cross_entropy, batches)
    u, v = directions(model, 2), directions(model, 3)
    hu, hv = (hessian_vector_product(model, cross_entropy, batches, one) for one in (u, v))
    assert inner(u, hv) == pytest.approx(inner(v, hu), rel=1e-9)
    both = hessian_vector_product(model, cross_entropy, batches, {name: 2 * u[name] - v[name] for name in u})
    joined = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    together = hessian_vector_product(model, cross_entropy, joined, v)
    for name, one in both.items():
        torch.testing.assert_close(one, 2 * hu[name] - hv[name])
        torch.testing.assert_close(together[name], hv[name])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_product_with_the_hessian_of_a_language_model(name):
    model = tiny(name, dtype=torch.float64)
    assert model.config._attn_implementation == "sdpa"
    assert_product_is_a_difference_of_gradients(model, own_loss, [inputs(name)])


def test_the_hessian_is_that_of_evaluation_mode_and_the_model_stays_as_it_is():
    model = network(more=[nn.BatchNorm1d(6), nn.Dropout(0.5)])
    batches = [examples(8)]
    model.train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    numbers = torch.get_rng_state()
    found = top_eigenvalue(model, cross_entropy, batches)
    assert model.training and torch.equal(numbers, torch.get_rng_state())
    assert all(one.grad is None for one in model.parameters())
    assert found == top_eigenvalue(model.eval(), cross_entropy, batches)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_bad_input_of_the_hessian():
    model, batches = network(), [examples(4)]
    with pytest.raises(TransectError, match=r"2\.weight"):
        hessian_vector_product(model, cross_entropy, batches, {**directions(model, 0), "2.weight": torch.zeros(2)})
    with pytest.raises(TransectError, match="a batch or more"):
        top_eigenvalue(model, cross_entropy, [])
    with pytest.raises(TransectError, match="finite"):
        top_eigenvalue(model, lambda model, _: (model[0].weight.sum() * math.inf, 1), [0])
    with pytest.raises(TransectError, match="asks for gradients"):
        hessian_trace(copy.deepcopy(model).requires_grad_(False), cross_entropy, batches)
