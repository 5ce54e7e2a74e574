"""Maestro: factors, the order of their components, the penalty, shrinking, and the cut to a budget."""

import math

import pytest
import torch
from torch import nn

from transect.errors import OutOfReach, TransectError
from transect.operators import LowRank, stored_bytes
from transect.training import parametrization_named
from transect.training.parametrizations.maestro import ROUNDS, Nested, Ordered, most_important, stored

MAESTRO = parametrization_named("maestro")


def settings(**given):
    return MAESTRO.settings({"lasso": 0.0, **given})


def layers(*shapes, seed=0):
    torch.manual_seed(seed)
    return [nn.Linear(n, m).double() for m, n in shapes]


def nested(*shapes, **given):
    made = {f"{i}": Ordered(one.weight, one.bias) for i, one in enumerate(layers(*shapes))}
    return Nested(made, settings(**given))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_it_starts_as_the_layer_and_counts_only_what_is_kept(shape):
    (layer,) = layers(shape)
    one, x = Ordered(layer.weight, layer.bias), torch.randn(2, 3, shape[1], dtype=torch.float64)
    torch.testing.assert_close(one(x), layer(x), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(one.weight, layer.weight, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(one.u.square().sum(0), one.v.square().sum(1))  # the root of Σ goes to both
    assert isinstance(one.eval().finished(), torch.Tensor)  # all components are more than the matrix
    one.cut.fill_(2)
    done = one.finished()
    assert isinstance(done, LowRank)
    done.set_bias(one.bias)
    torch.testing.assert_close(done(x), one(x))
    assert stored_bytes(done) == 8 * (2 * sum(shape) + shape[0])


def test_a_part_of_the_components_is_used_and_none_leaves_the_bias():
    (layer,) = layers((5, 7))
    one, x = Ordered(layer.weight, layer.bias).train(), torch.randn(2, 3, 7, dtype=torch.float64)
    assert [one.prefix(share) for share in (0, 0.2, 0.21, 0.6, 1)] == [0, 1, 2, 3, 5]
    one.kept.fill_(3)  # the share is of what has not died out
    assert [one.prefix(share) for share in (0.3, 1 / 3, 0.5, 1)] == [1, 1, 2, 3]
    with one.limited(one.prefix(0.5)):
        torch.testing.assert_close(one.weight, one.u[:, :2] @ one.v[:2])
        torch.testing.assert_close(one(x), nn.functional.linear(x, one.weight, one.bias))
    with one.limited(one.prefix(1)):
        whole = one(x)
    assert torch.equal(one(x), whole)
    with one.limited(0):
        assert torch.equal(one(x), layer.bias.expand(2, 3, 5))


@pytest.mark.parametrize("kind", ["map", "autoencoder"])
def test_sampled_prefixes_become_the_best_of_their_rank(kind):
    """E|(T - Ŵ) x|²: of a map with isotropic inputs, by singular values; where T is the identity, PCA of the inputs."""
    size = 8 if kind == "map" else 5
    generator = torch.Generator().manual_seed(3)

    def turned():
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q

    spectrum = torch.linspace(2, 0.5, size, dtype=torch.float64)
    scaled = (turned() * spectrum) @ turned()
    target, root = (scaled, torch.eye(size).double()) if kind == "map" else (torch.eye(size).double(), scaled)
    one = Ordered(torch.randn(size, size, generator=generator, dtype=torch.float64), None).train()
    together = Nested({"one": one}, settings())
    optimizer = torch.optim.SGD([one.u, one.v], lr=0.02, momentum=0.9)

    def error():
        return ((target - one.weight) @ root).square().sum()

    torch.manual_seed(0)
    for _ in range(800):
        optimizer.zero_grad()
        together.penalty(error).backward()
        optimizer.step()
    for rank in range(1, size + 1):
        with torch.no_grad(), one.limited(rank):
            best = float(spectrum[rank:].square().sum())
            assert float(error()) == pytest.approx(best, abs=1e-4 * float(spectrum.square().sum()))


def test_every_pair_of_a_matrix_and_a_prefix_is_as_likely():
    together = nested((3, 4), (2, 6))
    names = {one: name for name, one in together.stand_ins.items()}
    together.stand_ins["0"].kept.fill_(2)
    torch.manual_seed(0)
    drawn = [(names[one], rank) for one, rank in (together.drawn() for _ in range(400))]
    assert set(drawn) == {("0", 1), ("0", 2), ("1", 1), ("1", 2)}
    assert all(70 < drawn.count(pair) < 130 for pair in set(drawn))
    seen = []
    together.penalty(lambda: seen.append([one.train().rank for one in together.stand_ins.values()]) or torch.zeros(()))
    assert sum(rank < 2 for rank in seen[0]) <= 1  # all others whole


def test_without_penalty_and_sampling_it_is_factorized_training():
    together = nested((3, 4), sample=False)

    def again():
        raise AssertionError("it was run again")

    assert together.penalty(again) is None


def test_the_penalty_pulls_later_components_harder_and_has_a_gradient_at_zero():
    (layer,) = layers((6, 6))
    one = Ordered(layer.weight, None)
    value = one.penalty()
    plain = one.u.norm(dim=0).sum() + one.v.norm(dim=1).sum()
    assert value > plain
    torch.testing.assert_close(value, sum(one.u[:, j:].norm() + one.v[j:].norm() for j in range(6)))
    value.backward()
    pull = one.u.grad.norm(dim=0) / one.u.norm(dim=0)
    assert (pull.diff() > 0).all()
    nn.init.zeros_(one.u)
    one.zero_grad()
    one.penalty().backward()
    assert one.u.grad.isfinite().all()


def test_importance_falls_and_the_last_die_out():
    together = nested((6, 9), (5, 5), threshold=0.8, interval=2)
    one = together.stand_ins["0"]
    with torch.no_grad():
        one.u.copy_(torch.randn_like(one.u))  # in no order
        one.u.mul_(0.6)
    importance = one.importance()
    assert (importance.diff() <= 0).all()
    survive = int((importance >= 0.8).sum())
    assert 0 < survive < 6
    together.after_step(1, 4, None)
    assert int(one.kept) == 6
    together.after_step(2, 4, None)
    assert int(one.kept) == int(one.cut) == survive and len(one.importance()) == survive
    x = torch.randn(2, 9, dtype=torch.float64)
    torch.testing.assert_close(one.train()(x) - one.bias, x @ (one.u[:, :survive] @ one.v[:survive]).T)
    assert torch.equal(one.eval()(x), one.train()(x))


def test_a_heavier_penalty_leaves_fewer_components():
    ranks = []
    for lasso in (0.0, 0.003, 0.03):
        together = nested((8, 8), lasso=lasso, sample=False, threshold=0.02)
        (one,) = together.stand_ins.values()
        target = one.weight.detach().clone()
        optimizer = torch.optim.SGD([one.u, one.v], lr=0.2)
        for step in range(1, 101):
            optimizer.zero_grad()
            error = (target - one.train().weight).square().mean()
            term = together.penalty(error.clone)
            (error if term is None else error + term).backward()
            optimizer.step()
            together.after_step(step, 100, optimizer)
        ranks.append(int(one.kept))
    assert ranks[0] == 8 and ranks[0] > ranks[1] > ranks[2] > 0, ranks


@pytest.mark.parametrize("keep", [0.45, 0.6, 0.8])
def test_the_cut_is_within_the_budget_and_no_worse_than_by_importance(keep):
    shapes, calls = [(8, 8), (12, 6), (6, 12), (10, 10)], []
    together = nested(*shapes, keep=keep, tries=3)
    each = list(together.stand_ins.values())
    budget = keep * sum(m * n for m, n in shapes)
    by_importance = [int(one.cut) for one in each]
    assert stored(each, by_importance) <= budget
    one_more = [stored(each, [r + (i == j) for j, r in enumerate(by_importance)]) for i in range(4)]
    assert min(one_more) > budget  # nothing that would fit is left out
    weights = [1.0, 30.0, 0.1, 3.0]  # what an error of each matrix costs
    wanted = [layer.weight.detach() for layer in layers(*shapes)]

    @torch.no_grad()
    def measure():
        calls.append(None)
        parts = zip(weights, wanted, each, strict=True)
        return sum(float(w * (target - one.eval().weight).square().sum()) for w, target, one in parts)

    before = measure()
    found = together.finish(measure)
    ranks = [int(one.cut) for one in each]
    assert stored(each, ranks) <= budget and len(calls) - 1 <= ROUNDS * (3 + 1) + 2
    assert found == measure() < before and ranks[1] >= by_importance[1]
    together.after_step(1, 2, None)
    assert together.finish(lambda: float("nan")) is None and [int(one.cut) for one in each] == by_importance


def test_what_is_kept_is_a_prefix_of_the_most_important():
    together = nested((8, 8), (12, 6), keep=0.5)
    each = list(together.stand_ins.values())
    ranks = most_important(each, [5, 2], math.inf)
    assert ranks == [5, 2] and most_important(each, [5, 2], 0) == [0, 0]
    assert together.finish(lambda: 1.0) == 1.0  # no cut is better than another
    assert nested((8, 8)).finish(lambda: 1.0) is None  # nothing has to go


def test_ranks_fall_to_the_budget_while_it_is_trained():
    together = nested((8, 8), (12, 6), keep=0.5, interval=2, ramp=0.5)
    each = list(together.stand_ins.values())
    sizes = []
    for step in range(9):
        together.after_step(step, 8, None)
        sizes.append(stored(each, [int(one.kept) for one in each]) / (64 + 72))
    assert sizes[:2] == [1, 1] and 0.5 < sizes[2] == sizes[3] <= 0.75 and 0.3 < sizes[4] == sizes[8] <= 0.5
    assert together.finish(lambda: 1.0) is None and all(one.kept == one.cut for one in each)


def test_what_leaves_nothing_is_refused_or_told():
    with pytest.raises(TransectError, match="would let every component of every matrix die out"):
        nested((4, 4), threshold=1e3)
    with pytest.raises(OutOfReach, match=r"one component of each matrix is 0\.5000 of their bytes"):
        nested((4, 4), (4, 4), keep=0.4)
    with pytest.raises(TransectError, match="not finite"):
        Ordered(torch.full((2, 2), torch.nan), None)
    together = nested((8, 8), (4, 4), keep=0.9, threshold=1e-3, interval=1)
    with torch.no_grad():
        together.stand_ins["1"].u.zero_()
    together.after_step(1, 2, None)
    with pytest.warns(UserWarning, match="nothing is left of 1: zeros are stored"):
        together.finish(lambda: float("nan"))
    done = together.stand_ins["1"].finished()
    assert not done.to_dense().any() and done.rank == 1
    with torch.no_grad():
        together.stand_ins["0"].u.zero_()
    with pytest.raises(TransectError, match="every component of every matrix has died out"):
        together.after_step(2, 2, None)
