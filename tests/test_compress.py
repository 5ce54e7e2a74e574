"""Compressing whole models: the verb, the order of calibration, the refit, and what is refused."""

import copy

import pytest
import torch

import transect
from transect.anatomy import Anatomy
from transect.compression import method as registered
from transect.compression import registry
from transect.compression.frame import factorize_matrix
from transect.errors import BadData, TransectError
from transect.evaluation import matrix_bytes
from transect.operators import LowRank
from transect.statistics import InputCovariance, collect

from .models import CONFIGS, VOCABULARY, assert_alike, assert_same_tensors, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
METHODS = ["svd", "fwsvd", "asvd", "svd-llm", "kfac-svd"]


def data_for(name):
    if name in ("vit", "deit"):
        return [inputs(name, batch=4, seed=seed) for seed in range(3)]
    if name in ("bert", "roberta"):
        labels = torch.where(torch.rand(DATA.shape, generator=torch.Generator().manual_seed(1)) < 0.3, DATA, -100)
        return [{"input_ids": DATA[i : i + 4], "labels": labels[i : i + 4]} for i in (0, 4, 8)]
    return DATA


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_is_compressed_within_its_budget_by_every_method(name):
    dense = tiny(name)
    whole = matrix_bytes(Anatomy(dense))
    batch = inputs(name)
    for method in METHODS:
        model = copy.deepcopy(dense)
        assert transect.compress(model, method, keep=0.6, data=data_for(name)) is model
        anatomy = Anatomy(model)
        assert 0.5 * whole < matrix_bytes(anatomy) <= 0.6 * whole
        low_rank = [isinstance(matrix.module, LowRank) for matrix in anatomy.matrices()]
        assert all(low_rank) if registered(method).allocation == "uniform" else any(low_rank)  # a ranking may skip some
        assert torch.isfinite(logits(model, batch)).all()
        assert anatomy.record.history[-1]["compress"]["method"] == method


@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_changes_nothing(method):
    model, batch = tiny("llama"), inputs("llama")
    before = logits(model, batch)
    transect.compress(model, method, keep=1.0, data=DATA)
    assert torch.equal(logits(model, batch), before) and not Anatomy(model).record


@pytest.mark.parametrize("allocation", ["uniform", "global", "ilp"])
def test_allocations_keep_the_budget_and_are_reproducible(allocation):
    few = {"allocation_trials": 3} if allocation == "ilp" else {}
    made = [transect.compress(tiny("llama"), "kfac-svd", 0.5, DATA, allocation=allocation, **few) for _ in range(2)]
    assert matrix_bytes(Anatomy(made[0])) <= 0.5 * matrix_bytes(Anatomy(tiny("llama")))
    assert_same_tensors(*made)


def output_errors(model, reference):
    """Squared error of each matrix of the last block on the inputs it has in `model`."""
    anatomy, twin = Anatomy(model), Anatomy(reference)
    found = {}
    for matrix, dense in zip(anatomy.matrices(), twin.matrices(), strict=True):
        seen = []
        handle = matrix.host.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0].detach()))
        logits(model, {"input_ids": DATA})
        handle.remove()
        x = seen[0].reshape(-1, seen[0].shape[-1])
        found[matrix.name] = ((x @ (dense.weight - matrix.weight).T) ** 2).sum().item()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_refitting_never_raises_the_error_it_is_fitted_to(name):
    """In the first block's q, k and v, whose input no refit before them changes."""
    plain = transect.compress(tiny(name), "svd-llm", 0.4, DATA, sequences=12, batch_size=12)
    refitted = transect.compress(tiny(name), "svd-llm", 0.4, DATA, sequences=12, batch_size=12, refit=True)
    before, after = output_errors(plain, tiny(name)), output_errors(refitted, tiny(name))
    for key, error in after.items():
        if key.startswith("blocks.0") and key.endswith((".q", ".k", ".v")):
            assert error <= before[key] * (1 + 1e-4), key
    assert sum(after.values()) < sum(before.values()) * 1.05


