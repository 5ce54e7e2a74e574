"""Monarch matrices: the operator, its closed-form projection, the layer to train, the method."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.claims import Verdict, run_claims
from transect.compression import method
from transect.data import Batches
from transect.errors import OutOfReach, TransectError
from transect.evaluation import matrix_bytes
from transect.layers import MonarchLinear
from transect.operators import build, flops_of, stored_bytes
from transect.operators.monarch import Monarch, monarch_dense, monarch_multiply, project_to_monarch

from .models import CAUSAL, CONFIGS, assert_alike, assert_same_model, inputs, tiny
from .test_claims import random_data
from .test_compress import data_for

# d_out, d_in, output blocks, input blocks, channels; the last three need padding
SHAPES = [
    (12, 20, 3, 4, 2),
    (20, 12, 4, 2, 3),
    (16, 16, 4, 4, 1),
    (13, 17, 3, 4, 2),
    (9, 20, 4, 4, 3),
    (20, 7, 5, 3, 1),
]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_monarch(d_out, d_in, outs, ins, channels, bias=False):
    operator = Monarch(d_in, d_out, ins, outs, channels, bias).double()
    with torch.no_grad():
        for seed, parameter in enumerate(operator.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    return operator


def entry_by_entry(operator):
    """The card's formula: W[(s, l), (k, p)] = Σ_c second[l, s, k rho + c] first[k, c L + l, p]."""
    first, second, rho = operator.first, operator.second, operator.channels
    (k_count, _, p_count), (l_count, s_count, _) = first.shape, second.shape
    dense = torch.zeros(s_count * l_count, k_count * p_count, dtype=first.dtype)
    for out in range(l_count):
        for s in range(s_count):
            for k in range(k_count):
                for p in range(p_count):
                    for c in range(rho):
                        dense[s * l_count + out, k * p_count + p] += (
                            second[out, s, k * rho + c] * first[k, c * l_count + out, p]
                        )
    return dense[: operator.out_features, : operator.in_features]


def discarded(weight, outs, ins, channels):
    """Σ of the pairs' discarded σ², pair by pair, from rows i mod outs and columns in contiguous blocks."""
    width, total = -(-weight.shape[1] // ins), 0.0
    for out in range(outs):
        for k in range(ins):
            pair = weight[out::outs, k * width : (k + 1) * width]
            if pair.numel():
                total += torch.linalg.svdvals(pair)[channels:].square().sum().item()
    return total


# The operator


@pytest.mark.parametrize("shape", SHAPES)
def test_the_dense_form_is_the_formula_and_the_forward_applies_it(shape):
    operator = random_monarch(*shape, bias=True)
    with torch.no_grad():
        torch.testing.assert_close(operator.to_dense(), entry_by_entry(operator))
    for batch in ((), (3,), (2, 4), (0,)):
        x = randn(*batch, shape[1], seed=9)
        torch.testing.assert_close(operator(x), linear(x, operator.to_dense(), operator.bias))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 11), st.integers(1, 11), st.data())
