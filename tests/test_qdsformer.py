"""Doubly stochastic attention: sums, limits, invariances, gradients, padding, of each operator."""

import itertools

import pytest
import torch

from transect.errors import TransectError
from transect.parts import Around, build_model
from transect.parts.catalog.qdsformer import (
    QDSFormer,
    alone,
    block_means,
    censored,
    circuit,
    nearest,
    sinkhorn,
    squared_basis,
)  # fmt: skip

N, ALL = 8, torch.ones(1, 8, dtype=torch.bool)
OPERATORS = {"sinkhorn": 201, "qr": 1, "direct": 1500, "circuit": 1}


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(operator, **more):
    torch.manual_seed(0)
    return QDSFormer(16, 2, 8, False, operator=operator, steps=OPERATORS[operator], **more).double()


def errors(matrix):
    """Of rows and of columns."""
    return [float((matrix.sum(dim) - 1).abs().max()) for dim in (-1, -2)]


M = drawn(1, 2, N, N)


@pytest.mark.parametrize("operator", OPERATORS)
@torch.no_grad()
def test_rows_and_columns_sum_to_one_among_real_positions_and_the_mean_passes(operator):
    mixer = made(operator)
    for real in (ALL, ALL.clone().index_fill(1, torch.tensor([0, 3, 6]), False)):
        matrix = mixer.matrix(M, real)[0][:, real[0]][..., real[0]]
        assert max(errors(matrix)) < 1e-6 and float(matrix.min()) >= 0
        values = drawn(int(real.sum()), 3, seed=1)
        torch.testing.assert_close((matrix @ values).mean(1), values.mean(0).expand(2, -1), atol=1e-6, rtol=0)
        norms = torch.linalg.matrix_norm(matrix, 2)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-6, rtol=0)
    assert torch.linalg.matrix_norm(M.softmax(-1), 2).min() > 1.01  # softmax's is more
    odd = mixer.matrix(drawn(1, 2, 5, 5), torch.ones(1, 5, dtype=torch.bool))  # no power of two
    assert max(errors(odd)) < 1e-6


def test_one_step_of_sinkhorn_is_softmax_and_more_bring_the_columns_to_one():
    logits = 3 * M
    torch.testing.assert_close(sinkhorn(logits, 1), logits.softmax(-1), atol=1e-12, rtol=0)
    found = [errors(sinkhorn(M, steps)) for steps in (1, 3, 21, 201)]
    assert max(rows for rows, _ in found) < 1e-12
    assert all(b < a for (_, a), (_, b) in itertools.pairwise(found)) and found[-1][1] < 1e-10
    shifted = M + drawn(1, 2, N, 1, seed=1) + drawn(1, 2, 1, N, seed=2)
    torch.testing.assert_close(sinkhorn(shifted, 401), sinkhorn(M, 401))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        sinkhorn(M[:, :, order][..., order.flip(0)], 9), sinkhorn(M, 9)[:, :, order][..., order.flip(0)]
    )
    rows_alone = drawn(1, 1, N, 1).expand(1, 1, N, N)  # all that such logits say is lost
    torch.testing.assert_close(sinkhorn(rows_alone, 3), torch.full((1, 1, N, N), 1 / N, dtype=torch.float64))
    assert squared_basis(rows_alone, N).std() > 0.05


def test_the_basis_knows_neither_scale_nor_sign_and_begins_with_the_first_column():
    found = squared_basis(M, N)
    torch.testing.assert_close(squared_basis(-3 * M, N), found, atol=1e-5, rtol=0)
    first = M[..., 0].square()
    torch.testing.assert_close(found[..., 0], first / first.sum(-1, keepdim=True), atol=1e-6, rtol=0)
    order = torch.arange(N).roll(3)
    torch.testing.assert_close(squared_basis(M[:, :, order], N), found[:, :, order], atol=1e-5, rtol=0)
    assert (squared_basis(M[..., order], N) - found[..., order]).abs().max() > 0.1
    constant = squared_basis(torch.ones(1, 1, N, N, dtype=torch.float64), 4)
    assert max(errors(constant)) < 1e-6  # so that there is no NaN


