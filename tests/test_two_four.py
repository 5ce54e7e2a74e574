"""2:4 sparsity: the stored matrix, the three baselines, and whole models of it."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.anatomy.storage import weight_tensors
from transect.compression import method
from transect.compression.two_four import best_two_of_four, two_four_size
from transect.errors import OutOfReach, TransectError
from transect.evaluation import matrix_bytes
from transect.operators import build
from transect.operators.semi_structured import SemiStructured, pack_positions, unpack_positions
from transect.statistics import FeatureNorm, InputCovariance, collect, key_of

from .models import CONFIGS, VOCABULARY, assert_alike, inputs, logits, saved_and_loaded, tiny

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
METHODS = ["magnitude", "wanda", "sparsegpt"]
SHAPES = [(5, 8), (6, 20), (3, 13), (4, 2), (1, 7)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(d_out, d_in):
    x = randn(300, d_in, seed=1) @ (torch.eye(d_in) + randn(d_in, d_in, seed=2) / d_in**0.5)
    return randn(d_out, d_in), x.T @ x / 300


def output_error(weight, made, covariance):
    delta = weight - made.to_dense()
    return torch.einsum("ij,jk,ik->", delta, covariance, delta).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_is_the_best_of_six(shape):
    score = randn(*shape).abs()
    mask = best_two_of_four(score)
    padded = torch.nn.functional.pad(score, (0, -shape[1] % 4))
    assert mask.shape == padded.shape
    for group, chosen in zip(padded.reshape(-1, 4), mask.view(-1, 4), strict=True):
        best = max(group[list(pair)].sum() for pair in itertools.combinations(range(4), 2))
        assert chosen.sum() == 2 and group[chosen].sum() == best


def test_padding_never_takes_the_place_of_a_weight():
    assert best_two_of_four(torch.zeros(1, 7))[0].tolist() == [True, True, False, False, True, True, False, False]
    assert best_two_of_four(torch.zeros(1, 5))[0, 4:].tolist() == [True, True, False, False]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_positions_survive_packing(d_out, groups, seed):
    mask = best_two_of_four(torch.rand(d_out, 4 * groups, generator=torch.Generator().manual_seed(seed)))
    packed = pack_positions(mask)
    assert packed.dtype == torch.uint8 and len(packed) == (d_out * groups + 1) // 2
    index = unpack_positions(packed, d_out * groups)
    again = torch.zeros(d_out * groups, 4, dtype=torch.bool).scatter_(1, index, True)
    assert torch.equal(again.view_as(mask), mask) and (index[:, 0] < index[:, 1]).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_operator_is_the_masked_matrix_and_its_bytes_are_the_size(shape, dtype):
    weight = randn(*shape).to(dtype)
    mask = best_two_of_four(weight.abs())
    made = SemiStructured.from_dense(weight, mask)
    expected = weight * mask[:, : shape[1]]
    assert torch.equal(made.to_dense(), expected) and made.to_dense().dtype == dtype
    bias = randn(shape[0], seed=3).to(dtype)
    made.set_bias(bias)
    x = randn(2, 3, shape[1], seed=4).to(dtype)
    with torch.no_grad():
        assert_alike(made(x), torch.nn.functional.linear(x, expected, bias))
    assert made.kernel == "dense"  # here is no GPU, or it does not take these shapes
    stored = sum(tensor.numel() * tensor.element_size() for tensor in weight_tensors(made))
    assert stored == two_four_size(shape, weight.element_size(), 100).bytes
    assert made.flops == 2 * made.values.numel() == shape[0] * mask.shape[1]
    again = build(made.describe())
    again.to(dtype).load_state_dict(made.state_dict())
    assert_alike(again(x), made(x))


def test_a_matrix_stores_nine_sixteenths_in_half_precision_and_less_in_single():
    assert two_four_size((64, 128), 2, 1.0).bytes == 64 * 128 * 2 * 9 // 16
    assert two_four_size((64, 128), 4, 1.0).bytes == 64 * 128 * 4 * 17 // 32
    assert two_four_size((64, 128), 2, 9 / 16).bytes == 64 * 128 * 2 * 9 // 16
    with pytest.raises(OutOfReach, match=r"at least 0\.5625 of a 64 x 128"):
        two_four_size((64, 128), 2, 0.56)


def test_what_it_keeps_for_speed_follows_every_change_and_is_neither_copied_nor_stored():
    weight = randn(6, 8).float()
    made = SemiStructured.from_dense(weight, best_two_of_four(weight.abs())).requires_grad_(False)
    x = randn(3, 8, seed=1).float()

    def right():
        return torch.allclose(made(x.to(made.values.dtype)), x.to(made.values.dtype) @ made.to_dense().T)

    assert right() and "_remade" in made.__dict__
    before = made.state_dict().keys()
    assert "_remade" not in copy.deepcopy(made).__dict__ and before == {"weight", "values", "positions"}
    for change in (
        lambda: made.values.mul_(2), lambda: made.double(), lambda: made.bfloat16(), lambda: made.float(),
        lambda: made.load_state_dict({**made.state_dict(), "values": torch.ones(6, 4)}),
        lambda: setattr(made, "values", torch.nn.Parameter(torch.full((6, 4), 3.0), requires_grad=False)),
        lambda: made.train(), lambda: made.eval(),
    ):  # fmt: skip
        change()
        assert right()
    with torch.inference_mode():
        assert right()
    made.values.add_(1)
    with torch.inference_mode():
        made(x)
    y = x.clone().requires_grad_()
    made(y).sum().backward()  # with what was made in inference mode
    torch.testing.assert_close(y.grad, made.to_dense().sum(0).expand_as(x))


def test_a_sparse_kernel_is_used_where_no_gradient_is_needed(monkeypatch):
    """With a stand-in for PyTorch's sparse tensors, which need a GPU; it doubles the matrix, to be seen."""

    class Doubled:
        @staticmethod
        def from_dense(weight):
            return 2 * weight

    weight = randn(6, 8)
    made, x = SemiStructured.from_dense(weight, best_two_of_four(weight.abs())), randn(3, 8, seed=1)
    monkeypatch.setattr(SemiStructured, "_sparse_type", lambda self: Doubled)
    expected = x @ made.to_dense().T
    assert made.kernel == "semi-structured"
    torch.testing.assert_close(made(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(made(x), 2 * expected)
    made.requires_grad_(False)
    torch.testing.assert_close(made(x), 2 * expected)
    torch.testing.assert_close(made(x.requires_grad_()), expected)


def test_gradients_reach_the_kept_values():
    weight = randn(6, 8)
    mask = best_two_of_four(weight.abs())
    made, x = SemiStructured.from_dense(weight, mask), randn(3, 8, seed=1)
    made(x).square().sum().backward()
    dense = (weight * mask).requires_grad_()
    torch.testing.assert_close(
        made.values.grad, torch.autograd.grad((x @ dense.T).square().sum(), dense)[0][mask].view(6, 4)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_magnitude_and_wanda_keep_weights_as_they_are(shape):
    weight, covariance = problem(*shape)
    rms = covariance.diagonal().sqrt()
    for made, score in (
        (method("magnitude").function(weight), weight.abs()),
        (method("wanda").function(weight, rms), weight.abs() * rms),
    ):
        mask = best_two_of_four(score)[:, : shape[1]]
        assert torch.equal(made.to_dense(), weight * mask)
    same = method("wanda").function(weight, torch.full_like(rms, 3.0)).to_dense()
    assert torch.equal(same, method("magnitude").function(weight).to_dense())


def one_row_at_a_time(weight, covariance, damping):
    """SparseGPT as the paper derives it: an inverse Hessian of the columns that are left, for every row and column."""
    hessian = covariance + damping * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]
    result = weight.clone()
    for row in result:
        for j in range(len(row)):
            if j % 4 == 0:
                cost = [row[j + i] ** 2 / inverses[j + i][0, 0] for i in range(4)]
                removed = sorted(range(4), key=lambda i, cost=cost: cost[i])[:2]
            if j % 4 in removed:
                row[j:] -= row[j] / inverses[j][0, 0] * inverses[j][0]
                row[j] = 0
    return result


@pytest.mark.parametrize("shape", [(4, 8), (3, 24), (2, 136)])
def test_sparsegpt_is_the_papers_recursion(shape):
    weight, covariance = problem(*shape)
    made = method("sparsegpt").function(weight.clone(), covariance.clone(), damping=0.01)
    torch.testing.assert_close(made.to_dense(), one_row_at_a_time(weight, covariance, 0.01), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape", [(12, 32), (32, 64), (7, 45)])
def test_each_baseline_is_best_in_its_own_objective(shape):
    weight, covariance = problem(*shape)
    untouched = weight.clone(), covariance.clone()
    magnitude = method("magnitude").function(weight)
    wanda = method("wanda").function(weight, covariance.diagonal().sqrt())
    sparsegpt = method("sparsegpt").function(weight, covariance, damping=1e-6)
    for metric, best in (
        (torch.eye(shape[1]).double(), magnitude), (torch.diag(covariance.diagonal()), wanda), (covariance, sparsegpt),
    ):  # fmt: skip
        others = [output_error(weight, made, metric) for made in (magnitude, wanda, sparsegpt) if made is not best]
        assert output_error(weight, best, metric) < min(others)
    assert torch.equal(weight, untouched[0]) and torch.equal(covariance, untouched[1])


def test_sparsegpt_without_correlations_is_wanda_and_does_not_see_scales():
    weight, covariance = problem(6, 16)
    diagonal = torch.diag(covariance.diagonal())
    run = method("sparsegpt").function
    wanda = method("wanda").function(weight, (diagonal.diagonal() + 0.01 * diagonal.diagonal().mean()).sqrt())
    torch.testing.assert_close(run(weight, diagonal).to_dense(), wanda.to_dense())
    torch.testing.assert_close(run(weight, 1e4 * covariance).to_dense(), run(weight, covariance).to_dense())


def test_sparsegpt_survives_dead_and_duplicate_features():
    weight, covariance = problem(6, 16)
    covariance[3] = covariance[:, 3] = 0
    covariance[5], covariance[:, 5] = covariance[4], covariance[:, 4]
    made = method("sparsegpt").function(weight, covariance).to_dense()
    assert torch.isfinite(made).all() and (made[:, 3] == 0).all()
    assert torch.isfinite(method("sparsegpt").function(weight, torch.zeros_like(covariance)).to_dense()).all()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_is_compressed_within_its_budget(name):
    dense = tiny(name)
    whole = matrix_bytes(Anatomy(dense))
    labels = torch.where(DATA % 3 == 0, DATA, -100)
    data = [inputs(name, batch=4)] if name in ("vit", "deit") else DATA
    data = [{"input_ids": DATA, "labels": labels}] if name in ("bert", "roberta") else data
    for chosen in METHODS:
        model = transect.compress(copy.deepcopy(dense), chosen, keep=17 / 32, data=data)
        anatomy = Anatomy(model)
        assert matrix_bytes(anatomy) == 17 / 32 * whole
        assert all(isinstance(matrix.module, SemiStructured) for matrix in anatomy.matrices())
        assert torch.isfinite(logits(model, inputs(name))).all()


def test_a_larger_budget_leaves_matrices_dense_and_a_smaller_one_is_refused_before_any_work():
    dense = tiny("llama")
    whole = matrix_bytes(Anatomy(dense))
    model = transect.compress(copy.deepcopy(dense), "magnitude", keep=0.8)
    kinds = {type(matrix.module) for matrix in Anatomy(model).matrices()}
    assert len(kinds) == 2 and 0.7 * whole < matrix_bytes(Anatomy(model)) <= 0.8 * whole
    for chosen in METHODS:
        with pytest.raises(OutOfReach, match=r"2:4 sparsity stores at least 0\.5312 .* raise it"):
            transect.compress(dense, chosen, keep=0.5, data=DATA)
    with pytest.raises(TransectError, match="damping=0"):
        transect.compress(dense, "sparsegpt", keep=0.6, data=DATA, damping=0)
    assert matrix_bytes(Anatomy(dense)) == whole


@pytest.mark.parametrize("chosen", METHODS)
def test_a_model_gets_the_methods_own_matrices(chosen):
    model = transect.compress(tiny("llama"), chosen, keep=0.6, data=DATA)
    anatomy = Anatomy(tiny("llama"))
    statistics = collect(anatomy, [{"input_ids": DATA}], [InputCovariance(), FeatureNorm(power=2)])
    made = {matrix.name: matrix.weight for matrix in Anatomy(model).matrices()}
    for name in ("blocks.0.attention.q", "blocks.2.mlp.down"):
        matrix = next(matrix for matrix in anatomy.matrices() if matrix.name == name)
        needed = [statistics.value(key_of(matrix, one), one).double() for one in method(chosen).needs]
        expected = method(chosen).function(matrix.weight.double(), *needed).to_dense().float()
        torch.testing.assert_close(made[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", torch.float32), ("phi3", torch.bfloat16)])
def test_saved_loaded_cast_and_generating(name, dtype, tmp_path):
    keep = {torch.float32: 17 / 32, torch.bfloat16: 9 / 16}[dtype]
    model = transect.compress(tiny(name, dtype=dtype), "wanda", keep=keep, data=DATA)
    again = saved_and_loaded(model, name, tmp_path)
    assert (
        matrix_bytes(Anatomy(again))
        == matrix_bytes(Anatomy(model))
        == keep * matrix_bytes(Anatomy(tiny(name, dtype=dtype)))
    )
    cast = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(matrix.module.positions.dtype == torch.uint8 for matrix in Anatomy(cast).matrices())
    torch.testing.assert_close(
        logits(cast, inputs(name)).float(), logits(again.float(), inputs(name)), rtol=1e-3, atol=1e-4
    )
