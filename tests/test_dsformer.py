"""DSFormer: the projection to dense bases and row-sparse coefficients, its operator, and whole models."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.compression import method, weighted_svd
from transect.compression.catalog.dsformer import dsformer_size
from transect.errors import OutOfReach, TransectError
from transect.layers import sparse_coding
from transect.layers.dense_sparse import (
    Projection,
    column_blocks,
    fitted_bases,
    project,
    starting_bases,
    without_idle,
)
from transect.operators import build, stored_bytes
from transect.operators.dense_sparse import DenseSparse, dense_sparse_bytes

from .models import VOCABULARY, apart, assert_alike, assert_same_model, inputs, tiny


def matrix(d_out, d_in, seed=0):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(weight, blocks, bases, nonzeros, start="svd", iterations=5):
    parts = column_blocks(weight, blocks)
    return parts, project(parts, starting_bases(parts.float(), bases, start, 0), nonzeros, iterations)


def errors(parts, found):
    """||W_β - S_β D_β||² of every block."""
    return (parts - found.blocks()).square().sum((1, 2))


def operator(d_out=20, d_in=14, blocks=3, bases=6, nonzeros=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    indices = torch.rand(blocks, d_out, bases, generator=generator).argsort(-1)[..., :nonzeros]
    values = torch.randn(blocks, d_out, nonzeros, generator=generator, dtype=dtype)
    dense = torch.randn(blocks, bases, -(-d_in // blocks), generator=generator, dtype=dtype)
    built = DenseSparse.from_blocks(dense, values, indices, d_in)
    built.set_bias(torch.randn(d_out, generator=generator, dtype=dtype))
    coefficients = torch.zeros(blocks, d_out, bases, dtype=dtype).scatter(2, indices, values)
    return built, torch.cat(list(coefficients @ dense), 1)[:, :d_in], indices.sort(-1).values


# The projection


@pytest.mark.parametrize("bases", [8, 11])
@pytest.mark.parametrize("start", ["rows", "svd"])
def test_as_many_bases_as_columns_all_in_use_are_exact(bases, start):
    weight = matrix(24, 22)  # three blocks of 8 columns, two of them padding
    parts, found = made(weight, 3, bases, bases, start)
    assert parts.shape == (3, 24, 8)
    torch.testing.assert_close(found.blocks(), parts, rtol=0, atol=1e-4)
    built = DenseSparse.from_blocks(found.bases, found.values, found.indices, 22)
    torch.testing.assert_close(built.to_dense(), weight, rtol=0, atol=1e-4)


def test_every_row_of_every_block_has_exactly_s_bases_all_different():
    weight = matrix(40, 30)
    weight[3] = 0
    weight[7] = weight[8]
    _, found = made(weight, 3, 12, 5)
    assert found.bases.shape == (3, 12, 10) and found.values.shape == found.indices.shape == (3, 40, 5)
    assert (found.indices.diff(dim=2) > 0).all() and found.indices.max() < 12
    assert torch.isfinite(found.values).all() and found.blocks().transpose(0, 1)[3].abs().max() < 1e-6


@pytest.mark.parametrize("start", ["rows", "svd"])
@pytest.mark.parametrize("decay", [0, -2])
def test_with_every_base_in_use_it_is_the_truncated_svd_of_each_block(start, decay):
    weight = matrix(48, 48) * torch.logspace(0, decay, 48).double()
    parts, found = made(weight, 3, 6, 6, start, iterations=20)
    for part, error in zip(parts, errors(parts, found), strict=True):
        best = torch.linalg.svdvals(part).square()[6:].sum()
        assert best * (1 - 1e-9) <= error <= 1.01 * best


@pytest.mark.parametrize("seed", range(3))
def test_the_half_step_never_raises_a_blocks_error_and_keeps_unit_bases(seed):
    parts = column_blocks(matrix(40, 30, seed), 3)
    bases = starting_bases(parts, 12, "rows", seed)
    for _ in range(4):
        values, indices = sparse_coding.orthogonal_matching_pursuit(parts, bases, 4)
        before = errors(parts, Projection(bases, values, indices))
        bases, values = fitted_bases(parts, bases, values, indices)
        after = errors(parts, Projection(bases, values, indices))
        assert (after < before).all()
        torch.testing.assert_close(bases.norm(dim=2), torch.ones(3, 12).double())
        again = errors(parts, Projection(*fitted_bases(parts, bases, values, indices), indices))
        torch.testing.assert_close(again, after, rtol=1e-6, atol=0)  # it was the least-squares solution


def test_the_best_round_of_each_block_is_kept():
    weight = matrix(40, 30)
    found = [errors(*made(weight, 3, 12, 4, iterations=rounds)) for rounds in (1, 2, 4, 8, 16)]
    assert all((later <= earlier * (1 + 1e-9)).all() for earlier, later in pairwise(found))
    assert (found[-1] < 0.95 * found[0]).all()


def test_a_warm_start_does_not_lose_what_was_found():
    parts, found = made(matrix(40, 30), 3, 12, 4, iterations=8)
    warm = project(parts, found.bases, 4, 2)
    assert errors(parts, warm).sum() <= errors(parts, found).sum()


@pytest.mark.parametrize("bases", [6, 12])
def test_more_non_zeros_never_leave_more(bases):
    weight = matrix(48, 32)
    left = [float(errors(*made(weight, 2, bases, nonzeros, iterations=8)).sum()) for nonzeros in range(1, bases + 1)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(left)) and left[-1] < 0.9 * left[0]


@pytest.mark.parametrize("chunk", [1 << 21, 7 * 3 * 8])
def test_blocks_are_coded_together_as_they_are_alone(chunk, monkeypatch):
    monkeypatch.setattr(sparse_coding, "_CHUNK", chunk)  # seven rows at a time: across the blocks' borders
    parts = column_blocks(matrix(30, 24), 3)
    bases = starting_bases(parts, 8, "svd", 0)
    together = sparse_coding.orthogonal_matching_pursuit(parts, bases, 3)
    for number, (part, own) in enumerate(zip(parts, bases, strict=True)):
        values, indices = sparse_coding.orthogonal_matching_pursuit(part, own, 3)
        torch.testing.assert_close(together[0][number], values)
        assert torch.equal(together[1][number], indices)


def test_bases_that_no_row_uses_become_the_rows_that_are_fitted_worst():
    parts = column_blocks(matrix(30, 20), 2)
    bases = starting_bases(parts, 6, "rows", 0)
    indices = torch.tensor([[[0, 1], [1, 3], [3, 4]], [[0, 1], [2, 3], [4, 5]]]).repeat(1, 10, 1)
    found = Projection(bases, torch.ones(2, 30, 2).double(), indices)
    changed = without_idle(parts, found)
    worst = (parts[0] - found.blocks()[0]).norm(dim=1).argsort(descending=True)
    for base, row in zip((2, 5), worst, strict=False):
        torch.testing.assert_close(changed[0, base], parts[0, row] / parts[0, row].norm())
    assert torch.equal(changed[0, [0, 1, 3, 4]], bases[0, [0, 1, 3, 4]]) and torch.equal(changed[1], bases[1])


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_at_equal_bytes_it_leaves_less_than_svd(keep):
    weight = matrix(96, 64) * torch.logspace(0, -0.5, 64).double()
    size = dsformer_size((96, 64), 2, keep, width=64, ratio=4.0)
    built = method("dsformer").function(weight, **size.chosen)
    rank = math.floor(keep * 96 * 64 / (96 + 64))
    assert (weight - built.to_dense()).square().sum() < 0.95 * weighted_svd(weight).losses()[rank]


def test_a_matrix_of_zeros_stays_one():
    weight = torch.zeros(12, 10, dtype=torch.float64)
    assert not method("dsformer").function(weight, blocks=2, bases=4, nonzeros=2).to_dense().any()


# Size


@pytest.mark.parametrize("ratio", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_size_is_the_largest_that_fits_and_is_what_is_stored(ratio, itemsize):
    for shape, keep, width in (((96, 70), 0.6, 32), ((70, 96), 0.31, 96), ((40, 40), 0.8, 1000)):
        size = dsformer_size(shape, itemsize, keep, width=width, ratio=ratio)
        blocks, bases, nonzeros = (size.chosen[name] for name in ("blocks", "bases", "nonzeros"))
        assert bases == math.floor(ratio * nonzeros) >= nonzeros >= 1 and blocks == math.ceil(shape[1] / width)
        built, _, _ = operator(*shape, blocks, bases, nonzeros, {2: torch.bfloat16, 4: torch.float32}[itemsize])
        built.set_bias(None)
        budget = keep * shape[0] * shape[1] * itemsize
        assert stored_bytes(built) == size.bytes <= budget
        larger = dense_sparse_bytes(*shape, blocks, math.floor(ratio * (nonzeros + 1)), nonzeros + 1, itemsize)
        assert larger > budget


def test_what_does_not_fit_is_refused():
    with pytest.raises(OutOfReach, match="leaves no non-zero in 4 blocks"):
        dsformer_size((20, 20), 4, 0.1, width=5, ratio=4.0)
    for sizes in ((0, 4, 2), (15, 4, 2), (2, 4, 5), (2, 4, 0), (2, 21, 2)):
        with pytest.raises(TransectError, match="do not fit a 20 x 14 matrix"):
            DenseSparse(14, 20, *sizes, False)
    for settings, message in (
        ({"width": 0}, "from 1 to"),
        ({"ratio": 0.5}, "from 1 to 64"),
        ({"start": "x"}, "one of"),
    ):
        with pytest.raises(TransectError, match=message):
            transect.compress(tiny("llama"), "dsformer", 0.5, **settings)


# The operator


@pytest.mark.parametrize(("blocks", "bases", "nonzeros"), [(3, 6, 2), (1, 5, 5), (14, 1, 1), (4, 9, 8)])
def test_the_operator_is_its_dense_form(blocks, bases, nonzeros):
    built, dense, indices = operator(blocks=blocks, bases=bases, nonzeros=nonzeros)
    torch.testing.assert_close(built.to_dense(), dense)
    assert torch.equal(built.indices(), indices)
    x = torch.randn(2, 3, 14).double()
    torch.testing.assert_close(built(x), x @ dense.T + built.bias, rtol=0, atol=1e-12)
    twin = build(built.describe()).double()
    twin.load_state_dict(built.state_dict())
    assert_alike(twin(x), built(x))
    width = math.ceil(14 / blocks)
    assert built.flops == 2 * blocks * bases * (width + 20)
    numbers = blocks * (bases * width + 20 * nonzeros) + 20
    assert stored_bytes(built) == 8 * numbers + 20 * math.ceil(blocks * bases / 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_saved_it_computes_as_the_dense_matrix(dtype, tmp_path):
    """Must hold to 1e-5 in float32; in bfloat16 to what its 8 bits say."""
    weight = matrix(48, 30).float()
    chosen = dsformer_size(weight.shape, 4, 0.7, width=10, ratio=2.0).chosen
    built = method("dsformer").function(weight.double(), **chosen, iterations=3).to(dtype)
    torch.save(built.state_dict(), tmp_path / "packed")
    again = build(built.describe()).to(dtype)
    again.load_state_dict(torch.load(tmp_path / "packed"))
    x = torch.randn(5, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        expected = x.double() @ built.to_dense().double().T
        assert apart(again(x).double(), expected) <= (1e-5 if dtype == torch.float32 else 2e-2)


def test_gradients_reach_bases_and_values_as_those_of_the_dense_form():
    built, _, indices = operator()
    x = torch.randn(5, 14).double()
    built(x).square().sum().backward()
    dense = built.bases.weight.detach().clone().requires_grad_()
    values = built.coefficients.values.detach().unflatten(1, (3, 2)).transpose(0, 1).clone().requires_grad_()
    whole = torch.cat(list(scatter_of(values, indices, 6) @ dense), 1)[:, :14]
    (x @ whole.T + built.bias.detach()).square().sum().backward()
    torch.testing.assert_close(built.bases.weight.grad, dense.grad)
    torch.testing.assert_close(built.coefficients.values.grad, values.grad.transpose(0, 1).flatten(1))


def scatter_of(values, indices, bases):
    return torch.zeros(*values.shape[:2], bases, dtype=values.dtype).scatter(2, indices, values)


def test_the_refit_lowers_the_output_error_and_keeps_bases_and_support():
    built, _, indices = operator()
    weight, x = matrix(20, 14, 5), matrix(60, 14, 6)
    bases = built.bases.weight.detach().clone()

    def error():
        return float((x @ (weight - built.to_dense().detach()).T).square().sum())

    before = error()
    built.refit(weight, x.T @ x / 60)
    assert error() < before and torch.equal(built.bases.weight, bases) and torch.equal(built.indices(), indices)
    once = error()
    built.refit(weight, x.T @ x / 60)
    assert error() == pytest.approx(once, rel=1e-6)


# Whole models


def test_every_matrix_of_a_model_is_replaced_within_the_budget_and_the_model_loads_again(tmp_path):
    model = tiny("llama")
    whole = Anatomy(model).matrix_bytes()
    transect.compress(model, "dsformer", 0.6, width=16, iterations=2)
    assert 0.5 * whole < Anatomy(model).matrix_bytes() <= 0.6 * whole
    stored = [isinstance(one.module, DenseSparse) for one in Anatomy(model).matrices()]
    assert sum(stored) > 0.8 * len(stored)
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model, inputs("llama"))


def test_the_frame_refits_it_on_data():
    data = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))
    models = [
        transect.compress(tiny("llama"), "dsformer", 0.5, data, refit=refit, iterations=2) for refit in (False, True)
    ]
    plain, refitted = (Anatomy(model).blocks[0].matrix("q").module for model in models)
    assert torch.equal(plain.bases.weight, refitted.bases.weight)
    assert not torch.equal(plain.coefficients.values, refitted.coefficients.values)
