"""Models with parts that do nothing: norms, features and matrices of zeros, and blocks that add nothing."""

import functools
import json
from dataclasses import replace

import pytest
import torch

import transect
from transect.anatomy import Anatomy
from transect.compression import method, registry, weighted_svd
from transect.compression import method as registered
from transect.compression.all_or_nothing import all_or_nothing
from transect.compression.cholesky import raised_cholesky
from transect.compression.head_width import narrower_values
from transect.errors import TransectError

from .models import VOCABULARY, logits, tiny
from .processes import Job

DATA = torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(5))
KEEP, KEEPS = 0.7, {"masa": 0.9}
QUICK = {
    "cospadi": {"iterations": 1}, "cospadi-shared": {"iterations": 1}, "armor": {"rounds": 3},
    "fusegpt": {"epochs": 1}, "jlcm": {"steps": 5}, "mixed": {"iterations": 1}, "dsformer": {"iterations": 1},
    "caldera": {"rounds": 2},
}  # fmt: skip
CASES = ("norm and matrices", "silent block and dead feature")  # two faults, in blocks of their own
_SECONDS = 300  # for all of them, which take some twenty: a loop without an end must not hold up the suite


def broken(case):
    """A tiny Llama, parts of whose blocks do nothing."""
    model = tiny("llama")
    first, second, third = Anatomy(model).blocks
    norms = [(layer.input_layernorm.weight, layer.post_attention_layernorm.weight) for layer in model.model.layers]
    weights = {
        "norm and matrices": (*norms[1], first.attention.q.weight, third.mlp.up.weight),
        "silent block and dead feature": (
            second.attention.o.weight, second.mlp.down.weight,  # as depth expansion makes them
            *(norm[3:4] for norm in norms[2]),
        ),
    }  # fmt: skip
    with torch.no_grad():
        for weight in weights[case]:
            weight.zero_()
    return model


def ways():
    """Every method as it is, with every allocation that it goes with, refitted, and block by block."""
    for one in transect.methods():
        if one.name == "expert-count":  # of mixtures of experts alone
            continue
        yield one.name, {}
        if one.refit:
            yield one.name, {"refit": True}
    for one in transect.allocations():
        quick = {"ilp": {"allocation_trials": 1}, "similarity": {"allocation_cap": 0.5}}.get(one.name, {})
        for name in ("kfac-svd", "asvd", "amp") if one.family == "sharing" else ("kfac-svd", "asvd"):
            if one.name != "uniform":
                yield name, {"allocation": one.name, **quick}
    yield from (("kfac-svd", {"sequential": True}), ("modegpt", {"sequential": True}))


def faults(case):
    """What goes wrong with any of the ways to compress the model of a case."""
    found = []
    for name, options in ways():
        model, keep = broken(case), KEEPS.get(name, KEEP)
        dense = Anatomy(model).matrix_bytes()
        try:
            transect.compress(model, name, keep, DATA, **options, **QUICK.get(name, {}))
        except Exception as error:
            found.append(f"{name} {options}: {type(error).__name__} {error}")
            continue
        finite = all(
            torch.isfinite(tensor).all() for tensor in [*model.parameters(), logits(model, {"input_ids": DATA})]
        )
        kept = Anatomy(model).matrix_bytes() / dense
        least = 0.1 if registered(name).even or name == "mixed" else 0.4  # integers: so many bits, and none between
        if not finite or not least < kept <= keep * (1 + 1e-9):
            found.append(f"{name} {options}: finite {finite}, kept {kept:.3f} of {keep}")
    return found


FAULTS = """
import json, warnings
from tests.test_degenerate import CASES, faults
warnings.simplefilter("ignore")
print(json.dumps({case: faults(case) for case in CASES}))
"""


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """The faults of all cases, from a process of its own, which can be ended."""
    done = forks.run(Job(before=FAULTS, seconds=_SECONDS), tmp_path_factory.mktemp("degenerate"))
    assert done.code == 0, done.err[-2000:]
    return json.loads(done.out.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_every_method_and_allocation_ends_with_finite_numbers_within_the_budget(case, found):
    assert found[case] == []


# The pieces


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("diagonal", [True, False])
def test_under_a_metric_of_zeros_nothing_can_be_lost_and_plain_svd_decides(shape, side, diagonal):
    weight, size = randn(*shape), shape[0] if side == "output" else shape[1]
    zeros = torch.zeros(size) if diagonal else torch.zeros(size, size)
    made, plain = weighted_svd(weight, **{f"{side}_metric": zeros}), weighted_svd(weight)
    assert not made.singular_values.any()
    for rank in (2, 6):
        left, right = made.truncate(rank)
        expected = plain.truncate(rank)
        torch.testing.assert_close(left @ right, expected[0] @ expected[1])


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1e30])
def test_the_scale_of_a_metric_changes_the_losses_and_nothing_else(factor):
    weight, x, g = randn(6, 9), randn(30, 9), randn(20, 6) + 1
    metrics = g.T @ g, x.T @ x
    made, scaled = weighted_svd(weight, *metrics), weighted_svd(weight, metrics[0] * factor, metrics[1])
    torch.testing.assert_close(scaled.left @ scaled.right, weight)
    torch.testing.assert_close(scaled.singular_values / factor**0.5, made.singular_values)
    torch.testing.assert_close(scaled.left, made.left)


