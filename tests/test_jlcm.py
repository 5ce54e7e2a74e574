"""JLCM: the stored codebook, groups of rows, k-means of weights, learning, and whole models."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transect
from transect.anatomy import Anatomy
from transect.anatomy.storage import weight_tensors
from transect.claims import Verdict, run_claims
from transect.claims.catalog import jlcm as catalog_claims
from transect.compression import method
from transect.compression.catalog.jlcm.assignment import Proximal, Soft, places
from transect.compression.catalog.jlcm.coding import Coding, started
from transect.compression.catalog.jlcm.grouping import group_rows, k_means
from transect.compression.catalog.jlcm.jlcm import size
from transect.compression.catalog.jlcm.learning import gradients, learn
from transect.compression.catalog.jlcm.lloyd import cell_ends, lloyd, step
from transect.data import load
from transect.errors import OutOfReach, TransectError
from transect.operators import build
from transect.operators.codebook import MODES, Codebook, codebook_bytes
from transect.operators.grouped_integer import pack, packed_bytes, unpack

from .models import VOCABULARY, assert_alike, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
JLCM = method("jlcm").function


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(d_out=24, d_in=40):
    """W, in rows of three sizes, and C of correlated inputs. d_out is a multiple of 3."""
    x = randn(300, d_in, seed=1) @ (torch.eye(d_in) + randn(d_in, d_in, seed=2) / d_in**0.5)
    sizes = torch.tensor([0.3, 1.0, 3.0]).double().repeat(d_out // 3)
    return randn(d_out, d_in) * sizes[:, None], x.T @ x / 300


@torch.no_grad()
def output_error(weight, made, covariance):
    delta = weight - made.to_dense()
    return ((delta @ covariance) * delta).sum().item()


def uniform(weight, bits):
    """The nearest of evenly spaced numbers from the least weight to the largest."""
    low, gap = weight.min(), (weight.max() - weight.min()) / (2**bits - 1)
    return low + ((weight - low) / gap).round() * gap


# the stored matrix


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**31))
def test_integers_of_any_number_of_bits_survive_packing(bits, count, seed):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, count).long(), codes)
    assert len(packed) == packed_bytes(count, bits) and count * bits / 8 <= len(packed) < count * bits / 8 + 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("bits", "groups"), [(1, 1), (2, 3), (3, 5), (4, 2), (6, 5), (8, 1)])
def test_the_operator_is_its_formula_and_its_bytes_are_the_size(mode, bits, groups):
    d_out, d_in, dtype = 5, 13, torch.bfloat16
    indices = torch.randint(0, 2**bits, (d_out, d_in), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(d_out) % groups
    codes = randn(1 if mode == "scale" else groups, 2**bits, seed=2).to(dtype)
    scale = randn(groups, seed=3).abs().to(dtype) if mode == "scale" else None
    made = Codebook.from_codes(indices, labels, codes, scale)
    by_hand = [
        [codes[0, k] * scale[g] if mode == "scale" else codes[g, k] for k in row]
        for g, row in zip(labels.tolist(), indices.tolist(), strict=True)
    ]
    assert torch.equal(made.to_dense(), torch.tensor(by_hand, dtype=dtype))
    bias = randn(d_out, seed=4).to(dtype)
    made.set_bias(bias)
    x = randn(2, 3, d_in, seed=5).to(dtype)
    with torch.no_grad():
        assert_alike(made(x), torch.nn.functional.linear(x, made.to_dense(), bias))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in weight_tensors(made))
    assert stored == codebook_bytes(d_out, d_in, bits, groups, mode, 2)
    again = build(made.describe()).to(dtype)
    again.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), made(x))
    rows = torch.tensor([4, 0])
    assert torch.equal(made.select(rows, None).to_dense(), made.to_dense()[rows])
    with pytest.raises(TransectError, match="cannot lose rows or columns"):
        made.select(None, rows)


def test_bytes_are_those_of_the_card():
    """m n b bits of indices, m log2 G of labels, and 16 (K + G) or 16 G K for the numbers."""
    m, n, groups = 64, 96, 16
    for bits in (1, 2, 3, 4, 5, 8):
        whole = m * n * bits + m * 4
        assert 8 * codebook_bytes(m, n, bits, groups, "scale", 2) == whole + 16 * (2**bits + groups)
        assert 8 * codebook_bytes(m, n, bits, groups, "multi", 2) == whole + 16 * groups * 2**bits
    assert codebook_bytes(m, n, 4, 1, "multi", 2) == m * n // 2 + 32  # one group needs no labels


@pytest.mark.parametrize("change", [{"bits": 0}, {"bits": 9}, {"groups": 0}, {"groups": 257}, {"mode": "both"}])
def test_what_is_no_such_matrix_is_not_built(change):
    with pytest.raises(ValueError, match="a codebook has 1 to 8 bits"):
        build(Codebook(4, 4, 2, 2, "scale", False).describe() | change)


def test_gradients_reach_codes_and_scales():
    made = Codebook.from_codes(torch.tensor([[0, 1, 1], [1, 1, 0]]), torch.tensor([0, 1]), randn(1, 2), randn(2))
    made(torch.tensor([[1.0, 2.0, 4.0]]).double()).sum().backward()
    scale, codes = made.scale.detach(), made.codebook.detach()[0]
    assert_alike(made.scale.grad, torch.stack([codes @ torch.tensor([1.0, 6]).double(), codes @ codes.new([4, 3])]))
    assert_alike(made.codebook.grad[0], torch.stack([scale @ scale.new([1, 4]), scale @ scale.new([6, 3])]))


# groups of rows


def test_rows_that_are_alike_are_one_group():
    sizes = torch.tensor([1.0, 10.0, 100.0]).double().repeat(8)
    labels = group_rows(randn(24, 200) * sizes[:, None], 3, seed=1)
    for value in (1, 10, 100):
        assert len(labels[sizes == value].unique()) == 1
    assert len(labels.unique()) == 3
    assert not group_rows(randn(5, 7), 1, seed=0).any()
    assert sorted(group_rows(randn(9, 30), 9, seed=0).tolist()) == list(range(9))


def test_one_outlier_does_not_move_a_row():
    weight = randn(12, 200) * torch.tensor([1.0, 5.0]).double().repeat(6)[:, None]
    labels = group_rows(weight, 2, seed=0)
    weight[0, 3], weight[7, 5] = 1e4, -1e4
    found = group_rows(weight, 2, seed=0)
    assert torch.equal(found, labels) or torch.equal(found, 1 - labels)


def test_points_that_are_all_alike_fill_no_more_than_they_can():
    assert k_means(torch.ones(6, 3), 4, seed=0).max() < 4
    points = torch.tensor([[0.0], [0.0], [0.0], [1.0], [2.0]])
    assert len(k_means(points, 3, seed=0).unique()) == 3


def test_sorting_rows_by_group_is_a_permutation_that_hidden_units_allow():
    """The paper's way to store no labels: rows of one matrix in their groups' order, its reader's columns along."""
    model = tiny("llama").double()
    before = logits(model, inputs("llama"))
    for block in Anatomy(model).blocks:
        weight = block.mlp.up.weight.clone()
        order = group_rows(weight, 4, seed=0).argsort(stable=True)
        block.mlp.keep(order)
        assert not torch.equal(block.mlp.up.weight, weight) and torch.equal(block.mlp.up.weight, weight[order])
    torch.testing.assert_close(logits(model, inputs("llama")), before, rtol=0, atol=1e-6)


