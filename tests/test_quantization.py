"""A few bits a weight: the stored matrix, rounding to it, and GPTQ, which makes up for the rounding."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transect
from transect.anatomy import Anatomy
from transect.anatomy.storage import weight_tensors
from transect.compression import method, two_sided
from transect.compression.integers import Grid, grouped, integer_size
from transect.errors import OutOfReach, TransectError
from transect.evaluation.size import parameters
from transect.operators import build
from transect.operators.grouped_integer import BITS, GroupedInteger, grouped_integer_bytes, pack, packed_bytes, unpack
from transect.operators.quantized import Quantized

from .models import VOCABULARY, apart, assert_alike, saved_and_loaded, tiny

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
SHAPES = [(5, 8), (6, 20), (3, 13), (4, 2), (1, 7)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(d_out, d_in):
    x = randn(300, d_in, seed=1) @ (torch.eye(d_in) + randn(d_in, d_in, seed=2) / d_in**0.5)
    return randn(d_out, d_in), x.T @ x / 300


@torch.no_grad()
def output_error(weight, made, covariance):
    delta = weight - made.to_dense()
    return torch.einsum("ij,jk,ik->", delta, covariance, delta).item()


# the stored matrix


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 70), st.integers(0, 2**31))
def test_integers_survive_packing_in_as_many_bits_as_they_have(bits, count, seed):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and torch.equal(unpack(packed, bits, count).long(), codes)
    assert len(packed) == packed_bytes(count, bits) and count * bits / 8 <= len(packed) < count * bits / 8 + 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_operator_is_its_formula_and_its_bytes_are_the_size(shape, bits, symmetric):
    group, dtype = 4, torch.bfloat16
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(1))
    groups = -(-shape[1] // group)
    scale = randn(shape[0], groups, seed=2).abs().to(dtype)
    zeros = torch.randint(0, 2**bits, scale.shape, generator=torch.Generator().manual_seed(3))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    made = GroupedInteger.from_codes(codes, scale, None if symmetric else zeros, bits, group)
    spread, zero = (each.double().repeat_interleave(group, 1)[:, : shape[1]] for each in (scale, zeros))
    assert torch.equal(made.to_dense().double(), (spread * (codes - zero)).to(dtype).double())
    bias = randn(shape[0], seed=4).to(dtype)
    made.set_bias(bias)
    x = randn(2, 3, shape[1], seed=5).to(dtype)
    with torch.no_grad():
        assert_alike(made(x), torch.nn.functional.linear(x, made.to_dense(), bias))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in weight_tensors(made))
    assert stored == grouped_integer_bytes(*shape, bits, group, symmetric, 2)
    again = build(made.describe()).to(dtype)
    again.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), made(x))
    rows = torch.tensor([shape[0] - 1, 0])
    assert torch.equal(made.select(rows, None).to_dense(), made.to_dense()[rows])
    with pytest.raises(TransectError, match="cannot lose rows or columns"):
        made.select(None, rows)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_kernel_multiplies_as_the_matrix_does(bits, symmetric):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (48, 128), generator=generator, dtype=torch.uint8)
    zeros = None if symmetric else torch.randint(2**bits, (48, 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand(48, 2, generator=generator) + 0.5
    made = GroupedInteger.from_codes(codes, scale.bfloat16(), zeros, bits, 64)
    made.set_bias(torch.randn(48, generator=generator).bfloat16())
    x = torch.randn(2, 3, 128, generator=generator).bfloat16()
    exact = copy.deepcopy(made).double()
    expected = x.double() @ exact.to_dense().T + exact.bias
    with torch.no_grad():
        if made.kernel == "dense":
            pytest.skip("this torch has no kernel for integers of 4 bits")
        for again in range(2):
            error = (made(x).double() - expected).abs().max() / expected.abs().max()
            assert error < 0.01, again  # bfloat16 has 8 bits
        made.codes.fill_(0)  # what the kernel was given is not used for other integers
        assert (made(x).double() - expected).abs().max() / expected.abs().max() > 0.01
    assert made(x.requires_grad_()).requires_grad  # gradients go through the matrix
    assert GroupedInteger.from_codes(codes, scale, zeros, bits, 64).kernel == "dense"  # float32


@pytest.mark.parametrize("change", [{"bits": 7}, {"bits": 0}, {"group_size": 0}])
def test_what_is_no_such_matrix_is_not_built(change):
    described = GroupedInteger(4, 4, 4, 2, False, False).describe()
    with pytest.raises(ValueError, match="bits are one of"):
        build(described | change)


def test_four_bits_in_groups_of_64_are_4_and_5_16_of_16():
    assert integer_size((128, 256), 2, 1.0, group=64, symmetric=False).chosen == {"bits": 8}
    size = integer_size((128, 256), 2, 0.27, group=64, symmetric=False)
    assert size.chosen == {"bits": 4} and size.bytes == (4 + 20 / 64) / 16 * 128 * 256 * 2
    assert integer_size((128, 256), 2, 0.269, group=64, symmetric=False).chosen == {"bits": 3}
    assert integer_size((128, 256), 2, 0.269, group=64, symmetric=True).chosen == {"bits": 4}
    with pytest.raises(OutOfReach, match=r"2 bits in groups of 64 store 0\.1426 of a 128 x 256"):
        integer_size((128, 256), 2, 0.14, group=64, symmetric=False)


# rounding


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [4, 7, 64])
def test_rounding_is_off_by_half_a_step_at_most(bits, symmetric, group):
    weight = randn(6, 20)
    made = method("rtn").function(weight, bits=bits, group=group, symmetric=symmetric).to_dense().detach()
    groups = grouped(weight, group)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    width = 2 * groups.abs().amax(-1) if symmetric else high - low
    step = (width / (2**bits - 1)).repeat_interleave(group, 1)[:, :20] * (1 + 2**-7)  # rounded outwards, to bfloat16
    # 0 is a point, so that the first or the last may lie half a step inside, and rounding costs as much again.
    assert ((weight - made).abs() <= (1 + 1e-6) * step).all()
    assert ((weight - made).abs() <= (0.5 + 1e-6) * step).double().mean() > 0.8


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_on_a_grid_stays_as_it_is(name, bits):
    codes = torch.randint(0, 2**bits, (6, 16), generator=torch.Generator().manual_seed(1))
    codes[:, 0::8], codes[:, 1::8] = 0, 2**bits - 1  # each group reaches from end to end
    weight = ((codes - 2 ** (bits - 1)) * 0.25).double()
    statistics = [problem(6, 16)[1]] if name == "gptq" else []
    made = method(name).function(weight.clone(), *statistics, bits=bits, group=8)
    assert torch.equal(made.to_dense(), weight)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_equal_entries_and_features_that_are_never_on(name, symmetric):
    weight, covariance = problem(6, 16)
    weight[0], weight[1, 4:8], weight[2, :4] = 0, 0.5, 1e-30
    covariance[5], covariance[:, 5] = 0, 0
    statistics = [covariance] if name == "gptq" else []
    made = method(name).function(weight.clone(), *statistics, bits=4, group=4, symmetric=symmetric).to_dense()
    assert torch.isfinite(made).all() and not made[0].any()
    if name == "rtn":
        assert torch.allclose(made[1, 4:8], weight[1, 4:8], rtol=0.07)
    nothing = method(name).function(weight, *[torch.zeros_like(s) for s in statistics], bits=4, group=4)
    assert torch.isfinite(nothing.to_dense()).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_is_that_of_compressed_tensors(bits, symmetric):
    """Of an implementation of its own, that of llm-compressor, with its scales in the type that ours are stored in."""
    package = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = randn(24, 96).float() + randn(24, 1, seed=3).float()
    settings = package.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    groups = weight.unflatten(1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), settings)
    expected = fake_quantize(weight, scale.bfloat16().float(), zero, settings)
    made = method("rtn").function(weight, bits=bits, group=32, symmetric=symmetric).to_dense()
    assert (made - expected).abs().max() <= 1e-4


# GPTQ


def by_elimination(weight, covariance, bits, group, damping, order):
    """GPTQ as Optimal Brain Quantization tells it: after each rounding, H⁻¹ of the columns that are left."""
    weight = weight.clone()
    hessian = covariance + damping * covariance.diagonal().mean() * torch.eye(len(covariance))
    left, static = list(order), Grid.of(grouped(weight, group), bits, False)
    made, grids = torch.empty_like(weight), {}
    while left:
        j = left[0]
        if order == sorted(order) and j % group == 0:
            grids[j // group] = Grid.of(weight[:, j : j + group], bits, False)
        grid = grids.get(j // group)
        if grid is None:
            grid = Grid(bits, static.scale[:, j // group], static.zero[:, j // group])
        inverse = torch.linalg.inv(hessian[left][:, left])
        made[:, j] = grid.values(grid.codes(weight[:, j, None]))[:, 0]
        weight[:, left] -= torch.outer((weight[:, j] - made[:, j]) / inverse[0, 0], inverse[0])
        left = left[1:]
    return made


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [4, 5, 96, 200])
def test_it_is_elimination_column_by_column(act_order, group):
    """Also across the blocks of columns that are updated together, and where groups lie across their borders."""
    weight, covariance = problem(7, 150)
    made = method("gptq").function(
        weight.clone(), covariance, bits=3, group=group, act_order=act_order, damping=0.01
    )  # fmt: skip
    order = covariance.diagonal().argsort(descending=True).tolist() if act_order else list(range(150))
    expected = by_elimination(weight, covariance, 3, group, 0.01, order)
    off = (made.to_dense() - expected).abs() > 1e-4  # what lies half-way between two points may fall either way
    assert off.double().mean() < 0.01


@pytest.mark.parametrize("symmetric", [False, True])
def test_with_uncorrelated_features_it_is_rounding_and_otherwise_better(symmetric):
    weight, covariance = problem(12, 40)
    options = {"bits": 3, "group": 8, "symmetric": symmetric}
    rounded = method("rtn").function(weight.clone(), **options)
    alone = method("gptq").function(weight.clone(), torch.eye(40, dtype=torch.float64), **options)
    assert_alike(alone.to_dense(), rounded.to_dense())
    for act_order in (False, True):
        made = method("gptq").function(weight.clone(), covariance, **options, act_order=act_order)
        assert output_error(weight, made, covariance) < 0.8 * output_error(weight, rounded, covariance)


# whole models


@pytest.mark.parametrize(("keep", "bits"), [(0.6, 8), (0.45, 6), (0.39, 5), (0.33, 4), (0.27, 3), (0.21, 2)])
def test_a_budget_chooses_the_bits(keep, bits):
    model = tiny("llama").bfloat16()
    transect.compress(model, "rtn", keep, group=32)
    matrices = Anatomy(model).matrices()
    assert {matrix.module.bits for matrix in matrices} == {bits}  # of every one: none stays dense
    scales = sum(matrix.module.scale.numel() for matrix in matrices)
    assert parameters(model) == parameters(tiny("llama")) + scales


@pytest.mark.parametrize("wrong", [{"group": 0}, {"group": 70_000}, {"group": "x"}, {"symmetric": 3}, {"damping": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(TransectError, match="must be"):
        transect.compress(tiny("llama"), "gptq", 0.5, DATA, **wrong)


def test_a_budget_below_two_bits_is_refused_before_any_change():
    model = tiny("llama")
    with pytest.raises(OutOfReach, match="2 bits in groups of 64"):
        transect.compress(model, "rtn", 0.05)
    assert not Anatomy(model).record


# structures in few bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("kfac-svd+gptq4", 0.25), ("svd+rtn8", 0.4), ("monarch+rtn4", 0.2), ("modegpt+gptq4", 0.25),
        ("llm-drop+gptq3", 0.2),
    ],
)  # fmt: skip
def test_any_method_s_numbers_are_stored_in_few_bits_within_the_budget(name, keep, dtype, tmp_path):
    model = tiny("llama").to(dtype)
    outcome = transect.compress(model, name, keep, DATA)
    anatomy = Anatomy(outcome)
    kept = anatomy.record.history[-1]
    assert kept["kept"] <= keep and kept["compress"]["method"] == name
    base = name.partition("+")[0]
    modules = [matrix.module for matrix in anatomy.matrices()]
    assert all(isinstance(module, (GroupedInteger, Quantized)) for module in modules)
    assert base == "llm-drop" or dtype == torch.float32 or any(isinstance(module, Quantized) for module in modules)
    saved_and_loaded(model, "llama", tmp_path)


def test_the_rounding_is_near_what_is_rounded():
    """Eight bits of a structure are almost the structure, at the same ranks."""
    plain, rounded = tiny("llama").bfloat16(), tiny("llama").bfloat16()
    transect.compress(rounded, "svd+rtn8", 0.3)
    keep = Anatomy(rounded).record.history[-1]["compress"]["structure_keep"]
    assert 0.5 < keep < 0.6
    transect.compress(plain, "svd", keep)
    for one, other in zip(Anatomy(plain).matrices(), Anatomy(rounded).matrices(), strict=True):
        assert apart(other.weight.float(), one.weight.float()) < 0.03
        assert isinstance(other.module, Quantized)
        assert torch.equal(other.module.opened().to_dense(), other.module.to_dense())
        assert other.module.flops == one.module.flops


@pytest.mark.parametrize("name", ["svd+gptq7", "svd+", "svd+gptq", "svd+svd4", "svd+gptq4g0", "magic+rtn4"])
def test_names_of_no_rounding_are_refused(name):
    with pytest.raises(TransectError, match=r"is no way to store numbers|unknown method 'magic'"):
        transect.compress(tiny("llama"), name, 0.5, DATA)


def test_what_stores_positions_is_refused_and_nothing_changes():
    model = tiny("llama").bfloat16()
    with pytest.raises(TransectError, match="is stored as 'sparse_dictionary'"):
        transect.compress(model, "cospadi+rtn4", 0.2, DATA)
    assert not Anatomy(model).record


@pytest.mark.parametrize("name", ["kfac-svd+gptq4", "modegpt+rtn4", "svd-llm+rtn8"])
def test_streaming_rounds_too(name, tmp_path):
    model = tiny("llama").bfloat16()
    model.save_pretrained(tmp_path / "dense")
    keep = 0.4 if "8" in name else 0.25
    outcome = transect.compress(tmp_path / "dense", name, keep, DATA, stream_to=tmp_path / "small")
    transect.compress(model, name, keep, DATA)
    kept = Anatomy(model).record.history[-1]
    assert outcome["matrix_bytes"] == kept["matrix_bytes"] and outcome["kept"] <= keep


def test_what_does_not_go_with_few_bits_is_refused_before_any_work(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(TransectError, match="cannot be streamed"):
        transect.compress(tmp_path / "dense", "modegpt+gptq4", 0.25, DATA, stream_to=tmp_path / "small")
    with pytest.raises(TransectError, match="cannot be refitted"):
        transect.compress(tiny("llama"), "svd-llm+gptq4", 0.25, DATA, refit=True)


# rounding by a metric on both sides


def by_anti_diagonals(weight, gradients, inputs, grid, group):
    """One entry after another, each with what all earlier errors contribute to R = M Δ Nᵀ."""
    above, left = (two_sided._unit_lower(metric) for metric in (gradients, inputs))
    error, made = torch.zeros_like(weight), torch.empty_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            wanted = weight[i, j] + (above[i, : i + 1] @ error[: i + 1, : j + 1] @ left[j, : j + 1])
            point = Grid(grid.bits, grid.scale[i, j // group], grid.zero[i, j // group])
            made[i, j] = point.values(point.codes(wanted[None]))[0]
            error[i, j] = weight[i, j] - made[i, j]
    return made


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (3, 5), (33, 32)])
@pytest.mark.parametrize("bits", [2, 4])
def test_two_sided_rounding_is_its_definition_and_lowers_the_price(shape, bits):
    weight, inputs = problem(*shape)
    gradients = problem(1, shape[0])[1] + 0.1 * torch.eye(shape[0])
    inputs = inputs + 0.1 * torch.eye(shape[1])
    grid = Grid.of(grouped(weight, 8), bits, False)
    codes = two_sided.round_two_sided(weight, gradients, inputs, grid, 8).double()
    made = grid.values(grouped(codes, 8)).flatten(1)[:, : shape[1]]
    expected = by_anti_diagonals(weight, gradients, inputs, grid, 8)
    assert ((made - expected).abs() > 1e-4).double().mean() < 0.01
    nearest = grid.values(grid.codes(grouped(weight, 8))).flatten(1)[:, : shape[1]]

    def price(change):
        return ((gradients @ change @ inputs) * change).sum().item()

    assert price(weight - made) < (0.9 if min(shape) > 10 else 1.01) * price(weight - nearest)


def test_uncorrelated_sides_are_rounded_to_the_nearest():
    weight = randn(40, 24)
    grid = Grid.of(grouped(weight, 8), 3, False)
    codes = two_sided.round_two_sided(weight, torch.eye(40).double(), torch.eye(24).double(), grid, 8)
    assert torch.equal(codes.float(), grid.codes(grouped(weight, 8)).flatten(1).float())