def test_cholesky_factors_are_raised_no_more_than_needed_and_not_forever():
    x = randn(3, 8)
    factor, strength = raised_cholesky(x.T @ x)
    torch.testing.assert_close(factor @ factor.T, x.T @ x, atol=1e-6, rtol=0)
    assert 0 < strength < 1e-6
    assert raised_cholesky(torch.eye(3), 0.5)[1] == 0.5
    assert torch.isfinite(raised_cholesky(torch.zeros(3, 3))[0]).all()
    for bad in (torch.full((3, 3), float("nan")), torch.diag(torch.tensor([1.0, -1e9, 1.0]))):
        with pytest.raises(TransectError, match="far from positive definite"):
            raised_cholesky(bad)


def test_values_that_are_never_excited_stay_in_range():
    values, outputs = randn(2, 4, 9), randn(2, 7, 4)
    covariance = torch.zeros(9, 9, dtype=torch.float64)
    narrow, wide = (narrower_values(values, outputs, covariance, count) for count in (2, 4))
    assert all(1e-3 < tensor.abs().max() < 1e3 for tensor in (*narrow, *wide))
    torch.testing.assert_close(wide[1] @ wide[0], outputs @ values)


# A result that is not finite


@pytest.fixture
def changed(monkeypatch):
    """Let a registered method's function be `then(result, *its arguments)`."""

    def change(name, then):
        function = method(name).function

        @functools.wraps(function)
        def after(*args, **settings):
            return then(function(*args, **settings), *args)

        monkeypatch.setitem(registry._methods, name, replace(method(name), function=after))

    return change


def assert_as_it_was(model, dense):
    """The same modules' worth of tensors, config and record as an untouched model."""
    after = model.state_dict()
    before = dense.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert model.config.to_dict() == dense.config.to_dict() and not Anatomy(model).record
    assert torch.equal(logits(model, {"input_ids": DATA}), logits(dense, {"input_ids": DATA}))


def spoiled_factors(made, weight, *statistics):
    if weight.shape == (32, 48):
        made.left[0, 0] = float("inf")
    return made


def spoiled_operator(made, weight, *statistics):
    if weight.shape == (32, 48):
        next(made.parameters()).data.flatten()[0] = float("nan")
    return made


def spoiled_block(made, block, *more):
    if block.index == 2:
        block.mlp.down.weight[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("name", "spoil"), [("svd", spoiled_factors), ("wanda", spoiled_operator), ("amp", spoiled_block)]
)
def test_a_result_with_infinite_numbers_is_refused_and_the_model_is_as_it_was(name, spoil, changed):
    """Also where other matrices have been replaced before."""
    changed(name, spoil)
    model = tiny("llama")
    with pytest.raises(TransectError, match=rf"{name} makes NaN or infinite numbers of blocks\.\d\.mlp\.down"):
        transect.compress(model, name, KEEP, DATA)
    assert_as_it_was(model, tiny("llama"))


@pytest.mark.parametrize("name", ["llm-drop", "fusegpt", "masa", "mixed", "cospadi-shared"])
def test_a_method_that_fails_at_its_end_leaves_the_model_as_it_was(name, changed):
    def fail(made, anatomy, *more):
        assert anatomy.matrix_bytes() < Anatomy(tiny("llama")).matrix_bytes()
        raise TransectError("too late")

    changed(name, fail)
    model = tiny("llama")
    with pytest.raises(TransectError, match="too late"):
        transect.compress(model, name, KEEPS.get(name, KEEP), DATA, **QUICK.get(name, {}))
    assert_as_it_was(model, tiny("llama"))


def test_all_or_nothing_takes_back_structure_attributes_and_tensors():
    model = tiny("llama")
    before = logits(model, {"input_ids": DATA})
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), all_or_nothing(model):
        anatomy = Anatomy(model)
        anatomy.blocks[0].attention.keep([0, 1])
        anatomy.blocks[1].mlp.drop()
        anatomy.drop_block(2)
        model.model.norm.weight.data = torch.zeros(32)
        raise KeyboardInterrupt
    assert not Anatomy(model).record and model.config.num_hidden_layers == 3
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model, {"input_ids": DATA}), before)
    with all_or_nothing(model):
        Anatomy(model).drop_block(2)
    assert len(Anatomy(model).blocks) == 2
