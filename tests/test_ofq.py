"""OFQ: the quantizers and their gradients, annealing, the probe, merged queries and keys, and what is stored."""

import pytest
import torch
from torch import nn

import transect
from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.evaluation import parameters
from transect.operators import build, stored_bytes
from transect.operators.grouped_integer import GroupedInteger, grouped_integer_bytes
from transect.operators.mid_rise import MidRise
from transect.operators.rounded_input import RoundedInput
from transect.training import Parametrized
from transect.training.parametrizations.ofq import (
    FewBits,
    Oscillation,
    from_boundary,
    lsq,
    lsq_ends,
    lsq_start,
    merged,
    ofq,
    quantized_merged,
    scores,
    statistic,
    stats_positions,
    statsq,
)

from .models import VOCABULARY, assert_alike, tiny

DATA = torch.randint(3, VOCABULARY, (20, 12), generator=torch.Generator().manual_seed(5))


def matrix(d_out=6, d_in=64, dtype=torch.float64):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


# StatsQ


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_has_2_to_the_bits_levels_symmetric_and_without_zero(bits, dtype):
    weight, n = matrix(3, 4096, dtype), 2 ** (bits - 1)
    for row, s in zip(statsq(weight, bits), statistic(weight)[:, 0], strict=True):
        levels = row.unique()
        expected = s * torch.arange(-2 * n + 1, 2 * n, 2).to(s) / (2 * n)
        torch.testing.assert_close(levels, expected, rtol=1e-6, atol=0)
    quarters = statsq(weight, 2) / statistic(weight)
    torch.testing.assert_close(
        quarters.round(decimals=5).unique(), torch.tensor([-0.75, -0.25, 0.25, 0.75]).to(quarters)
    )


def test_it_goes_with_the_weights_size_and_is_not_idempotent():
    weight = matrix()
    once = statsq(weight, 2)
    torch.testing.assert_close(statsq(3.7 * weight, 2), 3.7 * once, rtol=1e-12, atol=0)
    assert not torch.allclose(statsq(once, 2), once)


def test_the_ends_are_no_levels_more():
    """At the lower end the rounding meets a tie, of an odd number of halves; beyond either end nothing changes."""
    for bits in (2, 3, 4, 8):
        n = 2 ** (bits - 1)
        z = stats_positions(torch.tensor([[-5.0, -1.0, 1.0, 5.0]]), torch.ones(1, 1), bits)
        assert z.round().tolist() == [[-n, -n, n - 1, n - 1]]


def test_the_statistic_moves_by_two_over_the_width_and_has_no_gradient():
    weight = matrix().requires_grad_()
    changed = weight.detach().clone()
    changed[2, 5] += changed[2, 5].sign() * 0.3
    difference = statistic(changed) - statistic(weight)
    expected = torch.zeros(6, 1, dtype=torch.float64)
    expected[2] = 2 * 0.3 / 64
    torch.testing.assert_close(difference, expected, atol=1e-12, rtol=0)
    assert not statistic(weight).requires_grad
    names = [name for name, _ in FewBits(weight.detach(), None, 2, "statsq", 0, 0.1, 0.005, False).named_parameters()]
    assert names == ["values"]


def test_the_gradient_is_that_of_what_is_used_clamped_or_not():
    weight, x = matrix(), torch.randn(5, 64, dtype=torch.float64)
    one = made(weight, bits=2)
    used = one.weight.detach().requires_grad_()
    assert (one.values.abs() > statistic(one.values)).any()
    assert torch.equal(used, statsq(weight, 2))
    one(x).square().sum().backward()
    nn.functional.linear(x, used).square().sum().backward()
    assert torch.equal(one.values.grad, used.grad)


def test_a_row_of_zeros_and_what_is_not_finite():
    weight = matrix()
    weight[3] = 0
    assert torch.isfinite(statsq(weight, 4)).all() and statsq(weight, 4)[3].abs().max() < 1e-20
    weight[1, 1] = float("inf")
    with pytest.raises(TransectError, match="not finite"):
        made(weight)
    with pytest.raises(TransectError, match="leaves no level above zero"):
        made(matrix(), activation_bits=1)
    with pytest.raises(TransectError, match="must be one of"):
        Parametrized(Anatomy(tiny("llama")), "ofq", {"bits": 1})


@pytest.mark.parametrize(("bits", "error"), [(2, 0.137), (3, 0.070), (4, 0.049)])
def test_the_error_on_gaussian_weights_is_what_it_is(bits, error):
    weight = matrix(4, 50_000)
    assert float((statsq(weight, bits) - weight).square().mean()) == pytest.approx(error, abs=0.002)


# LSQ


