"""MemoryFormer: weights against all vectors of signs, rows, gradients, counts, use of the rows, fitted tables."""

import itertools

import pytest
import torch
from torch.nn import functional

from transect.errors import TransectError
from transect.parts.catalog.memoryformer import MemoryMatrix, MemoryMLP, Tables, fit_tables
from transect.parts.catalog.memoryformer.part import row_weights


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(inputs=12, outputs=5, bits=3, weight="probability", temperature=1.0):
    torch.manual_seed(0)
    return Tables(inputs, outputs, bits, weight=weight, temperature=temperature).double()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_weight_is_a_softmax_over_all_signs(temperature):
    z = drawn(7, 4)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    shares = (z @ signs.T / temperature).softmax(-1)
    p = row_weights(z, temperature, "probability")
    torch.testing.assert_close(p, shares.amax(-1), atol=1e-12, rtol=0)  # the signs of z have the largest share
    torch.testing.assert_close(row_weights(z, temperature, "scaled"), p * z.abs().sum(-1))
    assert bool((p >= 2**-4).all() and (p < 1).all())
    assert row_weights(1e4 * z, 1.0, "probability").min() > 0.9 and row_weights(z, 1e-4, "probability").min() > 0.9
    assert float(row_weights(torch.zeros(4), 1.0, "probability")) == pytest.approx(2**-4)


@pytest.mark.parametrize("weight", ["scaled", "probability"])
def test_a_layer_is_a_sum_of_rows_and_only_these_learn(weight):
    one, x = layer(weight=weight), drawn(2, 3, 12)
    x[0, 0, 4] = 0  # counts as positive
    expected, touched = torch.empty(2, 3, 5, dtype=torch.float64), set()
    for at in itertools.product(range(2), range(3)):
        total = one.bias.clone()
        for k in range(4):
            z = x[at][3 * k : 3 * k + 3]
            row = 8 * k + sum(2**i for i in range(3) if z[i] >= 0)
            touched.add(row)
            total = total + row_weights(z, 1.0, weight) * one.tables[row]
        expected[at] = total
    y = one(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert set(one.tables.grad.abs().sum(1).nonzero().flatten().tolist()) == touched
    assert torch.equal(one.addressed(3 * x[0])[0], one.addressed(x[0])[0])  # the size changes weights alone
    assert not torch.equal(one.addressed(-x[0])[0], one.addressed(x[0])[0])
    away = (drawn(2, 12, seed=3).abs() + 0.1) * drawn(2, 12, seed=4).sign()  # from 0, where it is not continuous
    assert torch.autograd.gradcheck(one, away.requires_grad_())


def test_with_one_bit_and_sizes_as_weights_it_is_a_matrix(monkeypatch):
    one, matrix, x = layer(6, 5, 1), drawn(5, 6), drawn(9, 6, seed=1)
    one.tables.data = torch.stack([-matrix.T, matrix.T], dim=1).flatten(0, 1)
    monkeypatch.setattr("transect.parts.catalog.memoryformer.part.row_weights", lambda z, *_: z.abs().sum(-1))
    torch.testing.assert_close(one(x), functional.linear(x, matrix, one.bias))


def test_numbers_and_operations_are_the_published_ones():
    with torch.device("meta"):
        tiny = MemoryMLP(512)
        qkv = MemoryMatrix(512, 512, False)
    assert qkv.inner.tables.numel() == 8_388_608
    assert tiny.first.tables.numel() == 64 * 2**8 * 640 and tiny.second.tables.numel() == 64 * 2**10 * 512
    total = sum(p.numel() for p in [*tiny.parameters(), *qkv.parameters(), *qkv.parameters(), *qkv.parameters()])
    assert total == pytest.approx(69e6, rel=0.01)
    assert 2048 * 6 * qkv.inner.flops / 2 == pytest.approx(0.40e9, rel=0.05)  # they count a multiply-add once


def test_every_row_is_used_alike_if_the_input_is_centred():
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))

    def used(part, x):
        return torch.bincount(part.inner.addressed(part.hashed(x))[0].flatten(), minlength=32).double()

    plain, normed = (MemoryMatrix(8, 4, False, bits=4, norm=norm) for norm in (False, True))
    even = len(x) / 16
    assert float(((used(plain, x) - even) ** 2 / even).sum()) < 2 * 45  # χ² of 30 degrees of freedom, twice its 96 %
    shifted = used(plain, x + 3)
    assert float(shifted.max()) > 0.98 * len(x)
    torch.testing.assert_close(used(normed, x + 3), used(normed, x))


@pytest.mark.parametrize("weight", ["scaled", "probability"])
def test_fitted_tables_follow_a_matrix(weight):
    matrix, x, held_out = drawn(6, 12, seed=5), drawn(3000, 12, seed=6), drawn(500, 12, seed=7)
    y, wanted = x @ matrix.T + 1, held_out @ matrix.T + 1

    def error(bits, count):
        part = MemoryMatrix(12, 6, True, bits=bits, weight=weight, norm=False).double()
        seen = fit_tables(part, x[:count], y[:count])
        found = float((part(held_out).detach() - wanted).square().sum() / (wanted - y.mean(0)).square().sum())
        return seen, found

    few, many, long = error(3, 60), error(3, 3000), error(6, 3000)
    assert few[1] > many[1] + 0.02 and many[1] < 0.6 and long[1] > many[1]
    assert few[0] < few[1] and error(1, 3000)[1] < 0.25


def test_bad_input():
    with pytest.raises(TransectError, match="chunks of 5"):
        layer(12, 5, 5)
    with pytest.raises(TransectError, match="of the same positions"):
        fit_tables(MemoryMatrix(8, 4, False), drawn(3, 8), drawn(4, 4))
