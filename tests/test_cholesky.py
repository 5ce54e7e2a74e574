import pytest
import torch

from transect.compression.cholesky import inverse_root, triangular_inverse
from transect.compression.nystrom import leverage_scores


def second_moments(n, rows):
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return x.T @ x / rows


@pytest.mark.parametrize("n", [1, 2, 64, 65, 131, 300])
def test_a_triangle_is_inverted_by_halves(n):
    root = torch.linalg.cholesky(second_moments(n, 2 * n + 3))
    inverse = triangular_inverse(root)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ root, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse, torch.linalg.inv(root), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [5, 150])
def test_the_inverse_root_is_that_of_the_damped_moments(n):
    moments = second_moments(n, 2 * n)
    upper, dead = inverse_root(moments, 0.01)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    assert torch.equal(upper, upper.triu()) and not dead.any()
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-9, atol=1e-9)


def test_leverage_scores_are_their_definition():
    moments = second_moments(150, 100)  # singular
    ridge = 0.05 * moments.diagonal().mean() * torch.eye(150, dtype=torch.float64)
    expected = (moments @ torch.linalg.inv(moments + ridge)).diagonal()
    torch.testing.assert_close(leverage_scores(moments, 0.05), expected, rtol=1e-9, atol=1e-9)
