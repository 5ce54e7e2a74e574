"""ARMOR: the "must hold" items of its card, and its operator. Item 10 is a claim."""

import copy
import itertools

import pytest
import torch

import transect
from transect.anatomy import Anatomy
from transect.anatomy.storage import weight_tensors
from transect.compression import method
from transect.compression.catalog.armor import Wrapping, armor_size, best_pair
from transect.compression.two_four import best_two_of_four, normalized, usable
from transect.errors import OutOfReach, TransectError
from transect.evaluation import matrix_bytes
from transect.operators import build
from transect.operators.block_diagonal import WrappedSparse

from .models import CONFIGS, VOCABULARY, assert_alike, inputs, logits, saved_and_loaded, tiny

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
QUICK = 2  # rounds
SHAPES = [(24, 32, 6, 8), (12, 20, 12, 4), (15, 24, 5, 12), (8, 8, 8, 8), (6, 16, 1, 4)]  # d_out, d_in, blocks


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(d_out, d_in):
    weight = randn(d_out, d_in) * torch.linspace(0.2, 3, d_in).double()
    return weight, torch.linspace(3, 0.1, d_in).double()[
        torch.randperm(d_in, generator=torch.Generator().manual_seed(1))
    ]


def start(d_out, d_in, p, q, shaken=0.0):
    """The optimisation's start, or a point around it; W̄ and h beside it."""
    weight, rms = problem(d_out, d_in)
    target, importance = normalized(weight)[0], usable(rms.square())
    fit = Wrapping(target, importance, p, q)
    if shaken:
        fit.a += shaken * randn(*fit.a.shape, seed=3)
        fit.b += shaken * randn(*fit.b.shape, seed=4)
        fit.multiply()
    return fit, target, importance


def parts(fit):
    """A, C and B as dense matrices."""
    return torch.block_diag(*fit.a), fit.c.transpose(0, 1).flatten(1), torch.block_diag(*fit.b)


def dense_loss(a, c, b, target, importance):
    return ((a @ c @ b - target).square() * importance).sum() / (target.square() * importance).sum()


