"""Spectra of weight matrices: singular values, ranks, and power-law tails."""

import math

import pytest
import torch

from transect.anatomy import Anatomy
from transect.claims import Verdict, run_claims
from transect.data import Batches, Specimen
from transect.errors import TransectError
from transect.probes import Table, drawings, run_probes
from transect.spectra import hill_median, power_law, singular_values

from .models import CONFIGS, inputs, tiny


def specimen_of(name, dtype=torch.float32):
    return Specimen(Anatomy(tiny(name, dtype=dtype)))


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pareto(count, exponent, seed=0):
    """Samples of the density λ^-exponent from 1 on, ascending."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1 - uniform).pow(-1 / (exponent - 1)).sort().values


def tail_by_hand(eigenvalues, floor):
    """Every start in turn, as the definition says."""
    kept = eigenvalues[eigenvalues > floor]
    best = (math.inf, None, None)
    for start in range(len(kept) - 1):
        tail = kept[start:]
        count = len(tail)
        alpha = 1 + count / float((tail / tail[0]).log().sum())
        model = 1 - (tail / tail[0]).pow(1 - alpha)
        distance = float((model - torch.arange(count, dtype=torch.float64) / count).abs().max())
        best = min(best, (distance, alpha, count))
    return best


@pytest.mark.parametrize("eigenvalues", [
    torch.linalg.svdvals(gaussian(60, 90)).square().flip(0),
    torch.linalg.svdvals(gaussian(50, 50)).square().flip(0),
    pareto(300, 2.5), torch.cat([pareto(80, 3.0) / 3, pareto(40, 2.0, seed=1)]).sort().values,
])  # fmt: skip
def test_the_fit_is_the_best_of_all_starts(eigenvalues):
    distance, alpha, count = tail_by_hand(eigenvalues, 1e-5)
    found = power_law(eigenvalues, 1e-5)
    assert found is not None
    assert (found.alpha, found.distance) == pytest.approx((alpha, distance), rel=1e-9)
    assert found.tail == count and found.start == pytest.approx(float(eigenvalues[-count]))


def test_the_exponent_of_a_power_law_is_found_and_does_not_depend_on_the_scale():
    sample = pareto(4000, 2.5)
    found = power_law(sample, 0.0)
    assert found is not None and found.alpha == pytest.approx(2.5, abs=0.1)
    scaled = power_law(1e4 * sample, 0.0)
    assert scaled is not None and scaled.alpha == pytest.approx(found.alpha, rel=1e-9)
    few = power_law(sample, 0.0, cuts=200)
    assert few is not None and few.alpha == pytest.approx(2.5, abs=0.15) and few.distance >= found.distance


def test_no_tail_no_exponent():
    assert power_law(pareto(19, 2.5), 0.0) is None
    assert power_law(pareto(25, 2.5), 2.0) is None  # fewer than 20 above the floor
    assert power_law(torch.ones(100, dtype=torch.float64), 0.0) is None


def test_singular_values_of_many_shapes():
    weights = [gaussian(30, 50), gaussian(50, 30), gaussian(30, 50, seed=1), gaussian(20, 20), torch.zeros(4, 6)]
    weights.append(gaussian(40, 2) @ gaussian(2, 30))  # of rank 2: its Gram matrix would say 1e-8
    for weight in weights:
        torch.testing.assert_close(
            singular_values(weight), torch.linalg.svdvals(weight.double()), rtol=1e-9, atol=1e-13
        )
    assert singular_values(gaussian(9, 5).bfloat16()).dtype == torch.float64


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name):
    specimen = specimen_of(name)
    result = run_probes(specimen, {"spectra": {"windows": 2}})["spectra"]
    matrices = specimen.anatomy.matrices()
    assert result.labels["matrix"] == [matrix.name for matrix in matrices]
    for number, matrix in enumerate(matrices):
        expected = torch.linalg.svdvals(matrix.weight.double())
        found = result["singular_values"][number]
        torch.testing.assert_close(found[: len(expected)].double(), expected, rtol=1e-5, atol=1e-6)
        assert found[len(expected) :].isnan().all()
        figures = {key: float(result[key][number]) for key in result.quantities if key != "singular_values"}
        squares = expected.square()
        share = squares / squares.sum()
        assert figures["nuclear_norm"] == pytest.approx(float(expected.sum()))
        assert figures["stable_rank"] == pytest.approx(float(squares.sum() / squares[0]))
        assert figures["effective_rank"] == pytest.approx(math.exp(float(-(share * share.log()).sum())))
        assert figures["condition"] == pytest.approx(float(expected[0] / expected[-1]), rel=1e-6)
        assert figures["nuclear_share"] == pytest.approx(
            float(expected.sum()) / float(matrix.weight.double().norm()) / math.sqrt(len(expected))
        )
        assert math.isnan(figures["alpha"]) == (len(expected) < 20)
    for drawing in drawings(result):
        assert isinstance(drawing, Table) or len(drawing.figure.data)
    assert result.findings and result.caveats


def test_exact_cases():
    """An orthogonal matrix is flat; one of rank 1 has the smallest ranks."""
    specimen = specimen_of("llama", torch.float64)
    first, second = specimen.anatomy.blocks[0].matrix("q"), specimen.anatomy.blocks[0].matrix("o")
    first.write(torch.linalg.qr(gaussian(32, 32)).Q)
    second.write(gaussian(32, 1) @ gaussian(1, 32))
    result = run_probes(specimen, {"spectra": {}})["spectra"]
    at = {name: number for number, name in enumerate(result.labels["matrix"])}
    flat, thin = at[first.name], at[second.name]
    for key, of_flat, of_thin in (
        ("nuclear_share", 1.0, 1 / math.sqrt(32)), ("stable_rank", 32.0, 1.0), ("effective_rank", 32.0, 1.0),
        ("condition", 1.0, math.inf),
    ):  # fmt: skip
        assert float(result[key][flat]) == pytest.approx(of_flat, rel=1e-6)
        assert float(result[key][thin]) == pytest.approx(of_thin, rel=1e-6)
    assert result["alpha"][flat].isnan() and result["alpha"][thin].isnan()
    assert any("no exponent" in finding for finding in result.findings)


def test_planted_spikes_make_the_tail_heavier():
    plain, spiked = gaussian(64, 64), gaussian(64, 64)
    spiked += 3 * sum(gaussian(64, 1, seed=s) @ gaussian(1, 64, seed=s + 9) / s for s in range(1, 9))
    exponents = [hill_median(torch.linalg.svdvals(weight).square().flip(0)) for weight in (plain, spiked)]
    assert exponents[1] < exponents[0]


def test_wider_windows_than_matrices_are_named_and_bad_input_is_refused():
    specimen = specimen_of("llama")
    result = run_probes(specimen, {"spectra": {"window": 40}})["spectra"]
    assert any("smaller than the window" in caveat for caveat in result.caveats)
    with pytest.raises(TransectError, match="windows=0"):
        run_probes(specimen, {"spectra": {"windows": 0}})
    specimen.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(TransectError, match="NaN"):
        run_probes(specimen, {"spectra": {}})


def test_claims_tell_planted_tails_from_random_weights():
    names = ["spectra/heavier-than-random", "spectra/no-shape-bias"]
    specimen, text = specimen_of("llama"), Batches([inputs("llama")])
    for matrix in specimen.anatomy.matrices():
        matrix.write(gaussian(*matrix.shape, seed=len(matrix.name)))
    random, shapes = (one.result for one in run_claims(specimen.model, text, text, names))
    assert random.verdict is Verdict.DOES_NOT_HOLD and len(random.numbers) == len(specimen.anatomy.matrices())
    assert {row["of"] for row in shapes.numbers} == {"whole", "windows"}
    for matrix in specimen.anatomy.matrices():
        d_out, d_in = matrix.shape
        spikes = gaussian(d_out, 8) * torch.arange(1.0, 9, dtype=torch.float64).pow(-1) @ gaussian(8, d_in, seed=1)
        matrix.write(matrix.weight + 3 * spikes)
    (planted,) = (one.result for one in run_claims(specimen.model, text, text, names[:1]))
    assert planted.verdict is Verdict.HOLDS
