"""The "must hold" items of the cards fwsvd, svd-llm and kfac-svd, on random matrices in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transect.compression import method, methods
from transect.compression.weighted_svd import shrink, weighted_svd
from transect.errors import TransectError
from transect.statistics.kinds import clip_norms

SHAPES = [(12, 20), (20, 12), (15, 15)]


def problem(m: int, n: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*s):
        return torch.randn(*s, generator=generator, dtype=torch.float64)

    x, g = randn(200, n) * torch.linspace(0.1, 3, n).double(), randn(200, m) * torch.linspace(2, 0.2, m).double()
    x, g = x @ randn(n, n), g @ randn(m, m)
    return randn(m, n), x, x.T @ x / 200, g.T @ g / 200


def dense(factorization, rank):
    left, right = factorization.truncate(rank)
    return left @ right


def run(name, weight, covariance, gradient_covariance, **given):
    statistics = {
        "svd": [], "fwsvd": [gradient_covariance.diagonal()[:, None] * covariance.diagonal()],
        "asvd": [covariance.diagonal().sqrt()], "svd-llm": [covariance], "kfac-svd": [covariance, gradient_covariance],
    }[name]  # fmt: skip
    chosen = method(name)
    return chosen.function(weight, *statistics, **chosen.settings(given))


def objective(delta, output_metric, input_metric):
    return torch.einsum("ij,jk,kl,il->", output_metric, delta, input_metric, delta).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["svd", "fwsvd", "asvd", "svd-llm", "kfac-svd"])
def test_full_rank_is_exact_and_the_loss_is_the_dropped_spectrum(name, shape):
    weight, _, a, g = problem(*shape)
    full = run(name, weight, a, g)
    torch.testing.assert_close(dense(full, min(shape)), weight, rtol=0, atol=1e-7)
    assert full.losses().shape == (min(shape) + 1,) and full.losses()[-1] == 0
    assert (full.losses().diff() <= 0).all() and (full.singular_values.diff() <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_each_objective_equals_its_dropped_spectrum_and_beats_the_others(shape):
    weight, _, a, g = problem(*shape)
    m, n = shape
    rows = (g.diagonal()[:, None] * a.diagonal()).sum(1)
    scale = a.diagonal().sqrt().sqrt()
    metrics = {
        "svd": (torch.eye(m).double(), torch.eye(n).double()),
        "fwsvd": (torch.diag(rows), torch.eye(n).double()),
        "asvd": (torch.eye(m).double(), torch.diag(scale**2)),
        "svd-llm": (torch.eye(m).double(), shrink(a, 1e-6)),
        "kfac-svd": (shrink(g, 0.3), shrink(a, 0.1)),
    }
    made = {name: run(name, weight, a, g) for name in metrics}
    for rank in (1, 5, 9):
        for name, (output_metric, input_metric) in metrics.items():
            own = objective(weight - dense(made[name], rank), output_metric, input_metric)
            assert own == pytest.approx(made[name].losses()[rank].item(), rel=1e-6)
            for other in made.values():
                assert own <= objective(weight - dense(other, rank), output_metric, input_metric) * (1 + 1e-9)


def test_svd_llm_loss_is_the_output_error_on_the_calibration_data():
    weight, x, a, g = problem(12, 20)
    made = run("svd-llm", weight, a, g, shrinkage=0)
    error = ((x @ (weight - dense(made, 4)).T) ** 2).sum(1).mean()
    assert error.item() == pytest.approx(made.losses()[4].item(), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_limits_between_the_methods(shape):
    """Identity metrics give SVD; no output metric gives SVD-LLM; scales do not matter; shrinking to 1 gives SVD."""
    weight, _, a, g = problem(*shape)
    m, n = shape
    eye_m, eye_n = torch.eye(m).double(), torch.eye(n).double()
    plain = dense(run("svd", weight, a, g), 5)
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(plain, u[:, :5] * s[:5] @ v[:5])
    for name, other in (
        ("fwsvd", run("fwsvd", weight, eye_n, eye_m)), ("svd-llm", run("svd-llm", weight, eye_n, g)),
        ("asvd", run("asvd", weight, a, g, alpha=0)), ("kfac-svd", run("kfac-svd", weight, eye_n, eye_m)),
        ("shrunk", run("kfac-svd", weight, a, g, input_shrinkage=1, gradient_shrinkage=1)),
    ):  # fmt: skip
        torch.testing.assert_close(dense(other, 5), plain, msg=name)
    torch.testing.assert_close(
        dense(run("kfac-svd", weight, a, eye_m, input_shrinkage=1e-6), 5), dense(run("svd-llm", weight, a, g), 5)
    )
    for name in ("fwsvd", "svd-llm", "kfac-svd"):
        torch.testing.assert_close(dense(run(name, weight, 7 * a, 3 * g), 5), dense(run(name, weight, a, g), 5))


@pytest.mark.parametrize("shape", SHAPES)
def test_any_root_of_the_covariance_gives_the_same_matrix(shape):
    """Against the papers' own recipe: SVD of L_Γᵀ W S with Cholesky, symmetric and rotated roots."""
    weight, _, a, g = problem(*shape)
    expected = dense(weighted_svd(weight, g, a), 6)
    values, vectors = torch.linalg.eigh(a)
    rotation = torch.linalg.qr(torch.randn(len(a), len(a)).double())[0]
    cholesky, lower = torch.linalg.cholesky(a), torch.linalg.cholesky(g)
    for root in (cholesky, vectors * values.sqrt() @ vectors.T, cholesky @ rotation):
        u, s, v = torch.linalg.svd(lower.T @ weight @ root)
        recipe = torch.linalg.inv(lower).T @ (u[:, :6] * s[:6]) @ v[:6] @ torch.linalg.inv(root)
        torch.testing.assert_close(recipe, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_released_orientation_of_kfac_svd_is_worse(shape):
    """The card's finding: multiplying by L_Γ instead of L_Γᵀ leaves more of the objective."""
    weight, _, a, g = problem(*shape)
    lower, root = torch.linalg.cholesky(g), torch.linalg.cholesky(a)
    u, s, v = torch.linalg.svd(lower @ weight @ root)
    wrong = torch.linalg.inv(lower) @ (u[:, :5] * s[:5]) @ v[:5] @ torch.linalg.inv(root)
    right = objective(weight - dense(weighted_svd(weight, g, a), 5), g, a)
    assert objective(weight - wrong, g, a) > 1.05 * right


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_llm_does_not_depend_on_the_basis_of_the_input(shape):
    weight, _, a, g = problem(*shape)
    change = torch.randn(shape[1], shape[1]).double() + 5 * torch.eye(shape[1])
    inverse = torch.linalg.inv(change)
    moved = run("svd-llm", weight @ inverse, change @ a @ change.T, g, shrinkage=0)
    torch.testing.assert_close(
        dense(moved, 4) @ change, dense(run("svd-llm", weight, a, g, shrinkage=0), 4), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["svd-llm", "kfac-svd"])
def test_rank_deficient_covariances_are_handled(name, shape):
    weight, x, _, _ = problem(*shape)
    few = x[:3].T @ x[:3] / 3
    made = run(name, weight, few, torch.zeros(shape[0], shape[0]).double() + 1e-9)
    assert torch.isfinite(made.left).all() and torch.isfinite(made.right).all()
    if name == "svd-llm":  # three samples: rank 3 reproduces their outputs
        error = (x[:3] @ (weight - dense(made, 3)).T).norm() / (x[:3] @ weight.T).norm()
        assert error < 1e-2


def test_fwsvd_survives_dead_rows_and_falls_back_without_information():
    weight, _, a, g = problem(12, 20)
    g[3] = g[:, 3] = 0
    assert torch.isfinite(run("fwsvd", weight, a, g).left).all()
    with pytest.warns(UserWarning, match="all zero"):
        made = run("fwsvd", weight, a, torch.zeros_like(g))
    torch.testing.assert_close(dense(made, 5), dense(run("svd", weight, a, g), 5))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 9), st.floats(1e-3, 1e3))
