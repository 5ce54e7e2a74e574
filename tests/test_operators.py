import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from transect.anatomy import Anatomy
from transect.operators import LowRank, build, flops_of, stored_bytes

from .models import assert_alike, tiny


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
    assert_alike(twin(x), operator(x))


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


class Turned(LowRank):
    """Its numbers lie in memory column after column, whatever is done to it."""

    @classmethod
    def from_factors(cls, left, right, bias=None):
        made = super().from_factors(left, right, bias)
        for factor in (made.left, made.right):
            factor.weight.data = factor.weight.data.T.contiguous().T
        made.register_buffer("index", torch.arange(6).view(2, 3).T)
        return made

    def select(self, rows, columns):
        chosen = super().select(rows, columns)
        return Turned.from_factors(chosen.left.weight, chosen.right.weight, chosen.bias)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_whatever_operator_is_put_into_a_model_is_laid_out_as_loading_would(name):
    """In place of a matrix, and of a part of a fused one; and where rows and columns of it are cut."""
    model = tiny(name)
    mlp = Anatomy(model).blocks[0].mlp
    for matrix in (mlp.up, mlp.down):
        d_out, d_in = matrix.shape
        operator = Turned.from_factors(torch.randn(d_out, 4), torch.randn(4, d_in))
        dense = operator.to_dense()
        matrix.replace(operator)
        assert_alike(matrix.weight, dense)
    assert_laid_out(model)
    Anatomy(model).blocks[0].mlp.keep(range(5, 40))
    assert_laid_out(model)


def assert_laid_out(model):
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.stride() == torch.empty(tensor.shape).stride(), name
