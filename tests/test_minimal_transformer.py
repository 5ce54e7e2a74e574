"""Attention with merged, symmetric and missing matrices."""

import pytest
import torch
from torch import nn

from transect.errors import TransectError
from transect.parts import Around
from transect.parts.catalog.minimal_transformer import Merged, Minimal, NoMLP, lower_triangles

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
def test_a_symmetric_similarity_is_positive_and_only_a_lower_half_is_stored(heads):
    torch.manual_seed(0)
    one = Minimal(16, heads, False, similarity="symmetric").double()
    size = 16 // heads
    lower = lower_triangles(one.factor, size)
    assert one.factor.shape == (heads, size * (size + 1) // 2) and torch.equal(lower, lower.tril())
    assert torch.equal(lower[0][torch.ones(size, size).tril().bool()], one.factor[0])  # row by row
    parts = X.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = parts @ one.similarities() @ parts.mT
    torch.testing.assert_close(scores, scores.mT)
    own = scores.diagonal(dim1=-2, dim2=-1)
    assert bool((own >= 0).all()) and bool((scores**2 <= own[..., None] * own[..., None, :] + 1e-9).all())
    assert float(torch.linalg.eigvalsh(one.similarities()).min()) > -1e-12
    weights = (scores * size**-0.5).softmax(-1)
    assert float((weights - weights.mT).detach().abs().max()) > 0.05  # rows add up to 1, each by its own sum
    one(X, Around()).square().sum().backward()
    assert one.factor.grad.ne(0).all()


@pytest.mark.parametrize("similarity", ["merged", "symmetric"])
@pytest.mark.parametrize("heads", [1, 4])
def test_outputs_are_the_inputs_weighed_by_what_the_similarities_say(heads, similarity):
    torch.manual_seed(0)
    one = Minimal(16, heads, False, similarity=similarity, values="none").double()
    parts = X.unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = (parts @ one.similarities() @ parts.mT * (16 // heads) ** -0.5).softmax(-1)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, 7, dtype=torch.float64))
    torch.testing.assert_close(one(X, Around()), (weights @ parts).transpose(1, 2).flatten(2))


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


WHOLE, HALF = 16 * 16, 16 * 17 // 2  # a matrix of the stream's width, and one below its diagonal with it


@pytest.mark.parametrize(
    ("part", "count"),
    [
        (Merged(16, 1, 1, 16, True, queries="separate", values="separate"), 4 * WHOLE),
        (Merged(16, 1, 1, 16, True, queries="merged", values="separate"), 3 * WHOLE),
        (Merged(16, 1, 1, 16, True, queries="separate", values="merged"), 3 * WHOLE),
        (Merged(16, 1, 1, 16, True), 2 * WHOLE),
        (Merged(16, 1, 1, 16, True, queries="symmetric", values="separate"), HALF + 2 * WHOLE),
        (Merged(16, 1, 1, 16, True, queries="symmetric"), HALF + WHOLE),
        (Minimal(16, 1, True), 2 * WHOLE),
        (Minimal(16, 1, True, similarity="symmetric"), HALF + WHOLE),
        (Minimal(16, 1, True, values="none"), WHOLE),
        (Minimal(16, 1, True, similarity="symmetric", values="none"), HALF),
        (Minimal(16, 4, True), 4 * 4 * 4 + WHOLE),  # a slice of the stream for each head
        (Minimal(16, 4, True, similarity="symmetric", values="none"), 4 * 4 * 5 // 2),
        (Merged(16, 4, 4, 4, True), 4 * 2 * WHOLE),  # whole ones: more than the four matrices' 4 d²
        (NoMLP(), 0),
    ],
)
def test_every_variant_has_as_many_numbers_as_the_formula_says(part, count):
    assert sum(parameter.numel() for parameter in part.parameters()) == count


def test_operations_do_not_depend_on_how_the_similarity_is_stored():
    assert Minimal(16, 4, True).flops == Minimal(16, 4, True, similarity="symmetric").flops == 2 * (4 * 16 + WHOLE)


def test_no_mlp_adds_nothing_and_heads_that_do_not_fit_are_refused():
    assert not NoMLP()(X).any()
    with pytest.raises(TransectError, match="3 heads do not divide a width of 16"):
        Minimal(16, 3, True)