@pytest.mark.parametrize("signed", [True, False])
def test_lsq_is_on_its_grid_and_its_gradients_are_those_of_the_formula(signed):
    x = matrix() if signed else matrix().abs()
    x.requires_grad_()
    low, high = lsq_ends(3, signed)
    assert (low, high) == ((-4, 3) if signed else (0, 7))
    step = lsq_start(x.detach().abs().mean(), 3, signed).requires_grad_()
    assert float(step.detach()) == pytest.approx((2 if signed else 4) * float(x.detach().abs().mean()) / high**0.5)
    step = (0.4 * step.detach()).requires_grad_()  # so that some are clamped
    made, g = lsq(x, step, low, high), torch.randn(6, 64, dtype=torch.float64)
    levels = made.detach() / step.detach()
    torch.testing.assert_close(levels, levels.round())
    assert levels.min() >= low and levels.max() == high
    (made * g).sum().backward()
    v = (x / step).detach()
    inside = (v >= low) & (v <= high)
    assert not inside.all()
    assert torch.equal(x.grad, g * inside)
    slope = sum(
        float(g[i, j]) * (float(v[i, j].round() - v[i, j]) if inside[i, j] else (low if v[i, j] < low else high))
        for i in range(6)
        for j in range(64)
    )
    assert float(step.grad) == pytest.approx(slope / (high * 6 * 64) ** 0.5, rel=1e-9)


def test_a_step_never_gets_too_small_and_rows_have_their_own():
    x = matrix()
    tiny_step = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    found = lsq(x, tiny_step, -2, 1)
    torch.testing.assert_close(found.abs().max(), torch.tensor(2e-5, dtype=torch.float64))
    found.sum().backward()
    assert tiny_step.grad != 0
    steps = torch.rand(6, 1, dtype=torch.float64, requires_grad=True)
    lsq(x, steps, -2, 1).sum().backward()
    alone = steps.detach()[2:3].requires_grad_()
    lsq(x[2:3], alone, -2, 1).sum().backward()
    torch.testing.assert_close(steps.grad[2:3], alone.grad)


# Annealing


def made(weight, bias=None, **options):
    return ofq(weight, bias, **options)


@pytest.mark.parametrize("weights", ["statsq", "lsq"])
def test_confident_weights_do_not_move_whatever_the_optimizer_does(weights):
    weight = matrix()
    one = made(weight, bits=3, weights=weights, annealing=0.5, boundary=0.1)
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.02, weight_decay=0.5)
    for step in range(1, 9):
        free, before = ~one.confident(), one.values.detach().clone()
        assert 0 < free.sum() < free.numel()
        annealing = step > 4
        assert bool(one.held.numel()) == annealing
        optimizer.zero_grad()
        (one.weight * matrix().flip(0)).sum().backward()
        assert torch.equal(one.values.grad != 0, free if annealing else torch.ones_like(free)) or weights == "lsq"
        optimizer.step()  # momentum and decay move all
        assert (one.values != before).all()
        one.after_step(step / 8)
        moved = one.values != before
        assert torch.equal(moved, free) if annealing else moved.all()


@pytest.mark.parametrize(("boundary", "moves"), [(1.0, True), (0.0, False)])
def test_with_a_wide_boundary_all_move_and_with_none_no_weight(boundary, moves):
    one = made(matrix(), bits=2, annealing=1.0, boundary=boundary)
    one.after_step(0.0)
    before = one.values.detach().clone()
    with torch.no_grad():
        one.values += 0.1
    one.after_step(0.1)
    assert torch.equal(one.values != before, torch.full_like(before, moves, dtype=torch.bool))


def test_the_distance_is_to_the_nearest_boundary_between_two_levels():
    positions = torch.linspace(-4.5, 3.4999, 1001, dtype=torch.float64)
    boundaries = torch.arange(-4, 3) + 0.5
    expected = (positions[:, None] - boundaries).abs().min(1).values
    torch.testing.assert_close(from_boundary(positions, 3), expected)


# The probe


