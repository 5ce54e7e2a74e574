"""Rank allocation: budgets, optimality, limits (the LEMS items of the kfac-svd card)."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transect.compression.allocation import (
    RankTable,
    allocate_ranks,
    allocation_named,
    check_keep,
    rank_of_share,
    total_bytes,
)
from transect.compression.allocation.ilp import depth_weights
from transect.errors import TransectError


def table(name, m, n, decay=0.5, scale=1.0, block=0):
    sigma = scale * torch.arange(1, min(m, n) + 1).double() ** -decay
    energies = sigma.square()
    losses = torch.cat([energies.flip(0).cumsum(0).flip(0), torch.zeros(1).double()])
    return RankTable(name, block, (m, n), losses, 4)


def predicted(tables, ranks):
    return sum(t.loss_at(ranks[t.name]) for t in tables)


def uniform_ranks(tables, keep):
    return {t.name: rank_of_share(t.name, t.shape, keep) for t in tables}


class measure_from:
    """A model whose divergence is exactly the sum of the matrices' losses."""

    def __init__(self, tables):
        self.tables = tables

    def __call__(self, ranks):
        return sum(t.loss_at(ranks.get(t.name)) for t in self.tables)

    def of_each(self, ranks, predictions):
        return {name: self({name: rank}) for name, rank in ranks.items()}


MATRIX = st.tuples(st.integers(4, 40), st.integers(4, 40), st.floats(0, 2), st.floats(0.01, 10))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(MATRIX, min_size=1, max_size=6),
    st.floats(0.55, 1.0),
    st.sampled_from(["uniform", "global", "ilp"]),
)  # fmt: skip
def test_no_allocation_exceeds_the_budget(shapes, keep, name):
    tables = [table(str(i), m, n, d, s, block=i) for i, (m, n, d, s) in enumerate(shapes)]
    if name == "uniform":
        ranks = uniform_ranks(tables, keep)
    else:
        ranks = allocate_ranks(name, tables, keep, measure_from(tables), {"trials": 2} if name == "ilp" else {})
    assert total_bytes(tables, ranks) <= keep * sum(t.dense_bytes for t in tables) * (1 + 1e-9)
    for t in tables:
        rank = ranks[t.name]
        assert rank is None or 1 <= rank <= t.largest_rank
    if keep == 1:
        assert set(ranks.values()) == {None}


def test_a_share_a_rounding_below_everything_is_everything():
    assert [rank_of_share("a", (4, 4), share) for share in (1.0, 1 - 1e-16, 1 - 1e-13, 0.999)] == [None, None, None, 1]


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.9])
def test_global_is_close_to_the_best_choice_and_beats_uniform(keep):
    """Against all combinations of two small matrices."""
    tables = [table("a", 10, 14, 0.8, 3), table("b", 12, 9, 0.3, 1)]
    budget = keep * sum(t.dense_bytes for t in tables)
    best = min(
        predicted(tables, ranks)
        for ranks in (
            dict(zip("ab", pair, strict=True))
            for pair in itertools.product(*[[None, *range(1, t.largest_rank + 1)] for t in tables])
        )
        if total_bytes(tables, ranks) <= budget
    )
    chosen = predicted(tables, allocate_ranks("global", tables, keep, None, {}))
    one_step = max(float(t.losses[1] - t.losses[2]) for t in tables)
    assert best <= chosen <= best + one_step
    assert chosen <= predicted(tables, uniform_ranks(tables, keep))


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.6, 0.8, 0.95])
def test_global_and_ilp_predict_no_more_loss_than_uniform(keep):
    tables = [table(str(i), 96, 96 + 32 * (i % 3), 0.3 + 0.2 * i, 1 + i, block=i) for i in range(6)]
    uniform = predicted(tables, uniform_ranks(tables, keep))
    for name in ("global", "ilp"):
        chosen = allocate_ranks(name, tables, keep, measure_from(tables), {})
        assert predicted(tables, chosen) <= uniform * 1.02  # ilp chooses among multiples of 8


def test_identical_matrices_get_the_same_rank_within_a_step_and_an_unimportant_one_goes_first():
    tables = [table(str(i), 96, 96, 0.5, block=0) for i in range(4)]
    ranks = allocate_ranks("ilp", tables, 0.7, measure_from(tables), {})
    sizes = [t.bytes_at(ranks[t.name]) / t.bytes_per_rank for t in tables]
    dense = {i for i, t in enumerate(tables) if ranks[t.name] is None}
    assert max(s for i, s in enumerate(sizes) if i not in dense) - min(sizes) <= 8 or dense
    minor = [*tables[:3], table("minor", 96, 96, 0.5, 1e-6)]
    ranks = allocate_ranks("ilp", minor, 0.8, measure_from(minor), {})
    assert ranks["minor"] == min(rank for rank in ranks.values() if rank is not None)


def test_depth_weights():
    assert (depth_weights(5, 1.0, 0.0) == 1).all() and (depth_weights(1, 2.0, 7.0) == 1).all()
    weights = depth_weights(6, 1.5, 3.0)
    assert weights[0] == pytest.approx(4) and weights[-1] == pytest.approx(1) and (np.diff(weights) <= 0).all()


def test_bad_budgets_and_names():
    with pytest.raises(TransectError, match="above 0 and at most 1"):
        check_keep(1.2)
    with pytest.raises(TransectError, match="leaves no rank for a"):
        rank_of_share("a", (4, 4), 0.1)
    with pytest.raises(TransectError, match=r"unknown allocation 'x'; known: .*global, ilp, .*uniform"):
        allocation_named("x")
