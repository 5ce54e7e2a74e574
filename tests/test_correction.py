"""Integers with a low-rank correction: the stored matrix, what a budget pays for, LQER, EoRA and CALDERA."""

import pytest
import torch

import transect
from transect.anatomy import Anatomy
from transect.anatomy.storage import weight_tensors
from transect.compression import method
from transect.compression.correction import corrected_size
from transect.compression.weighted_svd import shrink, weighted_svd
from transect.errors import OutOfReach, TransectError
from transect.operators import LowRank, build
from transect.operators.corrected import Corrected
from transect.operators.grouped_integer import GroupedInteger, grouped_integer_bytes

from .models import VOCABULARY, assert_alike, saved_and_loaded, tiny

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(d_out, d_in):
    """W, and inputs (300 x d_in) whose features differ in size and depend on each other."""
    x = randn(300, d_in, seed=1) @ (torch.eye(d_in) + randn(d_in, d_in, seed=2) / d_in**0.5)
    return randn(d_out, d_in), x * torch.linspace(0.1, 3, d_in, dtype=torch.float64)


def statistics(name, x):
    return x.T @ x / len(x) if name == "eora" else x.abs().mean(0)


def objective(name, delta, x):
    """What each of them says that it makes least; for EoRA the outputs, with its shrunk second moments."""
    if name == "lqer":
        return (delta * x.abs().mean(0)).square().sum().item()
    second = x.T @ x / len(x)
    second = (1 - 1e-6) * second + 1e-6 * second.diagonal().mean() * torch.eye(len(second))
    return torch.einsum("ij,jk,ik->", delta, second, delta).item()


def operator(d_out=5, d_in=8, rank=2, dtype=torch.bfloat16):
    codes = torch.randint(0, 8, (d_out, d_in), generator=torch.Generator().manual_seed(1))
    scale = randn(d_out, -(-d_in // 4), seed=2).abs().to(dtype)
    zeros = torch.randint(0, 8, scale.shape, generator=torch.Generator().manual_seed(3))
    factors = LowRank.from_factors(randn(d_out, rank, seed=4).to(dtype), randn(rank, d_in, seed=5).to(dtype))
    return Corrected(GroupedInteger.from_codes(codes, scale, zeros, 3, 4), factors)


# the stored matrix


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_is_the_sum_of_its_parts_and_has_its_bias_once(dtype):
    made, x, bias = operator(dtype=dtype), randn(2, 3, 8, seed=6).to(dtype), randn(5, seed=7).to(dtype)
    made.set_bias(bias)
    with torch.no_grad():
        assert_alike(made(x), torch.nn.functional.linear(x, made.to_dense(), bias))
        assert_alike(made.to_dense(), made.integers.to_dense() + made.correction.to_dense())
        made.set_bias(None)
        assert made.bias is None and not made(torch.zeros_like(x)).any()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in weight_tensors(made))
    assert stored == grouped_integer_bytes(5, 8, 3, 4, False, dtype.itemsize) + 2 * (5 + 8) * dtype.itemsize
    assert made.flops == 2 * (5 * 8 + 2 * (5 + 8))


@pytest.mark.parametrize("bias", [None, randn(5, seed=7).bfloat16()])
def test_it_is_rebuilt_from_its_description_and_rows_are_cut(bias):
    made, x, rows = operator(), randn(3, 8, seed=6).bfloat16(), torch.tensor([4, 0])
    made.set_bias(bias)
    again = build(made.describe()).bfloat16()
    again.load_state_dict(made.state_dict())
    part = made.select(rows, None)
    with torch.no_grad():
        assert torch.equal(again(x), made(x))
        assert_alike(part(x), made(x)[:, rows])
        assert_alike(part.to_dense(), made.to_dense()[rows])
    with pytest.raises(TransectError, match="cannot lose rows or columns"):
        made.select(None, rows)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("integers", {"kind": "low_rank", "rank": 2}, "should be integers in groups and low-rank factors"),
        ("correction", {"kind": "linear"}, "should be integers in groups and low-rank factors"),
        ("correction", {"kind": "stacked"}, "cannot be a part of another"),
        ("correction", {"in": 9}, "differ in shape"),
        ("integers", {"bias": True}, "have no bias"),
    ],
)  # fmt: skip
def test_what_is_no_such_matrix_is_not_built(part, change, message):
    described = operator().describe()
    with pytest.raises(ValueError, match=message):
        build(described | {part: described[part] | change})


# what a budget pays for


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("keep", [0.95, 0.6, 0.3, 0.28, 0.25, 0.19])
def test_the_rank_takes_what_the_bits_leave(keep, itemsize):
    size = corrected_size((128, 256), itemsize, keep, group=64, symmetric=False)
    dense, a_rank = 128 * 256 * itemsize, (128 + 256) * itemsize
    assert size.bytes <= keep * dense < size.bytes + a_rank
    made = (
        method("lqer")
        .function(randn(128, 256), torch.ones(256).double(), **size.chosen)
        .to(torch.bfloat16 if itemsize == 2 else torch.float32)
    )
    assert size.bytes == sum(tensor.numel() * tensor.element_size() for tensor in weight_tensors(made))