def test_the_probe_tells_a_turn_from_a_move():
    codes = torch.zeros(4, dtype=torch.uint8)
    probe = Oscillation(codes)
    for step in range(1, 601):
        codes = torch.tensor([3, step % 2, min(step, 200), 5 * (step % 4 // 2)], dtype=torch.uint8)
        probe.see(codes)
    still, every, rising, second = probe.frequency.tolist()
    assert still == rising == 0  # one jump, and one way
    assert every == pytest.approx(1, abs=0.01)  # alternates at every step
    assert second == pytest.approx(0.5, abs=0.01)  # at every second one
    assert probe.oscillating() == 2


def test_adapt_tells_how_many_oscillate():
    options = dict(lr=2e-2, epochs=2, batch_size=4, device="cpu", steps=6, weights="lsq", annealing=0.0)
    told = transect.adapt(tiny("llama"), "ofq", DATA, bits=2, probe=True, **options).outcome["told"]
    ((words, share),) = told.items()
    assert "turn back in more than 2%" in words and 0 <= share <= 1
    assert Parametrized(Anatomy(tiny("llama")), "ofq").told() == {}


# Queries and keys as one matrix


def test_merged_queries_and_keys_give_the_same_scores():
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(12, 16, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    x = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    whole = merged(query, key, 3)
    q, k = ((x @ weight.T).unflatten(-1, (3, 4)).transpose(1, 2) for weight in (query, key))
    torch.testing.assert_close(scores(x, whole), q @ k.mT, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(whole).tolist() == [4, 4, 4]
    few = quantized_merged(query, key, 3, 2)
    assert few.shape == (3, 16, 16) and all(len(row.unique()) <= 4 for row in few.flatten(0, 1))
    g = torch.randn(3, 16, 16, generator=generator, dtype=torch.float64)
    by_few = torch.autograd.grad((few * g).sum(), (query, key))
    by_whole = torch.autograd.grad((whole * g).sum(), (query, key))
    for ours, theirs in zip(by_few, by_whole, strict=True):  # the rounding is passed
        torch.testing.assert_close(ours, theirs)
    annealed = quantized_merged(query, key, 3, 2, boundary=0.0)
    assert torch.equal(annealed, few)
    assert not any(g.any() for g in torch.autograd.grad((annealed * g).sum(), (query, key)))


# What is stored


@pytest.mark.parametrize("weights", ["statsq", "lsq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_what_was_trained_in_so_many_bits(weights, bits, dtype):
    one = made(matrix(6, 40, dtype), bits=bits, weights=weights).eval()
    stored = one.finished()
    assert isinstance(stored, MidRise) == (weights == "statsq") and isinstance(stored, GroupedInteger)
    assert stored_bytes(stored) == grouped_integer_bytes(6, 40, bits, 40, True, dtype.itemsize)
    exact = stored.double().to_dense().float()  # the product of integer and scale, not rounded again
    torch.testing.assert_close(exact, one.weight.detach().float(), rtol=1e-6, atol=0)


def test_levels_around_zero_are_rebuilt_selected_and_computed_by_the_kernel():
    codes = torch.arange(16).repeat(16, 4).to(torch.uint8)
    scale = torch.linspace(0.5, 2, 16)[:, None]
    one = MidRise.from_codes(codes, scale, None, 4, 64)
    torch.testing.assert_close(one.to_dense(), scale * (codes - 7.5))
    twin = build(one.describe())
    twin.load_state_dict(one.state_dict())
    assert_alike(twin.to_dense(), one.to_dense())
    assert torch.equal(one.select(torch.tensor([3, 1]), None).to_dense(), one.to_dense()[[3, 1]])
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    narrow = MidRise.from_codes(codes, scale.bfloat16(), None, 4, 64)
    with torch.no_grad():
        expected = x.double() @ narrow.double().to_dense().T
        narrow = MidRise.from_codes(codes, scale.bfloat16(), None, 4, 64)
        torch.testing.assert_close(narrow(x).double(), expected, rtol=2e-2, atol=0.5)
    with pytest.raises(ValueError, match="no zero points"):
        build(one.describe() | {"symmetric": False})


def test_rounded_inputs_are_stored_with_their_offsets():
    weight, bias = matrix(6, 10, torch.float32), torch.randn(6)
    one = made(weight, bias, bits=8, activation_bits=3)
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    one(x)
    assert float(one.activations.step.detach()) == pytest.approx(2 * float(x.abs().mean()) / 3**0.5, rel=1e-6)
    with torch.no_grad():
        one.activations.before += 0.1
        one.activations.after -= 0.2
    before = one.activations.step.clone()
    y = one.eval()(7 * x)
    assert torch.equal(one.activations.step, before)  # only the first input sets it
    expected = (lsq(7 * x + 0.1, before, -4, 3) - 0.2) @ one.weight.T + bias
    torch.testing.assert_close(y, expected)
    stored = one.finished()
    stored.set_bias(bias)
    torch.testing.assert_close(stored(7 * x), y)
    assert parameters(stored) == sum(p.numel() for p in stored.parameters()) + stored.to_dense().numel()
    twin = build(stored.describe())
    twin.load_state_dict(stored.state_dict())
    assert isinstance(twin, RoundedInput)
    assert_alike(twin(x), stored(x))
    part = stored.select(torch.tensor([4, 0]), None)
    torch.testing.assert_close(part(x), stored(x)[:, [4, 0]])
    with pytest.raises(ValueError, match="should be an operator"):
        build(stored.describe() | {"inner": stored.describe()})
