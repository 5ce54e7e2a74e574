import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from transect.operators import LowRank, build, flops_of, stored_bytes


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.sampled_from([(), (3,), (2, 4)]))
def test_low_rank_is_its_dense_form(d_out, d_in, rank, bias, batch):
    left, right = torch.randn(d_out, rank).double(), torch.randn(rank, d_in).double()
    b = torch.randn(d_out).double() if bias else None
    operator, x = LowRank.from_factors(left, right, b), torch.randn(*batch, d_in).double()
    torch.testing.assert_close(operator.to_dense(), left @ right)
    torch.testing.assert_close(operator(x), linear(x, left @ right, b))
    assert operator.flops == flops_of(operator) == 2 * rank * (d_in + d_out)
    assert stored_bytes(operator) == 8 * (rank * (d_in + d_out) + (d_out if bias else 0))


def test_low_rank_is_rebuilt_from_its_description():
    operator = LowRank.from_factors(torch.randn(5, 2), torch.randn(2, 7), torch.randn(5))
    twin = build(operator.describe())
    twin.load_state_dict(operator.state_dict())
    x = torch.randn(3, 7)
    assert torch.equal(twin(x), operator(x))


def test_low_rank_selects_rows_and_columns():
    operator = LowRank.from_factors(torch.randn(5, 2), torch.randn(2, 7), torch.randn(5))
    rows, columns = torch.tensor([4, 0]), torch.tensor([1, 6, 2])
    part = operator.select(rows, columns)
    torch.testing.assert_close(part.to_dense(), operator.to_dense()[rows][:, columns])
    assert torch.equal(part.bias, operator.bias[rows])


def test_low_rank_works_under_autocast_compile_and_autograd():
    operator, x = LowRank.from_factors(torch.randn(5, 2), torch.randn(2, 7), torch.randn(5)), torch.randn(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(x).dtype == torch.bfloat16
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), operator(x))
    operator(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in operator.parameters())


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'magic'"):
        build({"kind": "magic"})