def test_any_shape_is_applied_sized_and_rebuilt(d_out, d_in, data):
    outs, ins = data.draw(st.integers(1, d_out)), data.draw(st.integers(1, d_in))
    s, p = -(-d_out // outs), -(-d_in // ins)
    channels = data.draw(st.integers(1, min(s, p)))
    operator = random_monarch(d_out, d_in, outs, ins, channels, bias=data.draw(st.booleans()))
    x = randn(5, d_in, seed=3)
    torch.testing.assert_close(operator(x), linear(x, operator.to_dense(), operator.bias))
    numbers = outs * channels * (ins * p) + ins * channels * (outs * s)
    assert operator.first.numel() + operator.second.numel() == numbers
    assert operator.flops == flops_of(operator) == 2 * numbers
    assert stored_bytes(operator) == 8 * (numbers + (0 if operator.bias is None else d_out))
    twin = build(operator.describe()).double()
    twin.load_state_dict(operator.state_dict())
    assert_alike(twin(x), operator(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_dense_form(shape):
    operator = random_monarch(*shape, bias=True)
    x, target = randn(6, shape[1], seed=4), randn(6, shape[0], seed=5)
    through = [torch.autograd.grad((make(x) - target).square().sum(), list(operator.parameters())) for make in (
        operator, lambda x: linear(x, operator.to_dense(), operator.bias)
    )]  # fmt: skip
    torch.testing.assert_close(*through)


def test_it_works_under_autocast_compile_and_copy():
    operator = random_monarch(13, 17, 3, 4, 2, bias=True).float()
    x = randn(3, 17).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(operator, backend="aot_eager", fullgraph=True)(x), operator(x))
    assert_alike(copy.deepcopy(operator)(x), operator(x))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((8, 6, 9, 2, 1), "cannot have"), ((8, 6, 2, 7, 1), "cannot have"), ((8, 6, 0, 2, 1), "cannot have"),
     ((8, 6, 2, 2, 4), "from 1 to 3"), ((8, 6, 2, 2, 0), "from 1 to 3")],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(TransectError, match=message):
        Monarch(*sizes, bias=False)


# The projection


@pytest.mark.parametrize("shape", SHAPES)
def test_projecting_a_monarch_matrix_returns_it(shape):
    operator = random_monarch(*shape)
    again = Monarch.from_dense(operator.to_dense(), shape[3], shape[2], shape[4])
    torch.testing.assert_close(again.to_dense(), operator.to_dense(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_discarded_spectrum_and_stationary(shape):
    d_out, d_in, outs, ins, channels = shape
    weight = randn(d_out, d_in)
    operator = Monarch.from_dense(weight, ins, outs, channels)
    error = (weight - operator.to_dense()).square().sum()
    assert error.item() == pytest.approx(discarded(weight, outs, ins, channels), rel=1e-9, abs=1e-18)
    for gradient in torch.autograd.grad(error, list(operator.parameters())):
        assert gradient.abs().max() < 1e-9


def test_descent_from_random_starts_does_not_find_better():
    weight = randn(12, 12)
    best = discarded(weight, 3, 3, 1)
    first, second = randn(20, 3, 3, 4, seed=1).requires_grad_(), randn(20, 3, 4, 3, seed=2).requires_grad_()
    optimizer = torch.optim.Adam([first, second], lr=0.03)
    for _ in range(600):
        errors = (weight - torch.func.vmap(monarch_dense)(first, second)).square().sum((1, 2))
        optimizer.zero_grad()
        errors.sum().backward()
        optimizer.step()
    assert errors.min() >= best * (1 - 1e-9)
    assert errors.min().item() == pytest.approx(best, rel=1e-3)  # so the descent is able to find the optimum


@pytest.mark.parametrize("shape", SHAPES)
def test_all_channels_are_exact(shape):
    d_out, d_in, outs, ins, _ = shape
    weight = randn(d_out, d_in)
    full = min(-(-d_out // outs), -(-d_in // ins))
    torch.testing.assert_close(Monarch.from_dense(weight, ins, outs, full).to_dense(), weight, rtol=0, atol=1e-10)


def test_one_block_is_plain_svd_and_square_blocks_are_the_base_form():
    weight = randn(14, 9)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    expected = u[:, :4] * s[:4] @ vh[:4]
    torch.testing.assert_close(Monarch.from_dense(weight, 1, 1, 4).to_dense(), expected)
    m = 4
    base = random_monarch(m * m, m * m, m, m, 1)
    assert base.first.numel() + base.second.numel() == 2 * (m * m) * m
    shuffle = (
        torch.eye(m * m).double().view(m, m, m * m).transpose(0, 1).reshape(m * m, m * m)
    )  # x as m x m, transposed
    inner, outer = torch.block_diag(*base.first), torch.block_diag(*base.second)
    torch.testing.assert_close(base.to_dense(), shuffle @ outer @ shuffle.T @ inner)  # P L Pᵀ R


def test_the_fourier_transform_is_a_monarch_matrix_after_transposing_its_input():
    m = 8
    n = m * m
    steps = torch.arange(n, dtype=torch.float64)
    fourier = torch.exp(-2j * torch.pi * steps[:, None] * steps / n)
    order = torch.arange(n).view(m, m).T.flatten()
    first, second = project_to_monarch(fourier[:, order], m, m, 1)
    dense = monarch_dense(first, second)
    assert (dense - fourier[:, order]).abs().max() < 1e-6
    x = torch.complex(randn(3, n), randn(3, n, seed=1))
    torch.testing.assert_close(monarch_multiply(first, second, x[:, order]), torch.fft.fft(x))
    plain = monarch_dense(*project_to_monarch(fourier, m, m, 1))
    assert (plain - fourier).norm() / fourier.norm() > 0.3


# The layer to train


@pytest.mark.parametrize(("d_in", "d_out"), [(32, 32), (32, 48), (30, 17)])
def test_the_layer_has_the_papers_size_and_initialisation(d_in, d_out):
    torch.manual_seed(0)
    layer = MonarchLinear(d_in, d_out)
    assert layer.channels == -(-min(d_in, d_out) // 4) // 4
    for factor in (layer.first, layer.second):
        bound = factor.shape[-1] ** -0.5
        assert factor.abs().max() <= bound and factor.abs().max() > 0.9 * bound and factor.mean().abs() < 0.1 * bound
    assert layer.bias.abs().max() <= d_out**-0.5
    assert layer(torch.randn(5, d_in)).shape == (5, d_out)
    if d_in == d_out:
        assert layer.first.numel() + layer.second.numel() == d_in * d_out / 2
    assert MonarchLinear(d_in, d_out, False, channels=2, dtype=torch.float64).first.dtype == torch.float64


def test_dense_and_back_is_the_same_function():
    torch.manual_seed(0)
    layer = MonarchLinear(30, 17).double()
    x = randn(4, 30)
    dense = layer.to_linear()
    assert type(dense) is torch.nn.Linear
    torch.testing.assert_close(dense(x), layer(x))
    again = MonarchLinear.from_linear(dense)
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=1e-9)
    full = torch.nn.Linear(12, 8, bias=False).double()
    torch.testing.assert_close(MonarchLinear.from_linear(full, channels=2)(x[:, :12]), full(x[:, :12]))


def test_it_learns_a_monarch_matrix_and_a_model_with_it_is_saved(tmp_path):
    torch.manual_seed(0)
    model = tiny("llama")
    for block in Anatomy(model).blocks:
        d_out, d_in = block.mlp.up.shape
        block.mlp.up.replace(MonarchLinear(d_in, d_out, bias=False))
    batch = inputs("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    model.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert_same_model(again, model, batch)
    assert isinstance(Anatomy(again).blocks[0].mlp.up.module, Monarch)


# The method


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_is_compressed_saved_and_loaded(name, tmp_path):
    dense, batch = tiny(name), inputs(name)
    model = transect.compress(copy.deepcopy(dense), "monarch", keep=0.6)
    anatomy = Anatomy(model)
    assert 0.4 * matrix_bytes(Anatomy(dense)) < matrix_bytes(anatomy) <= 0.6 * matrix_bytes(Anatomy(dense))
    replaced = sum(isinstance(matrix.module, Monarch) for matrix in anatomy.matrices())
    # What whole channels leave over pays for a dense matrix now and then.
    assert replaced > 0.5 * len(anatomy.matrices())
    again = CONFIGS[name][1].from_pretrained(model.save_pretrained(tmp_path / "small") or tmp_path / "small")
    assert_same_model(again, model, batch)
    if name in CAUSAL:
        chosen = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        ids = batch["input_ids"]
        assert torch.equal(again.generate(ids, **chosen), model.generate(ids, **chosen, use_cache=False))


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (33, 50)])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_planned_size_is_the_largest_that_fits_and_is_what_is_stored(shape, blocks):
    chosen = method("monarch")
    size = chosen.plan(shape, 8, 0.7, blocks=blocks)
    assert size.bytes <= 0.7 * 8 * shape[0] * shape[1]
    operator = chosen.function(randn(*shape), **size.chosen, blocks=blocks)
    assert stored_bytes(operator) == size.bytes
    a_channel = size.bytes // size.chosen["channels"]
    assert size.bytes + a_channel > 0.7 * 8 * shape[0] * shape[1]


def test_one_block_is_the_method_svd():
    chosen, weight = method("monarch"), randn(20, 14)
    size = chosen.plan((20, 14), 4, 0.6, blocks=1)
    left, right = method("svd").function(weight).truncate(int(0.6 * 20 * 14 / 34))
    assert size.bytes == 4 * (left.numel() + right.numel())
    torch.testing.assert_close(chosen.function(weight, **size.chosen, blocks=1).to_dense(), left @ right)


def test_what_is_out_of_reach_is_refused_before_any_work():
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for keep, blocks, error, message in (
        (0.1, 4, OutOfReach, "blocks.0.attention.q.*leaves no channel"), (0.5, 40, TransectError, "cannot have"),
        (0.5, 0, TransectError, "blocks=0"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            transect.compress(model, "monarch", keep, blocks=blocks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# The claims


def test_the_trained_mlps_are_of_one_size_and_repeatable(monkeypatch):
    monkeypatch.setattr("transect.claims.catalog.monarch.STEPS", 3)
    for name in ("llama", "gpt2"):  # what is trained is small and new, whichever model is asked about
        model = tiny(name)
        once, again = (run_claims(model, *random_data(model), ["monarch/trained-mlp"])[0].result for _ in range(2))
        assert once == again and once.verdict in (Verdict.HOLDS, Verdict.DOES_NOT_HOLD)
        assert [row["monarch_kept"] == row["low_rank_kept"] < 0.6 for row in once.numbers] == [True, True]
    masked = tiny("bert")
    batches = Batches(data_for("bert"))
    (outcome,) = run_claims(masked, batches, batches, ["monarch/trained-mlp"])
    assert outcome.result.verdict == Verdict.NOT_APPLICABLE
