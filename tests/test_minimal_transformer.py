"""Attention with merged, symmetric and missing matrices."""

import pytest
import torch
from torch import nn

from transect.errors import TransectError
from transect.parts import Around
from transect.parts.catalog.minimal_transformer import Minimal, NoMLP

X = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_one_head_is_attention_with_its_matrices_merged():
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(16, 1, bias=False, batch_first=True).double()
    q, k, v = whole.in_proj_weight.chunk(3)
    one = Minimal(16, 1, False).double()
    one.factor.data[0] = q.T @ k
    one.output.weight.data = whole.out_proj.weight @ v
    torch.testing.assert_close(one(X, Around()), whole(X, X, X)[0])


@pytest.mark.parametrize("heads", [1, 4])
def test_a_symmetric_similarity_is_positive_and_only_its_lower_half_is_trained(heads):
    torch.manual_seed(0)
    one = Minimal(16, heads, False, similarity="symmetric").double()
    parts = X.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = parts @ one.similarities() @ parts.transpose(-1, -2)
    torch.testing.assert_close(scores, scores.transpose(-1, -2))
    own = scores.diagonal(dim1=-2, dim2=-1)
    assert bool((own >= 0).all()) and bool((scores**2 <= own[..., None] * own[..., None, :] + 1e-9).all())
    one(X, Around()).square().sum().backward()
    assert not one.factor.grad.triu(1).any() and one.factor.grad.tril().any()


def test_without_values_outputs_are_convex_combinations():
    torch.manual_seed(0)
    one = Minimal(16, 1, False, values="none").double()
    y = one(X, Around())
    assert bool((y <= X.max(1, keepdim=True).values + 1e-12).all())
    assert bool((y >= X.min(1, keepdim=True).values - 1e-12).all())
    constant = X[:, :1].expand(2, 7, 16)
    torch.testing.assert_close(one(constant, Around()), constant)
    assert torch.linalg.matrix_rank(one(X[:, [0, 1, 0, 1, 0]], Around())[0]) <= 2
    assert sum(p.numel() for p in one.parameters()) == 16 * 16


def test_counts_and_bad_input():
    assert sum(p.numel() for p in Minimal(16, 4, True).parameters()) == 4 * 16 + 16 * 16
    assert not NoMLP()(X).any()
    with pytest.raises(TransectError, match="3 heads do not divide a width of 16"):
        Minimal(16, 3, True)