def test_bits_go_before_rank_and_a_rank_of_1_is_the_least():
    def chosen(keep):
        return dict(corrected_size((128, 256), 2, keep, group=64, symmetric=False).chosen)

    assert chosen(0.9)["bits"] == 8
    four, a_rank = (4 + 20 / 64) / 16, (128 + 256) / (128 * 256)
    assert chosen(four + a_rank) == {"bits": 4, "rank": 1}
    assert chosen(four + 0.99 * a_rank)["bits"] == 3
    with pytest.raises(OutOfReach, match=r"a correction of rank 1 store 0\.1543 of a 128 x 256"):
        chosen(0.154)


# the methods


@pytest.mark.parametrize("name", ["lqer", "eora"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_rank_0_is_the_integers_and_full_rank_is_exact(name, shape):
    weight, x = problem(*shape)
    run, seen = method(name).function, statistics(name, x)
    base = method("rtn").function(weight, bits=3, group=8)
    if name == "eora":
        base = method("gptq").function(weight.clone(), seen.clone(), bits=3, group=8)
    assert torch.equal(run(weight.clone(), seen.clone(), bits=3, rank=0, group=8).to_dense(), base.to_dense().double())
    made = run(weight.clone(), seen.clone(), bits=3, rank=min(shape), group=8)
    torch.testing.assert_close(made.to_dense(), weight, rtol=0, atol=1e-8)
    assert torch.equal(made.integers.codes, base.codes)


@pytest.mark.parametrize("name", ["lqer", "eora"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_no_correction_of_that_rank_leaves_less(name, shape):
    """In its own objective: not the plain SVD of the error, and not what gradient descent makes of the factors."""
    weight, x = problem(*shape)
    for rank in (1, 4, 9):
        made = method(name).function(weight.clone(), statistics(name, x), bits=3, rank=rank, group=8)
        error = weight - made.integers.to_dense().detach().double()
        least = objective(name, weight - made.to_dense().detach(), x)
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        assert least < 0.99 * objective(name, error - (u[:, :rank] * s[:rank]) @ v[:rank], x)
        for seed in range(5):
            nearby = [
                factor + 1e-3 * randn(*factor.shape, seed=seed)
                for factor in (made.correction.left.weight.detach(), made.correction.right.weight.detach())
            ]
            assert least < objective(name, error - nearby[0] @ nearby[1], x)


@pytest.mark.parametrize("name", ["lqer", "eora"])
def test_with_features_all_alike_both_are_the_plain_svd_of_the_rounding_error(name):
    weight = randn(12, 20)
    seen = torch.eye(20).double() if name == "eora" else torch.full((20,), 3.0).double()
    made = method(name).function(weight.clone(), seen, bits=3, rank=4, group=8)
    error = weight - method("rtn").function(weight, bits=3, group=8).to_dense().detach()
    left, right = method("svd").function(error).truncate(4)
    torch.testing.assert_close(made.correction.to_dense().detach(), left @ right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lqer", "eora"])
def test_zeros_and_features_that_are_never_on_leave_all_finite(name):
    weight, x = problem(12, 20)
    weight[0], x[:, 5] = 0, 0
    for seen in (statistics(name, x), torch.zeros_like(statistics(name, x))):
        made = method(name).function(weight.clone(), seen, bits=3, rank=4, group=8)
        assert torch.isfinite(made.to_dense()).all()
        assert all(parameter.abs().max() < 1e4 for parameter in made.correction.parameters())


def test_caldera_begins_as_eora_and_each_round_that_is_kept_leaves_less():
    weight, x = problem(24, 40)
    seen = statistics("eora", x)

    def made(name, **more):
        return method(name).function(weight.clone(), seen.clone(), bits=2, rank=6, group=8, **more)

    eora, losses = made("eora"), []
    assert torch.equal(made("caldera", rounds=1).to_dense(), eora.to_dense())
    for rounds in (1, 2, 3, 6):
        found = made("caldera", rounds=rounds)
        losses.append(objective("eora", weight - found.to_dense().detach(), x))
        left = weight - found.integers.to_dense().detach()  # L R is the best for its Q
        assert losses[-1] == pytest.approx(weighted_svd(left, input_metric=shrink(seen, 1e-6)).losses()[6].item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


# whole models


@pytest.mark.parametrize("name", ["lqer", "eora", "caldera"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_is_corrected_everywhere_saved_and_loaded(name, architecture, tmp_path):
    model, dense = tiny(architecture).bfloat16(), tiny(architecture)
    transect.compress(model, name, 0.6, DATA, group=16)
    matrices = Anatomy(model).matrices()
    assert all(isinstance(matrix.module, Corrected) for matrix in matrices)
    for matrix, before in zip(matrices, Anatomy(dense).matrices(), strict=True):
        assert (matrix.weight.float() - before.weight).norm() < 0.3 * before.weight.norm()
        assert (matrix.bias is None) == (before.bias is None)
        if before.bias is not None:
            assert torch.equal(matrix.bias, before.bias.bfloat16())
    saved_and_loaded(model, architecture, tmp_path)


@pytest.mark.parametrize("wrong", [{"group": 0}, {"symmetric": 3}, {"shrinkage": 2}, {"damping": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(TransectError, match="must be"):
        transect.compress(tiny("llama"), "eora", 0.5, DATA, **wrong)


def test_what_is_integers_already_is_not_rounded_again():
    model = tiny("llama").bfloat16()
    with pytest.raises(TransectError, match="is stored as 'corrected', with integers, positions or shared parts"):
        transect.compress(model, "lqer+rtn4", 0.25, DATA)
    assert not Anatomy(model).record