# k-means of weights


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [2, 5, 16])
def test_steps_never_raise_the_error_and_the_codes_are_means_of_what_is_nearest(weighted, count):
    values = randn(400).pow(3)
    importance = randn(400, seed=1).abs() if weighted else torch.ones(400).double()
    line, order = values.sort()
    weight = importance[order]
    zero = torch.zeros(1).double()
    sums = torch.cat([zero, weight.cumsum(0)]), torch.cat([zero, (weight * line).cumsum(0)])
    codes = torch.linspace(-8, 8, count).double()  # the outer ones have no values
    errors = []
    for _ in range(40):
        spread = (line[:, None] - codes).square().min(1).values
        errors.append((spread * weight).sum().item())
        codes = step(line, weight, *sums, codes)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(errors))
    found, indices = lloyd(values, importance if weighted else None, count)
    nearest = (values[:, None] - found).abs().argmin(1)
    assert torch.equal(indices, nearest) and (found.diff() > 0).all()
    for k in range(count):
        mine = indices == k
        assert (importance * values)[mine].sum() / importance[mine].sum() == pytest.approx(found[k].item())


def test_it_finds_the_best_codes_of_few_values():
    """Of all ways to cut the sorted values in three."""
    values = torch.tensor([0.0, 0.1, 0.3, 2.0, 2.4, 5.0, 5.1, 5.5]).double()
    best = min(
        sum(part.var(correction=0).item() * len(part) for part in values.tensor_split((i, j)))
        for i in range(1, 7)
        for j in range(i + 1, 8)
    )
    codes, indices = lloyd(values, None, 3)
    assert (values - codes[indices]).square().sum().item() == pytest.approx(best)


