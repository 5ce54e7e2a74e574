"""FARMS: windows, tail exponents, and the shares that come of them."""

import copy

import pytest
import torch

import transect
from transect.anatomy import Anatomy
from transect.compression import method as registered
from transect.compression.allocation import Unit, allocation_named
from transect.compression.allocation.farms import mean_exponents, removals
from transect.compression.allocation.registry import scores_of, share_out
from transect.errors import TransectError
from transect.spectra import (
    hill_median,
    hill_peak,
    pooled_eigenvalues,
    stretched,
    window_shape,
    window_starts,
)

from .models import CONFIGS, inputs, logits, tiny
from .test_llm_drop import DATA, data_for


def gaussian(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_windows_make_the_exponent_of_a_random_matrix_independent_of_its_shape():
    shapes = [(128, 128), (128, 256), (128, 512), (64, 512), (512, 128)]
    windowed = [hill_median(pooled_eigenvalues(gaussian(*shape), 64, windows=4)) for shape in shapes]
    whole = [hill_median(torch.linalg.svdvals(gaussian(*shape)).square().sort().values) for shape in shapes]
    assert all(2.05 < alpha < 2.2 for alpha in windowed)
    assert max(whole) > 4 and min(whole) < 2.2


@pytest.mark.parametrize(("shape", "rows", "ratio"), [((48, 96), 20, 1.0), ((96, 48), 20, 1.0), ((40, 50), 16, 1.5)])
def test_pooled_eigenvalues_are_those_of_every_window(shape, rows, ratio):
    weight = gaussian(*shape)
    height, width = window_shape(shape, rows, ratio)
    expected = [
        torch.linalg.svdvals(weight[top : top + height, left : left + width]).square()
        for top in window_starts(shape[0], height, 4)
        for left in window_starts(shape[1], width, 4)
    ]
    found = pooled_eigenvalues(weight, rows, ratio, 4)
    torch.testing.assert_close(found, torch.cat(expected).sort().values, rtol=1e-8, atol=1e-10)
    assert len(found) == 16 * min(height, width)


@pytest.mark.parametrize(
    ("size", "window", "windows", "starts"),
    [
        (100, 40, 4, [0, 20, 40, 60]), (64, 64, 4, [0]), (66, 64, 10, [0, 1, 2]), (100, 40, 1, [0]),
        (10, 3, 4, [0, 2, 4, 6]),
    ],
)  # fmt: skip
def test_where_windows_begin(size, window, windows, starts):
    """They cover the first and the last row where the steps divide evenly."""
    assert window_starts(size, window, windows) == starts


def test_windows_never_leave_the_matrix():
    for size in range(1, 40):
        for window in range(1, size + 1):
            for windows in (1, 2, 5, 10):
                starts = window_starts(size, window, windows)
                assert starts[0] == 0 and starts[-1] + window <= size and len(set(starts)) == len(starts) <= windows
    assert window_shape((10, 30), 64, 1.0) == (10, 10) and window_shape((30, 10), 8, 4.0) == (8, 10)
    assert window_shape((10, 10), 4, 0.1) == (4, 1)


@pytest.mark.parametrize("estimator", [hill_median, hill_peak])
def test_neither_scale_nor_transposition_matters(estimator):
    weight = gaussian(60, 90)
    plain = estimator(pooled_eigenvalues(weight, 30, windows=3))
    assert estimator(pooled_eigenvalues(1e-3 * weight, 30, windows=3)) == pytest.approx(plain, rel=1e-6)
    assert estimator(pooled_eigenvalues(weight.T, 30, windows=3)) == pytest.approx(plain, rel=1e-6)


def test_one_window_over_the_whole_is_the_plain_estimator():
    weight = gaussian(40, 40)
    plain = torch.linalg.svdvals(weight).square().sort().values
    for windows in (1, 7):
        torch.testing.assert_close(pooled_eigenvalues(weight, 40, windows=windows), plain, rtol=1e-6, atol=1e-9)


def brute_force(values, cut):
    tail = values[cut:].log()
    return float(1 + len(tail) / (tail.sum() - len(tail) * tail[0]))


@pytest.mark.parametrize("exponent", [2.0, 3.5])
def test_pareto_distributed_eigenvalues(exponent):
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = ((1 - uniform) ** (-1 / (exponent - 1))).sort().values
    values = values[values < values[0] / 1e-5]  # what lies below the floor is another test's
    assert hill_median(values) == pytest.approx(exponent, rel=0.05)
    assert hill_median(values) == pytest.approx(brute_force(values, len(values) // 2), rel=1e-9)
    assert hill_peak(values) == pytest.approx(exponent, rel=0.05)


def test_the_peak_rule_takes_the_best_fit_near_the_fullest_bin():
    values = pooled_eigenvalues(gaussian(40, 60), 30, windows=2)
    values = values[values > 1e-5 * values[-1]]
    logs = values.log10()
    counts, edges = torch.histogram(logs, bins=100)
    peak = 10 ** float(edges[counts.argmax()])
    best = None
    for cut in range(len(values) - 1):
        if 0.95 * peak <= values[cut] <= 1.5 * peak:
            alpha, n = brute_force(values, cut), len(values) - cut
            fitted = 1 - (values[cut:] / values[cut]) ** (1 - alpha)
            distance = float((fitted - torch.arange(n) / n).abs().max())
            if best is None or distance < best[0]:
                best = distance, alpha
    assert hill_peak(values) == pytest.approx(best[1], rel=1e-9)


def test_planted_spikes_make_the_tail_heavier():
    weight = gaussian(96, 96)
    spikes = gaussian(96, 12, seed=1) @ gaussian(12, 96, seed=2)
    plain, spiked = (hill_median(pooled_eigenvalues(w, 32, windows=4)) for w in (weight, weight + spikes))
    assert spiked < plain - 0.1


def test_zeros_are_left_out_and_a_spectrum_without_a_tail_is_refused():
    values = torch.linspace(1, 9, 50, dtype=torch.float64).square()
    with_zeros = torch.cat([torch.zeros(30, dtype=torch.float64), torch.full((5,), 1e-12).double(), values])
    assert hill_median(with_zeros) == hill_median(values)
    for flat in (torch.zeros(20, dtype=torch.float64), torch.ones(20, dtype=torch.float64)):
        for estimator in (hill_median, hill_peak):
            with pytest.raises(TransectError, match="falls off"):
                estimator(flat)


def units(sizes):
    return [
        Unit(f"blocks.{block}.{part}", block, "up", size) for block, size in sizes.items() for part in ("one", "two")
    ]


def shares(alphas, sizes, keep, epsilon):
    scores = {unit.name: alphas[unit.block] + (0.5 if unit.name.endswith("one") else -0.5) for unit in units(sizes)}
    chosen = allocation_named("farms")
    return chosen.function(units(sizes), keep, scores, **chosen.settings({"epsilon": epsilon}))


def test_shares_spend_the_budget_and_rise_with_how_heavy_the_tail_is():
    alphas, sizes = {0: 2.0, 1: 4.0, 2: 3.0}, {0: 100, 1: 300, 2: 200}
    for keep in (0.9, 0.5):
        for epsilon in (0.1, 0.3, 0.6):
            found = shares(alphas, sizes, keep, epsilon)
            total = sum(found[unit.name] * unit.bytes for unit in units(sizes))
            whole = sum(unit.bytes for unit in units(sizes))
            assert keep * whole * (1 - 1e-9) < total <= keep * whole
            assert found["blocks.0.one"] == found["blocks.0.two"]
            removed = [1 - found[f"blocks.{block}.one"] for block in range(3)]
            assert removed[0] < removed[2] < removed[1]
            if keep == 0.9:
                assert removed[1] / removed[0] == pytest.approx((1 + epsilon) / (1 - epsilon))
                # the formula of the paper: S Σp / Σ(p t) t_b
                t = {0: 1 - epsilon, 1: 1 + epsilon, 2: 1.0}
                factor = 0.1 * sum(sizes.values()) / sum(sizes[block] * t[block] for block in sizes)
                assert removed == pytest.approx([factor * t[block] for block in range(3)])


def test_equal_exponents_or_no_spread_are_uniform():
    sizes = {0: 100, 1: 300}
    for alphas, epsilon in (({0: 3.0, 1: 3.0}, 0.3), ({0: 2.0, 1: 5.0}, 0.0)):
        found = shares(alphas, sizes, 0.7, epsilon)
        assert list(found.values()) == pytest.approx([0.7] * 4)


@pytest.mark.parametrize("total", [0.1, 0.5, 0.8, 0.95, 0.998, 0.9999])
def test_no_block_loses_more_than_it_has(total):
    sizes = {0: 1000, 1: 10, 2: 500, 3: 700}
    weights = stretched({0: 2.0, 1: 9.0, 2: 8.0, 3: 3.0}, 0.1, 1.9)
    removed = removals(sizes, weights, total)
    assert sum(sizes[block] * removed[block] for block in sizes) == pytest.approx(total * sum(sizes.values()))
    assert all(0 < share <= max(0.998, total) + 1e-12 for share in removed.values())
    assert removed[0] <= removed[3] <= removed[2] <= removed[1]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_scores_are_those_of_the_weights_by_one_window_for_all(name):
    """The smallest side of all matrices (here key/value heads, or the width), whichever way they are stored."""
    anatomy = Anatomy(tiny(name))
    settings = allocation_named("farms").settings({"windows": 3})
    found = scores_of("farms", anatomy.matrices(), None, settings)
    rows = 16 if anatomy.blocks[0].attention.key_value_heads == 2 else 32
    for matrix in anatomy.matrices():
        assert found[matrix.name] == hill_median(pooled_eigenvalues(matrix.weight.double(), rows, windows=3))
    explicit = scores_of("farms", anatomy.matrices(), None, {**settings, "window": rows})
    assert explicit == found
    for keep in (0.8, 0.5):
        given = share_out("farms", anatomy.matrices(), keep, found, settings)
        assert len({share for key, share in given.items() if key.startswith("blocks.1.")}) == 1


@pytest.mark.parametrize("method", ["svd", "svd-llm", "amp", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_with_every_kind_of_method_within_the_budget(name, method):
    dense = tiny(name)
    whole = Anatomy(dense).matrix_bytes()
    model = transect.compress(
        copy.deepcopy(dense), method, 0.8, data_for(name), allocation="farms", allocation_epsilon=0.3
    )
    assert 0.6 * whole < Anatomy(model).matrix_bytes() <= 0.8 * whole
    assert torch.isfinite(logits(model, inputs(name))).all()
    written = Anatomy(model).record.history[-1]["compress"]
    assert written["allocation"] == "farms" and written["allocation_settings"]["epsilon"] == 0.3


def test_no_spread_is_the_uniform_allocation_but_for_rounding():
    plain = transect.compress(tiny("llama"), "svd", 0.6)
    spread = transect.compress(tiny("llama"), "svd", 0.6, allocation="farms", allocation_epsilon=0)
    assert [m.module.rank for m in Anatomy(plain).matrices()] == [m.module.rank for m in Anatomy(spread).matrices()]


def test_matrices_of_zeros_have_no_say():
    """A depth-expanded model's new blocks have an output and a down matrix of zeros."""
    exponents = {0: [2.0, 4.0], 1: [float("nan"), 5.0], 2: [float("nan")] * 2}
    assert mean_exponents(exponents) == {0: 3.0, 1: 5.0, 2: 4.0}
    assert mean_exponents({0: [float("nan")], 1: [float("nan")]}) == {0: 1.0, 1: 1.0}
    model = tiny("llama")
    for role in ("o", "down"):
        matrix = Anatomy(model).blocks[1].matrix(role)
        matrix.write(torch.zeros(matrix.shape))
    transect.compress(model, "svd", 0.6, allocation="farms")
    assert Anatomy(model).matrix_bytes() <= 0.6 * Anatomy(tiny("llama")).matrix_bytes()


def test_what_is_refused():
    with pytest.raises(TransectError, match="epsilon=2"):
        transect.compress(tiny("llama"), "svd", 0.6, allocation="farms", allocation_epsilon=2)
    with pytest.raises(TransectError, match="shares out the budget itself"):
        transect.compress(tiny("llama"), "llm-drop", 0.6, DATA, allocation="farms")
    model = tiny("llama")
    Anatomy(model).blocks[1].mlp.up.write(torch.eye(48, 32))  # a flat spectrum
    with pytest.raises(TransectError, match=r"blocks\.1\.mlp\.up.*falls off"):
        transect.compress(model, "svd", 0.6, allocation="farms")
    assert not Anatomy(model).record
    assert registered("svd").family == "factorization"
