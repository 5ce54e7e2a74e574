"""The operator that stores non-zeros and a bit for every entry."""

import copy

import pytest
import torch
from torch.nn.functional import linear

from transect.anatomy.storage import weight_tensors
from transect.operators import build
from transect.operators.sparse import Sparse, sparse_bytes

from .models import assert_alike


def problem(d_out, d_in, density=0.3):
    generator = torch.Generator().manual_seed(d_out)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    return weight, torch.rand(d_out, d_in, generator=generator) < density, generator


@pytest.mark.parametrize("shape", [(5, 8), (3, 13), (1, 1)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_it_is_the_masked_matrix_and_its_bytes_are_real(shape, density):
    weight, mask, generator = problem(*shape, density)
    made, expected = Sparse.from_dense(weight, mask), weight * mask
    assert torch.equal(made.to_dense(), expected) and torch.equal(made.mask(), mask)
    made.set_bias(torch.randn(shape[0], generator=generator, dtype=torch.float64))
    x = torch.randn(2, 3, shape[1], generator=generator, dtype=torch.float64)
    torch.testing.assert_close(made(x), linear(x, expected, made.bias))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in weight_tensors(made))
    assert stored == sparse_bytes(*shape, int(mask.sum()), 8) == 8 * int(mask.sum()) + -(-weight.numel() // 8)
    again = build(made.describe()).double()
    again.load_state_dict(made.state_dict())
    assert_alike(again(x), made(x))


def test_rows_and_columns_are_selected():
    weight, mask, _ = problem(5, 7)
    made = Sparse.from_dense(weight, mask)
    made.set_bias(torch.arange(5.0).double())
    rows, columns = torch.tensor([4, 0]), torch.tensor([1, 6, 2])
    part = made.select(rows, columns)
    assert torch.equal(part.to_dense(), (weight * mask)[rows][:, columns]) and part.bias.tolist() == [4, 0]
    assert torch.equal(part.mask(), mask[rows][:, columns])


def test_what_it_keeps_follows_its_numbers_and_gradients_reach_them():
    weight, mask, _ = problem(4, 6)
    made, x = Sparse.from_dense(weight, mask), torch.ones(6, dtype=torch.float64)
    with torch.no_grad():
        before = made(x)
        assert made._ready() is made._ready() and "_remade" not in copy.deepcopy(made).__dict__
        made.values.mul_(2)
        torch.testing.assert_close(made(x), 2 * before)
    made(x).sum().backward()
    assert torch.equal(made.values.grad, torch.ones_like(made.values))


def test_more_entries_than_the_matrix_has_are_refused():
    with pytest.raises(ValueError, match="has no 7 entries"):
        build({"kind": "sparse", "in": 2, "out": 3, "nonzeros": 7, "bias": False})