def test_normalisation_is_columns_then_rows_and_folds_back():
    weight, _ = problem(7, 12)
    bar, rows, columns = normalized(weight)
    torch.testing.assert_close(rows[:, None] * bar * columns, weight)
    torch.testing.assert_close(columns, weight.norm(dim=0) + 1e-5)
    torch.testing.assert_close(bar.norm(dim=1), torch.ones(7).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_1_it_starts_at_nowag_p(shape):
    fit, target, importance = start(*shape)
    cost = target.square() * importance
    mask = best_two_of_four(cost)
    assert fit.loss() == pytest.approx((cost * ~mask).sum().item() / cost.sum().item(), rel=1e-12)
    weight, rms = problem(*shape[:2])
    made = method("armor").function(weight, rms, output_block=shape[2], input_block=shape[3], rounds=0)
    torch.testing.assert_close(
        made.to_dense(), method("nowag-p").function(weight, rms).to_dense().float(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradients_are_those_of_the_dense_loss(shape):
    fit, target, importance = start(*shape, shaken=0.2)
    leaves = [part.clone().requires_grad_() for part in (fit.a, fit.b, fit.c)]
    dense = torch.block_diag(*leaves[0]), leaves[2].transpose(0, 1).flatten(1), torch.block_diag(*leaves[1])
    loss = dense_loss(*dense, target, importance)
    loss.backward()
    assert fit.loss() == pytest.approx(loss.item(), rel=1e-12)
    for leaf, gradient in zip(leaves, fit.gradients(), strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


def test_the_best_pair_is_the_best_of_all_supports_and_values():
    rows, seen = randn(5, 4, 9), randn(5, 9, 3)
    a, error = randn(5, 3, seed=7), seen.transpose(1, 2)  # error: (5, 3, 9)
    gram, toward = rows @ rows.transpose(1, 2), torch.einsum("igq,ipq,ip->ig", rows, error, a)
    made, support = best_pair(gram, toward, a.square().sum(1, keepdim=True))

    def loss(i, values):
        return (error[i] + torch.outer(a[i], values @ rows[i])).square().sum()

    for i in range(5):
        tried = []
        for pair in torch.combinations(torch.arange(4)):
            columns = torch.stack([torch.outer(a[i], rows[i, g]).flatten() for g in pair], dim=1)
            values = torch.zeros(4).double()
            values[pair] = torch.linalg.lstsq(columns, -error[i].flatten()[:, None]).solution[:, 0]
            tried.append((loss(i, values).item(), values))
        least, values = min(tried, key=lambda one: one[0])
        assert loss(i, made[i]).item() == pytest.approx(least, rel=1e-7)
        torch.testing.assert_close(made[i], values, rtol=1e-6, atol=1e-7)
        assert support[i].sum() == 2 and (made[i][~support[i]] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_2_and_3_a_core_step_never_raises_the_loss_and_keeps_two_of_four(shape):
    fit, target, importance = start(*shape, shaken=0.2)
    before, first, changed = fit.loss(), fit.loss(), fit.mask.clone()
    for _ in range(40):
        fit.core_step(fit.gradients()[2])
        loss = dense_loss(*parts(fit), target, importance).item()
        assert loss <= before * (1 + 1e-12) and loss == pytest.approx(fit.loss(), rel=1e-9)
        assert (fit.mask.unflatten(2, (-1, 4)).sum(-1) == 2).all() and (fit.c[~fit.mask] == 0).all()
        before = loss
    assert before < first and not torch.equal(changed, fit.mask)
    cb = fit.cb.clone()
    fit.multiply()
    torch.testing.assert_close(cb, fit.cb)


@pytest.mark.parametrize("shape", SHAPES)
def test_4_identities_are_a_fixed_point_of_the_core_step(shape):
    fit, _, _ = start(*shape)
    values, mask = fit.c.clone(), fit.mask.clone()
    for _ in range(20):
        fit.core_step(torch.ones_like(fit.c))  # any group
    assert torch.equal(fit.mask, mask)
    torch.testing.assert_close(fit.c, values, rtol=1e-6, atol=1e-9)


def fitted(shape, rounds=50):
    weight, rms = problem(*shape[:2])
    bar, scale = normalized(weight)[0], usable(rms.square())
    fit = Wrapping(bar, scale, *shape[2:])
    begin = fit.loss()
    a, c, mask, b = fit.run(rounds, 3e-3)
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() and (c[~mask] == 0).all()
    return begin, dense_loss(torch.block_diag(*a), c, torch.block_diag(*b), bar, scale).item()


def test_5_and_8_blocks_of_1_change_nothing_and_larger_ones_end_lower():
    """Rows and columns cannot be rescaled to any use: the start is stationary for that already."""
    begin, rescaled = fitted((16, 32, 1, 1))
    _, middle = fitted((16, 32, 4, 8))
    _, whole = fitted((16, 32, 16, 32))
    assert rescaled == pytest.approx(begin, rel=1e-9) and middle < 0.6 * begin and whole < 0.2 * middle


def test_blocks_that_split_a_group_stay_apart_and_the_best_of_all_rounds_is_returned():
    fit, target, importance = start(16, 32, 4, 2)
    losses, loss = [], fit.loss
    fit.loss = lambda: losses.append(loss()) or losses[-1]
    a, c, _, b = fit.run(30, 3e-3)
    assert b.shape == (16, 2, 2) and len(losses) == 31
    final = dense_loss(torch.block_diag(*a), c, torch.block_diag(*b), target, importance).item()
    assert final == pytest.approx(min(losses), rel=1e-9) and final < losses[0]


@pytest.mark.parametrize("rate", [0.5, 3e-3])
def test_8_the_best_iterate_is_kept_even_if_steps_are_too_large(rate):
    weight, rms = problem(24, 32)
    fit = Wrapping(normalized(weight)[0], usable(rms.square()), 8, 8)
    begin = fit.loss()
    a, c, _, b = fit.run(20, rate)
    final = dense_loss(torch.block_diag(*a), c, torch.block_diag(*b), fit.target, fit.importance).item()
    assert final <= begin * (1 + 1e-12)
    assert rate < 0.1 or fit.loss() > begin  # the last iterate of the large steps is worse than the start


def test_it_stops_when_nothing_moves_any_more():
    fit, _, _ = start(24, 32, 8, 8)
    steps = []
    fit.core_step = lambda gradient: steps.append(1)
    fit.run(1000, 0.0)
    assert len(steps) == 100


@pytest.mark.parametrize("shape", [(24, 32, 6, 8), (7, 13, 7, 16), (10, 6, 5, 4)])
def test_6_unfolded_forward_is_the_dense_product(shape):
    d_out, d_in, p, q = shape
    weight, rms = problem(d_out, d_in)
    made = method("armor").function(weight, rms, output_block=p, input_block=q, rounds=30).double()
    made.set_bias(randn(d_out))
    a, b = torch.block_diag(*made.left.blocks), torch.block_diag(*made.right.blocks)
    dense = (a @ made.core.to_dense() @ b)[:, :d_in]
    torch.testing.assert_close(made.to_dense(), dense)
    x = randn(2, 3, d_in, seed=9)
    torch.testing.assert_close(made(x), x @ dense.T + made.bias, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(made(x), x @ dense.T + made.bias, rtol=1e-10, atol=1e-10)
    again = build(made.describe()).double()
    again.load_state_dict(made.state_dict())
    assert_alike(again(x), made(x))
    assert made.kernel == "dense"


def test_the_operator_works_under_autocast_compile_and_autograd():
    weight, rms = problem(10, 14)
    made = method("armor").function(weight, rms, output_block=5, input_block=8, rounds=1)
    made.set_bias(torch.ones(10))
    x = randn(3, 14).float()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x))
        made.core.values.mul_(2)
        torch.testing.assert_close(compiled(x), made(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert made.left(made.core(made.right(torch.randn(3, 16)))).dtype == torch.bfloat16
    made(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_6_the_fold_gives_the_weight_back_as_the_fit_had_it():
    weight, rms = problem(24, 32)
    made = method("armor").function(weight, rms, output_block=8, input_block=8, rounds=60)
    bar, rows, columns = normalized(weight.float())
    fit = Wrapping(bar, usable(rms.square()).float(), 8, 8)
    a, c, _, b = fit.run(60, method("armor").settings({})["learning_rate"])
    expected = rows[:, None] * (torch.block_diag(*a) @ c @ torch.block_diag(*b)) * columns
    torch.testing.assert_close(made.to_dense(), expected, rtol=1e-4, atol=1e-5)


def test_7_equal_importance_is_frobenius_and_its_scale_does_not_matter():
    weight, rms = problem(16, 32)
    chosen = dict(output_block=8, input_block=8, rounds=40)
    run = method("armor").function
    torch.testing.assert_close(run(weight, 100 * rms, **chosen).to_dense(), run(weight, rms, **chosen).to_dense())
    bar = normalized(weight)[0]
    fit = Wrapping(bar, usable(torch.full_like(rms, 7.0)), 8, 8)
    fit.a += 0.1 * randn(*fit.a.shape)
    fit.multiply()
    a, c, b = parts(fit)
    assert fit.loss() == pytest.approx(((a @ c @ b - bar).norm() / bar.norm()).item() ** 2, rel=1e-12)


def test_features_and_rows_without_information():
    weight, rms = problem(16, 32)
    chosen = dict(output_block=8, input_block=8, rounds=20)
    run = method("armor").function
    odd = rms.clone()
    odd[3], odd[7] = 0, float("nan")
    assert torch.equal(usable(odd)[[3, 7]], torch.ones(2).double()) and torch.isfinite(usable(odd)).all()
    assert torch.isfinite(run(weight, odd, **chosen).to_dense()).all()
    assert torch.isfinite(run(weight, torch.zeros_like(rms), **chosen).to_dense()).all()
    weight[2] = 0
    weight[:, 5] = 0
    made = run(weight, rms, **chosen).to_dense()
    assert torch.isfinite(made).all() and made[2].abs().max() < 1e-3 and made[:, 5].abs().max() < 1e-3
    assert (run(torch.zeros_like(weight), rms, **chosen).to_dense() == 0).all()


def test_the_same_seed_gives_the_same_matrix_and_leaves_the_global_one_alone():
    weight, rms = problem(16, 32)
    run, chosen = method("armor").function, dict(output_block=8, input_block=8, rounds=20)
    state = torch.get_rng_state()
    first, again = run(weight, rms, **chosen).to_dense(), run(weight, rms, **chosen).to_dense()
    other = run(weight, rms, seed=1, **chosen).to_dense()
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("d_out", "d_in"), [(32, 48), (704, 256), (7, 13), (33, 32), (10, 6)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_9_its_size_is_what_it_stores_and_the_largest_that_fits(d_out, d_in, itemsize):
    dense = d_out * d_in * itemsize
    sizes = []
    for keep in (2.0, 0.95, 0.8, 0.7):
        try:
            sizes.append(armor_size((d_out, d_in), itemsize, keep, block=128))
        except OutOfReach:
            continue
        p, q = sizes[-1].chosen["output_block"], sizes[-1].chosen["input_block"]
        padded = 4 * -(-d_in // 4)
        assert d_out % p == 0 and padded % q == 0 and (q % 4 == 0 or q in (1, 2)) and max(p, q) <= 128
        assert sizes[-1].bytes <= keep * dense
        made = WrappedSparse(d_in, d_out, p, q, False).to({2: torch.bfloat16, 4: torch.float32}[itemsize])
        assert sum(tensor.numel() * tensor.element_size() for tensor in weight_tensors(made)) == sizes[-1].bytes
        numbers = sum(parameter.numel() for parameter in made.parameters())
        assert numbers == d_out * padded // 2 + d_out * p + padded * q
        assert made.flops == 2 * numbers
    assert sizes and all(one.bytes >= other.bytes for one, other in itertools.pairwise(sizes))
    assert max(armor_size((d_out, d_in), itemsize, 3.0, block=4).chosen.values()) <= 4


def test_a_budget_below_the_smallest_blocks_is_refused_before_any_work():
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OutOfReach, match=r"blocks\.0\.attention\.k: ARMOR stores at least 0\.6250 of a 16 x 32"):
        transect.compress(model, "armor", keep=0.61, data=DATA)
    with pytest.raises(TransectError, match="block=0"):
        transect.compress(model, "armor", keep=0.9, data=DATA, block=0)
    with pytest.raises(TransectError, match="needs calibration"):
        transect.compress(model, "armor", keep=0.9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_is_compressed_within_its_budget(name):
    dense = tiny(name)
    whole = matrix_bytes(Anatomy(dense))
    labels = torch.where(DATA % 3 == 0, DATA, -100)
    data = [inputs(name, batch=4)] if name in ("vit", "deit") else DATA
    data = [{"input_ids": DATA, "labels": labels}] if name in ("bert", "roberta") else data
    model = transect.compress(copy.deepcopy(dense), "armor", keep=0.9, data=data, rounds=QUICK)
    anatomy = Anatomy(model)
    assert 0.8 * whole < matrix_bytes(anatomy) <= 0.9 * whole
    assert sum(isinstance(matrix.module, WrappedSparse) for matrix in anatomy.matrices()) > 6
    assert torch.isfinite(logits(model, inputs(name))).all()


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", torch.float32), ("gpt_neox", torch.bfloat16)])
def test_saved_loaded_and_generating(name, dtype, tmp_path):
    model = transect.compress(tiny(name, dtype=dtype), "armor", keep=0.9, data=DATA, rounds=QUICK)
    saved_and_loaded(model, name, tmp_path)


def test_block_by_block_calibration_runs():
    model = transect.compress(tiny("llama"), "armor", keep=0.9, data=DATA, sequential=True, rounds=QUICK)
    assert any(isinstance(matrix.module, WrappedSparse) for matrix in Anatomy(model).matrices())