def test_a_code_without_values_moves_to_the_worst_value():
    line, ones = torch.tensor([0.0, 0.2, 0.4, 9.0, 9.2, 13.0]).double(), torch.ones(6).double()
    sums = [torch.cat([torch.zeros(1).double(), each.cumsum(0)]) for each in (ones, line)]
    assert step(line, ones, *sums, torch.tensor([0.2, 9.5, 100.0]).double()).tolist() == pytest.approx([0.2, 10.4, 13])
    assert cell_ends(line, torch.tensor([0.2, 0.2, 13.0]).double())[-1] == 6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_matrix_of_as_many_different_numbers_as_codes_stays_as_it_is(mode, bits):
    numbers = randn(2**bits)
    picks = torch.randint(0, 2**bits, (8, 64), generator=torch.Generator().manual_seed(3))
    picks[0] = 0  # and most of the entries are one and the same
    weight = numbers.float().double()[torch.where(randn(8, 64, seed=4) > 0, 0, picks)]
    made = JLCM(weight, problem(d_in=64)[1], bits=bits, groups=1, mode=mode).to_dense()
    torch.testing.assert_close(made, weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_it_is_better_than_uniform_and_groups_are_better_still(bits):
    weight, covariance = problem()
    even = (weight - uniform(weight, bits)).square().sum()
    one = JLCM(weight, covariance, bits=bits, groups=1, steps=0).to_dense()
    error = (weight - one).square().sum()
    assert error < 0.9 * even
    for mode in MODES:
        made = JLCM(weight, covariance, bits=bits, groups=3, mode=mode, steps=0).to_dense()
        assert (weight - made).square().sum() < 0.9 * error


def test_one_group_is_plain_k_means_and_a_group_a_row_is_a_scale_a_row():
    weight, covariance = problem()
    codes, indices = lloyd(weight.float(), None, 8)
    for mode in MODES:
        made = JLCM(weight, covariance, bits=3, groups=1, mode=mode, steps=0).to_dense()
        torch.testing.assert_close(made, codes[indices].double(), rtol=1e-4, atol=1e-4)
    spread = weight.std(1, correction=0)[:, None].float()
    codes, indices = lloyd(weight.float() / spread, spread.square(), 8)
    made = JLCM(weight, covariance, bits=3, groups=len(weight), steps=0).to_dense()
    torch.testing.assert_close(made, (codes[indices] * spread).double(), rtol=1e-4, atol=1e-4)


# learning


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_loss_with_the_assignment_fixed(mode):
    weight, covariance = problem(9, 12)
    coding = started(weight, 2, 3, mode, seed=0)

    def loss(codes, scale):
        error = Coding(codes, scale, coding.labels, coding.indices).to_dense() - weight
        return ((error @ covariance) * error).sum()

    of_codes, of_scale = gradients(coding, 2 * (coding.to_dense() - weight) @ covariance)
    expected = of_codes if coding.scale is None else torch.cat([of_codes.flatten(), of_scale.flatten()])
    found = []
    for which in ("codes",) if coding.scale is None else ("codes", "scale"):
        for place in range(getattr(coding, which).numel()):
            ends = []
            for off in (1e-5, -1e-5):
                numbers = {"codes": coding.codes.clone(), "scale": copy.copy(coding.scale)}
                numbers[which] = numbers[which].clone()
                numbers[which].view(-1)[place] += off
                ends.append(loss(**numbers))
            found.append((ends[0] - ends[1]) / 2e-5)
    torch.testing.assert_close(torch.stack(found), expected.flatten(), rtol=1e-6, atol=1e-6)


def test_a_weight_starts_at_its_code_and_moves_by_one_at_most():
    weight, _ = problem()
    coding = started(weight, 3, 3, "scale", seed=0)
    where = places(weight, coding)
    assert torch.equal(where.round().long(), coding.indices)
    assigned = Proximal(weight, coding)
    for turn in range(6):
        before = assigned.indices
        assigned.move(randn(*weight.shape, seed=turn) * 10 ** (turn - 2))
        assert (assigned.indices - before).abs().max() == 1
        assert assigned.indices.min() >= 0 and assigned.indices.max() <= 7
    soft = Soft(weight, coding)
    assert torch.equal(soft.indices, coding.indices)
    soft.move(torch.full_like(weight, 1e4))
    assert (soft.indices - coding.indices).max() > 1  # what the paper's moves do not do


def test_moves_go_where_the_loss_falls():
    """Two weights whose inputs are the same: one leaves its nearest code, to make up for what the other adds."""
    weight, covariance = torch.tensor([[0.45, 0.35]]).double(), torch.ones(2, 2).double()
    coding = Coding(torch.tensor([[0.0, 1.0]]).double(), None, torch.tensor([0]), torch.tensor([[0, 0]]))
    start = output_error(weight, coding, covariance)
    made = learn(weight, covariance, coding, 200)
    assert start == pytest.approx(0.64) and output_error(weight, made, covariance) < 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("surrogate", ["proximal", "soft"])
def test_learning_ends_no_worse_than_it_starts(mode, surrogate):
    weight, covariance = problem()
    for bits, steps in ((1, 1), (2, 3), (3, 60)):
        errors = [
            output_error(weight, JLCM(weight, covariance, bits=bits, groups=4, mode=mode, **more), covariance)
            for more in ({"steps": 0}, {"steps": steps, "surrogate": surrogate})
        ]
        assert errors[1] <= errors[0] * (1 + 1e-5)
    assert errors[1] < 0.95 * errors[0]


def test_order_at_equal_bits():
    weight, covariance = problem(48, 64)
    for bits in (2, 3):
        one, grouped, learned = (
            output_error(weight, JLCM(weight, covariance, bits=bits, **chosen), covariance)
            for chosen in ({"groups": 1, "steps": 0}, {"groups": 3, "steps": 0}, {"groups": 3})
        )
        delta = weight - uniform(weight, bits)
        assert 0.7 * ((delta @ covariance) * delta).sum().item() > one > grouped > 1.5 * learned


@pytest.mark.parametrize("mode", MODES)
def test_scaling_the_matrix_or_the_inputs_changes_numbers_and_no_index(mode):
    weight, covariance = problem()
    made, scaled, louder = (
        JLCM(weight * factor, covariance * other, bits=2, groups=4, mode=mode, steps=20)
        for factor, other in ((1, 1), (2.0**-40, 1), (1, 2.0**30))
    )
    for other, factor in ((scaled, 2.0**-40), (louder, 1.0)):
        assert torch.equal(made.indices, other.indices) and torch.equal(made.labels, other.labels)
        assert torch.equal(made.table() * factor, other.table())


@pytest.mark.parametrize("mode", MODES)
def test_zeros_equal_entries_and_features_that_are_never_on(mode):
    weight, covariance = problem()
    weight[0], weight[1], weight[2] = 0, 0.5, 1e-30
    covariance[5], covariance[:, 5] = 0, 0
    for matrix, metric in (
        (weight, covariance), (weight, covariance * 0), (weight * 0, covariance), (weight * 1e-200, covariance * 1e200)
    ):  # fmt: skip
        made = JLCM(matrix, metric, bits=2, groups=16, mode=mode, steps=20).to_dense()
        assert torch.isfinite(made).all()
    assert not JLCM(weight * 0, covariance, bits=2, mode=mode, steps=20).to_dense().any()


# whole models


@pytest.mark.parametrize(("keep", "bits"), [(0.42, 5), (0.3, 4), (0.17, 2), (0.1, 1)])
def test_a_budget_chooses_the_bits(keep, bits):
    model = tiny("llama").bfloat16()
    transect.compress(model, "jlcm", keep, DATA, groups=4, steps=1)
    made = [matrix.module for matrix in Anatomy(model).matrices() if isinstance(matrix.module, Codebook)]
    assert made and {operator.bits for operator in made} == {bits}


def test_the_seed_draws_the_groups():
    weight, covariance = randn(40, 30), problem(d_in=30)[1]
    drawn = [JLCM(weight, covariance, bits=2, steps=0, seed=seed).labels for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_codebook_larger_than_its_matrix_is_out_of_reach():
    chosen = {"groups": 2, "mode": "multi"}
    assert size((4, 16), 2, 1.0, **chosen).chosen == {"bits": 4}  # 2 x 32 codes would be all of the 64 numbers
    with pytest.raises(
        OutOfReach, match=r"1 bit a weight, codes, .* of a 4 x 2 matrix of 2-byte numbers, and keep=0.9"
    ):
        size((4, 2), 2, 0.9, groups=4, mode="multi")


def test_more_groups_than_rows_and_budgets_below_one_bit_are_refused_before_any_change():
    model = tiny("llama")
    with pytest.raises(OutOfReach, match=r"attention\.k: a 16 x 32 matrix has too few rows for groups=17; set 16"):
        transect.compress(model, "jlcm", 0.5, DATA, groups=17)
    with pytest.raises(OutOfReach, match="raise it, or take fewer groups"):
        transect.compress(model, "jlcm", 0.03, DATA)
    assert not Anatomy(model).record


@pytest.mark.parametrize(
    "wrong", [{"groups": 0}, {"groups": 257}, {"mode": "both"}, {"steps": -1}, {"surrogate": "hard"}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(TransectError, match="must be"):
        transect.compress(tiny("llama"), "jlcm", 0.5, DATA, **wrong)


# claims


def test_claims_measure_every_way_at_the_same_bits(monkeypatch):
    monkeypatch.setattr(catalog_claims, "BITS", (2,))
    model = tiny("llama")
    for _ in range(2):
        Anatomy(model).drop_block(1)
    before = copy.deepcopy(model.state_dict())
    order, surrogate = (
        outcome.result for outcome in run_claims(model, load(DATA, model), load(DATA[:5], model), ["jlcm"])
    )
    assert [row["better"] for row in order.numbers] == [f"{n}, 2 bits" for n in ("learned", "groups", "one codebook")]
    assert [row["worse"] for row in order.numbers][-1] == "uniform, 2 bits"
    kept = [order.numbers[0]["better_kept"], *(row["worse_kept"] for row in order.numbers)]
    assert kept[0] == kept[1] > kept[2] > kept[3] > 2 / 32
    assert surrogate.numbers[0]["better_loss"] == order.numbers[0]["better_loss"] != surrogate.numbers[0]["worse_loss"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_uniform_steps_are_the_nearest_of_evenly_spaced_numbers():
    weight, _ = problem()
    torch.testing.assert_close(catalog_claims.uniform(weight, bits=3).to_dense(), uniform(weight, 3), atol=1e-5, rtol=0)


def test_claims_do_not_apply_where_a_matrix_has_fewer_rows_than_groups():
    model = tiny("gpt_bigcode")
    (outcome,) = run_claims(model, load(DATA, model), load(DATA[:5], model), ["jlcm/order"])
    assert outcome.result.verdict == Verdict.NOT_APPLICABLE and "too few rows" in outcome.result.explanation