def test_the_nearest_matrix_is_nearer_than_every_other():
    logits = drawn(1, 1, 4, 4)
    found = nearest(logits, torch.ones(1, 4, dtype=torch.bool), 2000)[0, 0]
    for order in itertools.permutations(range(4)):  # corners of the polytope: it lies behind no plane through `found`
        assert ((logits[0, 0] - found) * (torch.eye(4, dtype=torch.float64)[list(order)] - found)).sum() < 1e-6
    inside = sinkhorn(logits, 401)
    torch.testing.assert_close(nearest(inside, torch.ones(1, 4, dtype=torch.bool), 1), inside)


@pytest.mark.parametrize("auxiliary", [0, 1, 2])
def test_block_means_of_a_unitary_are_doubly_stochastic(auxiliary):
    size = N * 2**auxiliary
    any_unitary = torch.linalg.qr(torch.complex(drawn(size, size), drawn(size, size, seed=1))).Q
    ours = circuit(M, auxiliary, 0, 0)
    torch.testing.assert_close(ours @ ours.mH, torch.eye(size, dtype=ours.dtype).expand_as(ours))
    for unitary in (any_unitary, ours):
        assert max(errors(block_means(unitary, auxiliary))) < 1e-12
    if auxiliary == 0:
        permutation = torch.eye(N, dtype=torch.float64)[torch.randperm(N)]
        assert torch.equal(block_means(permutation, 0), permutation)
    later = M.clone()
    later[..., -1, -1] += 0.5  # the last of the logits gets in
    assert (circuit(later, auxiliary, 0, 0) - ours).abs().max() > 1e-3


def test_a_walk_that_is_seen_at_some_states_is_that_walk():
    matrix = sinkhorn(drawn(1, 1, 4, 4), 401)
    found = censored(matrix, torch.tensor([[True, True, False]]))[0, 0, :2, :2]
    paths, hidden = matrix[0, 0, :2, :2].clone(), matrix[0, 0, :2, 2:]
    for _ in range(200):  # step by step through what is hidden
        paths, hidden = paths + hidden @ matrix[0, 0, 2:, :2], hidden @ matrix[0, 0, 2:, 2:]
    torch.testing.assert_close(found, paths)


def test_gradients():
    for function in (lambda m: sinkhorn(m, 21), lambda m: squared_basis(m, 5), lambda m: nearest(m, ALL[:, :5], 9)):
        logits = drawn(1, 1, 5, 5).requires_grad_()
        assert torch.autograd.gradcheck(function, logits, atol=1e-4)
    low = (drawn(1, 1, N, 3) @ drawn(1, 1, 3, N, seed=1)).requires_grad_()  # more positions than a head is wide
    squared_basis(low, 3)[..., 0].sum().backward()
    assert low.grad.abs().max() < 1e3


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_at_padding_changes_nothing(operator):
    mixer, x = made(operator), drawn(2, 6, 16)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    other = x.clone()
    other[1, 4:] = 7
    with torch.no_grad():
        torch.testing.assert_close(mixer(other, Around(real))[real], mixer(x, Around(real))[real])


def test_what_it_cannot_be_is_refused():
    with pytest.raises(TransectError, match="cannot be causal"):
        build_model("llama", hidden=16, blocks=1, heads=2, vocabulary=8, parts={"mixer": "qdsformer"})
    with pytest.raises(TransectError, match="odd number of steps, not 4"):
        QDSFormer(16, 2, 8, False, steps=4)
    with pytest.raises(TransectError, match="has 12 qubits, and 10 can be"):
        made("circuit", auxiliary=8)(drawn(1, 16, 16), Around())
    assert alone(M, ~ALL, float("-inf"), 0.0).logsumexp(-1).isfinite().all()
