"""Similarity of the outputs of two models."""

import math

import pytest
import torch

from transect.errors import TransectError
from transect.studies.catalog.model_zoo_phases import (
    linear_cka,
    output_similarity,
)

from .networks import network


def tables(n=40, seed=0, d=6, e=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, x[:, :e].tanh() + torch.randn(n, e, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("shape", [(40, 6, 4), (8, 30, 20)])
def test_cka_of_what_is_known(shape, debiased):
    x, y = tables(shape[0], d=shape[1], e=shape[2])
    value = linear_cka(x, y, debiased=debiased)
    assert linear_cka(x, x, debiased=debiased) == pytest.approx(1)
    assert linear_cka(y, x, debiased=debiased) == pytest.approx(value)
    turn = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64)).Q
    assert linear_cka(3 * x @ turn + 7, -y, debiased=debiased) == pytest.approx(value)
    assert debiased or 0 <= value <= 1
    n = len(x)
    grams = [(one - one.mean(dim=0)) @ (one - one.mean(dim=0)).T for one in (x, y)]

    def product(k, other):
        """The estimator as its papers write it: of Gram matrices, with their diagonals left out."""
        if not debiased:
            return float((k * other).sum())
        k, other = k - k.diag().diag(), other - other.diag().diag()
        product = k @ other
        return float(
            product.trace() + k.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * product.sum()
        )  # fmt: skip

    expected = product(*grams) / math.sqrt(product(grams[0], grams[0]) * product(grams[1], grams[1]))
    assert value == pytest.approx(expected)


def test_unbiased_cka_of_what_has_nothing_in_common():
    x, y = (torch.randn(24, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert linear_cka(x, y) > 0.4 and abs(linear_cka(x, y, debiased=True)) < 0.2


def test_bad_input_of_cka():
    x, _ = tables()
    assert math.isnan(linear_cka(x, torch.ones(40, 3)))
    with pytest.raises(TransectError, match=r"\(40, 6\) and \(39, 6\)"):
        linear_cka(x, x[1:])
    with pytest.raises(TransectError, match="4 examples"):
        linear_cka(x[:3], x[:3], debiased=True)
    with pytest.raises(TransectError, match="finite"):
        linear_cka(x, x * math.inf)
    with pytest.raises(TransectError, match="a batch or more"):
        output_similarity(network(), network(), lambda model, batch: model(batch[0]), [])