def test_sequential_calibration_sees_the_compressed_blocks():
    """Block 2's statistics under sequential compression are those of the model whose blocks 0 and 1 are compressed."""
    model = transect.compress(tiny("llama"), "svd-llm", 0.5, DATA, batch_size=12, sequential=True)
    partly = tiny("llama")
    done, anatomy = Anatomy(model), Anatomy(partly)
    for matrix, source in zip(anatomy.matrices(), done.matrices(), strict=True):
        if matrix.block.index < 2:
            matrix.replace(copy.deepcopy(source.module))
    store = collect(anatomy, [{"input_ids": DATA}], [InputCovariance()])
    block = anatomy.blocks[2]
    for matrix, source in zip(block.matrices(), done.blocks[2].matrices(), strict=True):
        chosen = registered("svd-llm")
        made = factorize_matrix(matrix, chosen, chosen.settings({}), store)
        left, right = made.truncate(source.module.rank)
        torch.testing.assert_close(left @ right, source.weight, rtol=1e-3, atol=1e-4)


def test_only_chosen_roles_are_compressed():
    model = transect.compress(tiny("llama"), "svd", 0.5, roles=["up", "down"])
    assert {m.role for m in Anatomy(model).matrices() if isinstance(m.module, LowRank)} == {"up", "down"}


def test_statistics_are_read_from_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "statistics.safetensors"
    first = transect.compress(tiny("llama"), "svd-llm", 0.5, DATA, cache=cache)
    monkeypatch.setattr("transect.compression.calibrate.collect", lambda *a, **k: pytest.fail("collected again"))
    again = transect.compress(tiny("llama"), "svd-llm", 0.5, DATA, cache=cache)
    assert_alike(logits(first, inputs("llama")), logits(again, inputs("llama")))  # the cache lies elsewhere in memory


def test_the_cache_is_of_one_configuration_and_of_one_set_of_positions(tmp_path):
    """The same weights with other rotations, and the same tokens at other positions, have other statistics."""
    cache = tmp_path / "statistics.safetensors"
    packed = {"input_ids": DATA[:1], "position_ids": torch.arange(DATA.shape[1])[None]}
    restarted = {**packed, "position_ids": packed["position_ids"] % 5}
    other = tiny("gpt2")
    other.config.scale_attn_weights = False
    for layer in other.transformer.h:
        layer.attn.scaling = 1.0
    made = [
        transect.compress(model, "svd-llm", 0.5, data, cache=cache)
        for model, data in ((tiny("gpt2"), [packed]), (other, [packed]), (tiny("gpt2"), [restarted]))
    ]
    fresh = transect.compress(tiny("gpt2"), "svd-llm", 0.5, [restarted])
    states = [model.state_dict() for model in (*made, fresh)]
    key = "transformer.h.2.mlp.c_proj.left.weight"
    assert not torch.equal(states[0][key], states[1][key]) and not torch.equal(states[0][key], states[2][key])
    torch.testing.assert_close(states[2][key], states[3][key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "unknown method"), ({"keep": 0}, "above 0"), ({"keep": 1.5}, "at most 1"),
        ({"keep": 0.01}, "leaves no rank"), ({"allocation": "best"}, "unknown allocation"),
        ({"data": None}, "needs calibration"), ({"shrinkage": 3}, "shrinkage=3"),
        ({"colour": 1}, "no parameter colour"), ({"roles": ["x"]}, "roles must be a list"),
        ({"method": "svd", "sequential": True}, "uses no calibration"), ({"method": "svd", "refit": True}, "no refit"),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(change, message):
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = {"method": "svd-llm", "keep": 0.5, "data": DATA} | change
    with pytest.raises(TransectError, match=message):
        transect.compress(model, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bad_models_and_data():
    model = tiny("llama")
    with pytest.raises(BadData, match="disagree"):
        transect.compress(model, "svd-llm", 0.5, torch.full((2, 8), 10_000))
    Anatomy(model).blocks[2].mlp.gate.weight[0, 0] = float("nan")
    with pytest.raises(TransectError, match=r"gate_proj.*NaN"):
        transect.compress(model, "svd", 0.5)
    with pytest.raises(TransectError, match="no_such_folder"):
        transect.compress("./no_such_folder", "svd", 0.5)


def test_a_method_may_ask_for_data_without_a_statistic(monkeypatch):
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    seen = []

    @registry.restructuring("counting", paper="-", check=lambda anatomy, keep: None, data=True)
    def counting(anatomy, calibration, keep):
        """Count the sequences."""
        assert calibration.statistics is None
        seen.append(calibration.batches.examples)

    with pytest.raises(TransectError, match="data="):
        transect.compress(tiny("llama"), "counting", 1.0)
    assert not seen
    transect.compress(tiny("llama"), "counting", 1.0, DATA)
    assert seen == [len(DATA)]