def test_clipping_keeps_directions_and_bounds_norms(batch, length, scale):
    g = torch.randn(batch, length, 5).double() * torch.logspace(-3, 3, length).double()[:, None] * scale
    g[0, 0] = 0
    clipped = clip_norms(g, None, 0.1, 10)
    norms = clipped.norm(dim=-1)
    alive = g.norm(dim=-1) > 1e-10
    mean = g.norm(dim=-1).sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp_min(1)
    assert (norms[alive] >= (0.1 * mean).expand_as(norms)[alive] * (1 - 1e-5)).all()
    assert (norms <= 10 * mean * (1 + 1e-5)).all() and (clipped[0, 0] == 0).all()
    cosine = torch.nn.functional.cosine_similarity(clipped[alive], g[alive], dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-6)


def test_settings_are_validated():
    kfac = method("kfac-svd")
    assert kfac.settings({"input_shrinkage": "0.2"}) == {"input_shrinkage": 0.2, "gradient_shrinkage": 0.3}
    for wrong in ({"input_shrinkage": 2}, {"input_shrinkage": "x"}, {"alpha": 1}):
        with pytest.raises(TransectError, match="kfac-svd"):
            kfac.settings(wrong)
    with pytest.raises(TransectError, match="one of"):
        method("fwsvd").settings({"axis": "up"})
    with pytest.raises(TransectError, match="unknown method 'magic'; known: amp"):
        method("magic")


def test_every_method_is_documented():
    assert {m.name for m in methods()} >= {"svd", "fwsvd", "asvd", "svd-llm", "kfac-svd"}
    for entry in methods():
        assert entry.summary.endswith(".") and entry.paper
        assert all(parameter.help for parameter in entry.parameters)
