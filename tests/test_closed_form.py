"""Closed forms of ROME and MEMIT, and the scores of edits."""

from __future__ import annotations

import pytest
import torch

from transect.editing.closed_form import damped, rank_one, ridge
from transect.editing.patch import product
from transect.editing.scores import neighbourhood_score, rewrite_score
from transect.errors import TransectError


def problem(d_out: int = 5, d_in: int = 8, facts: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = draw(d_in, 3 * d_in)
    return root @ root.T / (3 * d_in), draw(d_in, facts), draw(d_out, facts), draw(d_out, d_in)


def test_rank_one_writes_the_value_and_leaves_everything_c_orthogonal_alone():
    moments, keys, targets, weight = problem()
    mean, key = keys[:, 0], keys[:, 0] + 0.1 * keys[:, 1]
    change = targets[:, 0] - weight @ key
    update = product(*rank_one(change, moments, mean, key))
    torch.testing.assert_close((weight + update) @ key, targets[:, 0], rtol=0, atol=1e-10)
    assert torch.linalg.matrix_rank(update) == 1
    direction = torch.linalg.solve(moments, mean)
    other = keys[:, 2] - direction * (direction @ keys[:, 2]) / (direction @ direction)
    torch.testing.assert_close(update @ other, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-10)


def test_rank_one_moves_the_outputs_on_the_text_least():
    moments, keys, targets, _ = problem()
    key = keys[:, 0]
    update = product(*rank_one(targets[:, 0], moments, key, key))
    cost = torch.trace(update @ moments @ update.T)
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        other = torch.randn(5, 8, generator=generator, dtype=torch.float64)
        other -= torch.outer(other @ key, key) / (key @ key)  # writes the same value
        assert abs(torch.trace(update @ moments @ other.T)) < 1e-9 * cost
        assert torch.trace((update + other) @ moments @ (update + other).T) > cost


def test_rank_one_refuses_a_key_that_the_direction_misses():
    moments, keys, targets, _ = problem()
    direction = torch.linalg.solve(moments, keys[:, 0])
    key = keys[:, 1] - direction * (direction @ keys[:, 1]) / (direction @ direction)
    with pytest.raises(TransectError, match="too large"):
        rank_one(targets[:, 0], moments, keys[:, 0], key)


def test_ridge_limits_and_its_agreement_with_rank_one():
    moments, keys, targets, _ = problem()
    torch.testing.assert_close(product(*ridge(targets, keys, moments, 1e-10)) @ keys, targets, rtol=0, atol=1e-5)
    assert product(*ridge(targets, keys, moments, 1e10)).norm() < 1e-8
    alone = product(*ridge(targets[:, :1], keys[:, :1], moments, 1e-9))
    torch.testing.assert_close(
        alone, product(*rank_one(targets[:, 0], moments, keys[:, 0], keys[:, 0])), rtol=1e-6, atol=1e-8
    )
    updates = [product(*ridge(targets, keys, moments, weight)) for weight in (0.01, 0.1, 1.0, 10.0)]
    left = [float((update @ keys - targets).norm()) for update in updates]
    size = [float(update.norm()) for update in updates]
    assert left == sorted(left) and left[0] < left[-1]
    assert size == sorted(size, reverse=True) and size[0] > size[-1]


def test_ridge_is_the_minimum_of_its_objective():
    moments, keys, targets, _ = problem()
    update = product(*ridge(targets, keys, moments, 0.3)).requires_grad_(True)
    cost = (update @ keys - targets).square().sum() + 0.3 * torch.trace(update @ moments @ update.T)
    (gradient,) = torch.autograd.grad(cost, update)
    assert gradient.abs().max() < 1e-10


def test_damping_only_where_it_is_needed():
    moments, *_ = problem()
    assert torch.equal(damped(moments), moments)
    moments[0] = moments[:, 0] = 0  # a neuron that is always off
    assert float(torch.linalg.cond(damped(moments))) == pytest.approx(1e8, rel=1e-3)
    with pytest.raises(TransectError, match="zero on all"):
        damped(torch.zeros(4, 4, dtype=torch.float64))


def test_scores():
    before, after = torch.tensor([0.2, 0.5, 1.0]), torch.tensor([0.6, 0.4, 1.0])
    assert rewrite_score(before, after).tolist() == pytest.approx([0.5, 0, 0])
    assert rewrite_score(before, after, lowers=True).tolist() == pytest.approx([0, 0.2, 0])
    near = neighbourhood_score(torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.0, 0.5, 1.0]))
    assert near.tolist() == pytest.approx([0, 1, 0])
