"""The one-layer approximator: copies within their bound, errors that fall with width, what it cannot do without."""

import math

import pytest
import torch
from torch.nn import functional

from transect.errors import TransectError
from transect.parts.construction import (
    Lookup,
    OneLayer,
    approximation_report,
    error_curve,
    interpolator,
    one_layer_approximator,
)
from transect.parts.construction.uat_single_layer import drawn


def target(x):
    """The card's: three tokens of one number, another function of all three at each position."""
    a, b, c = x[..., 0].unbind(1)
    return torch.stack([torch.sin(2 * a * b) + c, a * c, (a - b).abs()], dim=1)[..., None]


@pytest.mark.parametrize("beta", [0, 2, 5, 10, 20])
def test_copies_stay_within_their_bound_and_attention_is_the_formula(beta):
    made = OneLayer(3, 2, 1, width=0, beta=beta, radius=1.0)
    x = drawn(200, 3, 2, 1.0, 0)
    copies = made.copies(x)
    p = math.exp(beta) / (math.exp(beta) + 2)
    shares = torch.full((3, 3), (1 - p) / 2, dtype=torch.float64).fill_diagonal_(p)
    expected = (shares @ x)[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(copies, expected, atol=1e-12, rtol=0)
    error = float((copies - x[:, None]).norm(dim=-1).max().detach())
    assert error <= made.copy_bound
    assert beta == 0 or error > 0.2 * made.copy_bound
    if beta == 0:
        torch.testing.assert_close(copies, x.mean(1)[:, None, None].expand_as(copies))  # mean pooling


def test_the_error_falls_with_width_and_needs_attention_and_positions():
    rows = error_curve(target, 3, 1, widths=(16, 64, 256), samples=1500)
    errors = {}
    for row in rows:
        errors.setdefault((row["attention"], row["positions"]), []).append(row["rms"] / row["spread"])
    whole = errors[True, True]
    assert whole[0] > 2 * whole[1] > 4 * whole[2] and whole[2] < 0.15
    assert min(errors[False, True]) > 0.7 and min(errors[True, False]) > 0.7
    assert all(row["sup"] >= row["rms"] for row in rows)
    assert rows[0]["copy_error"] <= rows[0]["copy_bound"] and "copy_error" not in rows[1]


@torch.no_grad()
def test_without_positions_it_is_equivariant_and_without_width_constant():
    x = drawn(50, 3, 1, 1.0, 5)
    made = one_layer_approximator(target, 3, 1, width=32, samples=200, positions=False)
    order = [2, 0, 1]
    torch.testing.assert_close(made(x[:, order]), made(x)[:, order])
    symmetric = lambda x: x.mean(1, keepdim=True) * x  # noqa: E731 - what a token and the mean of all say
    report = approximation_report(symmetric, one_layer_approximator(symmetric, 3, 1, samples=500, positions=False))
    assert report["rms"] < 0.05 * report["spread"]
    none = one_layer_approximator(target, 3, 1, width=0, samples=2000)
    found = none(x)
    torch.testing.assert_close(found, found[:1].expand_as(found))
    torch.testing.assert_close(found[0], target(drawn(2000, 3, 1, 1.0, 0)).mean(0), atol=1e-6, rtol=0)


def test_the_network_is_least_squares_on_its_samples():
    x = drawn(60, 3, 1, 1.0, 0)
    made = one_layer_approximator(target, 3, 1, width=8, samples=60, ridge=0)
    error = (made(x) - target(x)).detach()
    hidden = torch.relu(made.up_proj(made.stream(x))).detach()
    normal = (hidden.flatten(0, 1).T @ error.flatten(0, 1)).abs().max()
    assert float(normal) < 1e-6 * float(hidden.abs().sum())
    torch.testing.assert_close(error.mean(0), torch.zeros(3, 1, dtype=torch.float64), atol=1e-8, rtol=0)


@torch.no_grad()
def test_a_lookup_goes_from_the_mean_to_the_nearest_centre():
    centres = drawn(1, 40, 2, 1.0, 3)[0]
    f = lambda x: torch.sin(3 * x[..., :1]) + x[..., 1:]  # noqa: E731
    torch.testing.assert_close(Lookup(centres, f(centres), 1e5)(centres), f(centres))
    x = drawn(30, 4, 2, 1.0, 4)
    torch.testing.assert_close(Lookup(centres, f(centres), 0)(x), f(centres).mean(0).expand(30, 4, 1))
    scores = -7 * torch.cdist(x.flatten(0, 1), centres).square()
    expected = (functional.softmax(scores, -1) @ f(centres)).unflatten(0, (30, 4))
    torch.testing.assert_close(Lookup(centres, f(centres), 7)(x), expected)
    nearest = f(centres)[torch.cdist(x.flatten(0, 1), centres).argmin(-1)].unflatten(0, (30, 4))
    assert float((Lookup(centres, f(centres), 1e6)(x) - nearest).abs().max()) < 1e-3


@torch.no_grad()
def test_interpolation_is_exact_at_its_knots_and_of_second_order_between():
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)[:, None]
    errors = []
    for knots in (11, 21, 41):
        made = interpolator(lambda t: torch.sin(3 * t), -1, 1, knots)
        t = torch.linspace(-1, 1, knots, dtype=torch.float64)[:, None]
        torch.testing.assert_close(made(t), torch.sin(3 * t))
        errors.append(float((made(x) - torch.sin(3 * x)).abs().max()))
        assert errors[-1] <= 9 * (2 / (knots - 1)) ** 2 / 8 * 1.001
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1) and errors[1] / errors[2] == pytest.approx(4, rel=0.1)
    bent = interpolator(torch.abs, -1, 1, 10)  # no knot at the bend: off by no more than a mesh
    assert 0.05 < float((bent(x) - x.abs()).abs().max()) <= 2 / 9


def test_what_cannot_be_built_is_one_error():
    for given, said in (
        (dict(n=0, d=1), "1 or more"), (dict(n=3, d=1, beta=-1), "0 or more"),
        (dict(n=3, d=1, radius=math.inf), "compact"), (dict(n=3, d=1, width=-1), "width 0 or more"),
    ):  # fmt: skip
        with pytest.raises(TransectError, match=said):
            one_layer_approximator(target, **given)
    with pytest.raises(TransectError, match="not finite"):
        one_layer_approximator(lambda x: 1 / (x * 0), 2, 1)
    with pytest.raises(TransectError, match="should give"):
        one_layer_approximator(lambda x: x.sum(1), 2, 1)
    with pytest.raises(TransectError, match="two knots"):
        interpolator(torch.sin, 0, 0, 5)
    with pytest.raises(TransectError, match="a value for each"):
        Lookup(torch.zeros(3, 1), torch.zeros(2, 1), 1.0)
