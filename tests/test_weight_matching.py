"""Weight matching: permutations change no function, assignments are exact, and what was permuted is found again."""

import copy
import itertools

import pytest
import torch
from torch import nn

import transect
from tests.models import CAUSAL, apart, assert_same_tensors, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.merging import match_chain, spectral_alignment
from transect.merging.chain import units_of_chain
from transect.merging.matching import assign, distance, match, products_of
from transect.merging.registry import tensors_of
from transect.merging.units import Channels, Heads, Stream, units_of

MORE = ["vit", "bert", "qwen2_moe", "falcon", "xglm", "stablelm-parallel", "granite_swa"]
# Where the residual stream keeps its order: a map outside the blocks, a router, positions that are sines.
FIXED_STREAM = {"vit", "bert", "qwen2_moe", "xglm"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def any_order(unit, random):
    """A random order that the unit can have: heads stay with their group."""
    if not isinstance(unit, Heads):
        return torch.randperm(unit.count, generator=random).tolist()
    size = unit.count // unit.a.key_value_heads
    groups = torch.randperm(unit.a.key_value_heads, generator=random).tolist()
    return [group * size + int(i) for group in groups for i in torch.randperm(size, generator=random)]


def scrambled(model, seed=0):
    moved = Anatomy(copy.deepcopy(model))
    random = generator(seed)
    for unit in units_of(Anatomy(model), moved):
        unit.put(any_order(unit, random))
    return moved.model


@pytest.mark.parametrize("name", [*CAUSAL, *MORE])
def test_a_permutation_changes_nothing_of_the_function_and_is_found_again(name):
    model = tiny(name)
    moved = scrambled(model)
    assert apart(logits(moved, inputs(name)), logits(model, inputs(name))) < 1e-5
    a, b = Anatomy(model), Anatomy(moved)
    units = units_of(a, b)
    assert any(isinstance(unit, Stream) for unit in units) == (name not in FIXED_STREAM)
    assert a.architecture.head_bias or name == "falcon" or any(isinstance(unit, Heads) for unit in units)
    before = distance(tensors_of(model), tensors_of(moved))
    done = match(units, generator(1))
    after = distance(tensors_of(model), tensors_of(moved))
    assert before > 1 and after**2 == pytest.approx(before**2 - 2 * done.gain, abs=1e-3 * before**2)
    if not {unit.kind for unit in units if isinstance(unit, Channels)} >= {"key"}:
        assert after == 0  # channels that are not turned, with their heads, may end elsewhere
    else:
        assert after < before


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bloom"])
def test_singular_values_and_lengths_stay(name):
    model = tiny(name)
    moved = scrambled(model, 3)
    for one, other in zip(Anatomy(model).matrices(), Anatomy(moved).matrices(), strict=True):
        torch.testing.assert_close(torch.linalg.svdvals(other.weight), torch.linalg.svdvals(one.weight))


def test_an_assignment_is_the_best_of_all():
    table = torch.randn(6, 6, generator=generator(), dtype=torch.float64)
    order, gain = assign(table)
    sums = {
        order: sum(float(table[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(6))
    }  # fmt: skip
    assert tuple(order) == max(sums, key=sums.__getitem__)
    assert gain == pytest.approx(max(sums.values()) - float(table.trace()))


def test_heads_are_assigned_together_with_their_groups():
    """Brute force over all orders of two groups of two heads."""
    a, b = (Anatomy(tiny("llama", seed)) for seed in (0, 1))
    unit = next(one for one in units_of(a, b) if isinstance(one, Heads))
    order, gain = unit.best()

    def product():
        one, other = tensors_of(a.model), tensors_of(b.model)
        return sum(float((one[name].double() * other[name].double()).sum()) for name in one)

    start, found = product(), {}
    for groups in ((0, 1), (1, 0)):
        for inner in itertools.product(((0, 1), (1, 0)), repeat=2):
            heads = [2 * group + i for group, each in zip(groups, inner, strict=True) for i in each]
            b = Anatomy(tiny("llama", 1))
            next(one for one in units_of(a, b) if isinstance(one, Heads)).put(heads)
            found[tuple(heads)] = product() - start
    assert tuple(order) == max(found, key=found.__getitem__)
    assert gain == pytest.approx(max(found.values()), rel=1e-4)


def test_the_objective_never_falls_and_warm_starts_lose_nothing():
    a, b = (Anatomy(tiny("qwen3", seed)) for seed in (0, 1))
    units, gains = units_of(a, b), []
    for unit in units:
        order, gain = unit.best()
        before = distance(tensors_of(a.model), tensors_of(b.model))
        unit.put(order)
        assert gain >= 0 and distance(tensors_of(a.model), tensors_of(b.model)) <= before + 1e-9
        gains.append(gain)
    match(units, generator())
    best = distance(tensors_of(a.model), tensors_of(b.model))
    again = match(units, generator(5))  # from a fixed point
    assert again.changed == 0 and again.sweeps == 1 and sum(gains) > 0
    assert distance(tensors_of(a.model), tensors_of(b.model)) == best


def chain(width, layers, seed):
    torch.manual_seed(seed)
    sizes = [16, *[width] * layers, 5]
    made = [module for pair in itertools.pairwise(sizes) for module in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*made[:-1])


@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_a_permuted_network_is_found_again(layers, seed):
    a = chain(64, layers, seed)
    b = copy.deepcopy(a)
    for unit in units_of_chain(a, b):
        unit.put(torch.randperm(64, generator=generator(seed)).tolist())
    x = torch.randn(8, 16)
    torch.testing.assert_close(b(x), a(x), rtol=0, atol=1e-5)
    moved, done = match_chain(a, b, seed)
    assert_same_tensors(moved, a)
    assert done.sweeps <= 20
    if layers == 1:
        assert done.changed == 1  # one step suffices


def test_the_identity_pair_stays():
    a = chain(32, 2, 0)
    moved, done = match_chain(a, a)
    assert done.changed == 0 and done.gain == 0
    assert_same_tensors(moved, a)
    merged = transect.merge([tiny("llama"), tiny("llama")], "weight-matching", curve=inputs("llama")["input_ids"])
    assert_same_tensors(merged.model, tiny("llama"))
    assert merged.outcome["told"]["orders changed"] == 0
    assert max(curve["barrier"] for curve in merged.outcome["curves"].values()) < 1e-6


def test_products_hold_biases():
    a, b = chain(8, 1, 0), chain(8, 1, 1)
    unit = units_of_chain(a, b)[0]
    a, b = ([one for one in network if isinstance(one, nn.Linear)] for network in (a, b))
    expected = a[0].weight @ b[0].weight.T + torch.outer(a[0].bias, b[0].bias) + a[1].weight.T @ b[1].weight
    torch.testing.assert_close(products_of(unit.rows()), expected.double().detach(), rtol=1e-5, atol=1e-6)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(TransectError, match="do not fit"):
        match_chain(chain(8, 1, 0), chain(9, 1, 0))
    softmax = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 4))
    with pytest.raises(TransectError, match="layer 1 is a Softmax"):
        match_chain(softmax, softmax)


def test_several_models_are_matched_to_the_first():
    model = tiny("llama")
    merged = transect.merge([model, scrambled(model, 1), scrambled(model, 2)], "weight-matching")
    for key, tensor in tensors_of(merged.model).items():
        torch.testing.assert_close(tensor, tensors_of(model)[key])
    assert merged.outcome["told"]["the same, aligned, model 3"] == 0


def test_models_with_parts_are_refused():
    model = transect.build("llama", hidden=32, blocks=2, heads=4, vocabulary=64, mixer="pooling")
    with pytest.raises(TransectError, match="a part in the place of its attention"):
        transect.merge([model, copy.deepcopy(model)], "weight-matching")


def test_alignment_of_singular_vectors():
    random = generator()
    one, other = (torch.randn(40, 30, generator=random, dtype=torch.float64) for _ in range(2))
    assert spectral_alignment([(one, one)]) == pytest.approx(1)
    assert spectral_alignment([(one, 3 * one)], 0.3) == pytest.approx(1)
    assert abs(spectral_alignment([(one, other)])) < 0.2
    u, s, v = torch.linalg.svd(one, full_matrices=False)
    w, t, z = torch.linalg.svd(other, full_matrices=False)
    identity = float((torch.outer(s, t) * (u.T @ w) * (v @ z.T)).sum())  # the sum with the products of singular values
    assert identity == pytest.approx(float((one * other).sum()))
