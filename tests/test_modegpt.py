"""The "must hold" items of the card modegpt, against brute force, and whole models cut by it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.claims import claims
from transect.claims.context import Context, Measured
from transect.compression import method
from transect.compression.allocation import Unit, allocation_named, share_out
from transect.compression.allocation.similarity import importance, removed_shares
from transect.compression.catalog.modegpt import (
    _slice_neurons,
    _slice_queries_and_keys,
    _slice_values,
    widths_for,
)
from transect.compression.head_width import narrower_values, output_power, strongest_channels
from transect.compression.nystrom import leverage_scores, nystrom_update
from transect.errors import OutOfReach, TransectError
from transect.operators.base import stored_bytes
from transect.operators.build import build
from transect.operators.scattered import LeadingColumns, LeadingRows, ScatteredRows
from transect.statistics import BlockSimilarity, InputCovariance, InputMean, collect

from .models import (
    CAUSAL,
    CONFIGS,
    VOCABULARY,
    assert_alike,
    assert_same_model,
    assert_same_tensors,
    inputs,
    logits,
    tiny,
)

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
NEEDS = [InputCovariance(), InputMean()]
NORMALISED = ["qwen3", "gemma3", "olmo2", "cohere"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data_for(name):
    return [inputs(name, batch=4, seed=seed) for seed in range(3)]


def prepared(name, dtype=torch.float64):
    """A tiny model, its blocks, and the statistics of its own data."""
    model = tiny(name, dtype=dtype)
    anatomy = Anatomy(model)
    batches = [inputs(name, batch=4, seed=seed, dtype=dtype) for seed in range(3)]
    return model, anatomy, collect(anatomy, batches, NEEDS)


# Type I: neurons


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_leverage_scores_sum_to_the_effective_dimension(ridge):
    hidden = randn(40, 15) * torch.linspace(0.1, 3, 15).double()
    covariance = hidden.T @ hidden / 40
    scores = leverage_scores(covariance, ridge)
    strength = ridge * covariance.diagonal().mean()
    brute = (covariance @ torch.linalg.inv(covariance + strength * torch.eye(15).double())).diagonal()
    torch.testing.assert_close(scores, brute, rtol=1e-8, atol=1e-10)
    values = torch.linalg.eigvalsh(covariance)
    assert scores.sum().item() == pytest.approx((values / (values + strength)).sum().item())
    assert (scores >= 0).all() and (scores < 1).all()
    assert (leverage_scores(torch.zeros(5, 5).double(), ridge) == 0).all()


def errors(weight, hidden, kept, new):
    return ((hidden @ weight.T - hidden[:, kept] @ new.T) ** 2).sum(1).mean()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 40), st.integers(1, 9), st.floats(1e-8, 1.0))
def test_the_update_never_raises_the_error_of_the_neurons_that_stay(seed, samples, count, ridge):
    weight, hidden = randn(6, 10, seed=seed), randn(samples, 10, seed=seed + 1).relu()
    hidden[:, 0] = 0  # a dead neuron
    kept = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    new = nystrom_update(weight, hidden.T @ hidden / samples, kept, ridge)
    bare = errors(weight, hidden, kept, weight[:, kept])
    assert errors(weight, hidden, kept, new) <= bare * (1 + 1e-9) + 1e-12


def test_the_update_is_the_least_squares_solution():
    weight, hidden = randn(6, 10), randn(50, 10, seed=1) @ randn(10, 10, seed=2)
    kept = torch.tensor([0, 3, 4, 8])
    expected = torch.linalg.lstsq(hidden[:, kept], hidden @ weight.T).solution.T
    new = nystrom_update(weight, hidden.T @ hidden / 50, kept, ridge=1e-13)
    torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-6)
    nothing_known = nystrom_update(weight, torch.zeros(10, 10).double(), kept)
    assert torch.equal(nothing_known, weight[:, kept])


def test_neurons_that_span_the_others_lose_nothing_on_the_calibration_data():
    weight, hidden = randn(6, 10), randn(50, 3, seed=1) @ randn(3, 10, seed=2)
    covariance = hidden.T @ hidden / 50
    kept = leverage_scores(covariance, 1e-2).argsort(descending=True)[:4].sort().values
    new = nystrom_update(weight, covariance, kept)
    scale = (hidden @ weight.T).square().sum(1).mean()
    assert errors(weight, hidden, kept, new) < 1e-8 * scale < errors(weight, hidden, kept, weight[:, kept])


def test_a_singular_covariance_summed_in_float32_is_handled():
    hidden = randn(30, 200).float() * 1e3
    covariance = (hidden.T @ hidden / 30).double()
    assert torch.linalg.eigvalsh(covariance)[0] < 0
    assert torch.isfinite(leverage_scores(covariance, 1e-12)).all()
    assert torch.isfinite(nystrom_update(randn(5, 200), covariance, torch.arange(100), 1e-12)).all()


def mlp_errors(name, **settings):
    """Squared error of the first MLP's output on the calibration data, 20 neurons kept."""
    model, anatomy, statistics = prepared(name)
    seen = {}
    block = anatomy.blocks[0]
    hooks = [block.mlp.up.host.register_forward_hook(lambda m, a, out: seen.update(x=a[0]))]
    logits(model, inputs(name, batch=4, seed=0, dtype=torch.float64))
    hooks[0].remove()

    def output():
        kept = {}
        hook = anatomy.blocks[0].mlp.down.host.register_forward_hook(lambda m, a, out: kept.update(y=out))
        logits(model, inputs(name, batch=4, seed=0, dtype=torch.float64))
        hook.remove()
        return kept["y"]

    before = output()
    _slice_neurons(block.mlp, statistics, 20, 1e-2, **settings)
    assert block.mlp.neurons == 20
    return (output() - before).square().sum().item()


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_in_a_model_the_update_lowers_the_mlps_error(name):
    updated, bare = (mlp_errors(name, selection="leverage", update=update) for update in (True, False))
    assert 0 < updated < bare
    assert mlp_errors(name, selection="magnitude", update=False) != bare


# Type II: queries and keys


def test_output_power_is_the_mean_square_of_the_outputs():
    x, weight, bias = randn(50, 7) + 1, randn(5, 7, seed=1), randn(5, seed=2)
    for b in (bias, None):
        y = x @ weight.T + (0 if b is None else b)
        power = output_power(weight, b, x.T @ x / 50, x.mean(0))
        torch.testing.assert_close(power, y.square().mean(0))


@pytest.mark.parametrize("rotary", [0, 2, 4, 6])
@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_the_strongest_channels_are_those_of_a_search_over_all_sets(rotary, count):
    if rotary == 6 and count % 2:
        return
    power = randn(3, 6).square()
    chosen = strongest_channels(power, rotary, count)
    half = rotary // 2
    for head in range(3):
        allowed = [
            set(candidate.tolist())
            for candidate in torch.combinations(torch.arange(6), count)
            if all((i in candidate) == (i + half in candidate) for i in range(half))
        ]
        best = max(allowed, key=lambda kept: power[head, sorted(kept)].sum().item())
        assert chosen[head].tolist() == sorted(best)


def test_neighbours_that_are_turned_together_are_kept_together():
    power = torch.rand(3, 6, generator=torch.Generator().manual_seed(4))
    sets = [{0, 1, 2, 3}, {0, 1, 4, 5}, {2, 3, 4, 5}]  # two pairs, or a pair and both singles
    for head, chosen in enumerate(strongest_channels(power, 4, 4, neighbours=True).tolist()):
        assert chosen == sorted(max(sets, key=lambda kept: power[head, sorted(kept)].sum().item()))


def test_rotary_positions_are_read_from_the_config():
    widths = {name: Anatomy(tiny(name)).blocks[0].rotary_width for name in CONFIGS}
    some = dict.fromkeys(("gpt2", "opt", "bert", "roberta", "vit", "deit", "bloom"), 0) | {"gpt_neox": 2, "gptj": 4}
    assert widths == {name: some.get(name, 8) for name in CONFIGS}
    assert {name for name in CONFIGS if Anatomy(tiny(name)).blocks[0].rotates_neighbours} == {"gptj", "cohere"}


def silence(matrix, channels, size):
    """Set these channels of every head to zero."""
    weight, bias = matrix.weight.clone(), matrix.bias
    for channel in channels:
        weight[channel::size] = 0
        if bias is not None:
            bias[channel::size] = 0
    matrix.write(weight, bias)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NORMALISED])
def test_channels_that_are_zero_in_queries_or_keys_are_dropped_without_a_trace(name, side):
    model = tiny(name, dtype=torch.float64)
    anatomy = Anatomy(model)
    dead = [2, 3] if name == "gptj" else [1, 5] if anatomy.blocks[0].rotary_width == 8 else [3, 6]
    for block in anatomy.blocks:
        silence(getattr(block.attention, side), dead, 8)
    batches = [inputs(name, batch=4, seed=seed, dtype=torch.float64) for seed in range(3)]
    statistics = collect(anatomy, batches, NEEDS)
    batch = inputs(name, dtype=torch.float64)
    before = logits(model, batch)
    for block in anatomy.blocks:
        _slice_queries_and_keys(block.attention, statistics, 6)
        assert block.attention.q.module.inner.out_features == 24
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-9)


def test_key_heads_choose_one_set_of_channels_for_all_their_query_heads():
    model, anatomy, statistics = prepared("llama")
    attention = anatomy.blocks[0].attention
    seen = {}
    for role in ("q", "k"):
        getattr(attention, role).host.register_forward_hook(
            lambda m, a, y, role=role: seen.setdefault(role, []).append(y)
        )
    for batch in data_for("llama"):
        logits(model, batch)
    q, k = (torch.cat(seen[role]).flatten(0, 1).square().mean(0).view(-1, 8) for role in ("q", "k"))
    _slice_queries_and_keys(attention, statistics, 4)
    positions = attention.q.module.positions.view(4, 4) - 8 * torch.arange(4)[:, None]
    for head in range(2):
        channel = (q[2 * head] + q[2 * head + 1]) * k[head]
        score = channel[:4] + channel[4:]
        pairs = score.argsort(descending=True)[:2].sort().values
        expected = torch.cat([pairs, pairs + 4])
        assert torch.equal(positions[2 * head].long(), expected) and torch.equal(
            positions[2 * head + 1].long(), expected
        )
        assert torch.equal(attention.k.module.positions.view(2, 4)[head].long(), expected + 8 * head)


# Type III: values and outputs


@pytest.mark.parametrize("d", [12, 3])
def test_narrower_values_leave_exactly_the_tail_of_the_spectrum(d):
    values, outputs, x = randn(2, 5, 9), randn(2, d, 5, seed=1), randn(60, 9, seed=2) @ randn(9, 9, seed=3)
    covariance = x.T @ x / 60
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    root = vectors * eigenvalues.sqrt() @ vectors.T
    spectra = torch.linalg.svdvals(outputs @ values @ root)
    for count in range(1, 6):
        new_values, new_outputs = narrower_values(values, outputs, covariance, count)
        assert new_values.shape == (2, count, 9) and new_outputs.shape == (2, d, count)
        gap = outputs @ values - new_outputs @ new_values
        error = (gap @ x.T).square().sum(1).mean(1)
        torch.testing.assert_close(error, spectra[:, count:].square().sum(1), rtol=1e-8, atol=1e-9)
        u, s, v = torch.linalg.svd(outputs @ values)
        plain = u[..., :count] * s[:, None, :count] @ v[:, :count] if count <= d else outputs @ values
        assert (error <= ((outputs @ values - plain) @ x.T).square().sum(1).mean(1) + 1e-9).all()
    torch.testing.assert_close(new_outputs @ new_values, outputs @ values)


def test_values_that_were_never_excited_are_handled():
    x = randn(2, 9)
    new = narrower_values(randn(2, 5, 9), randn(2, 12, 5, seed=1), x.T @ x / 2, 2)
    gap = randn(2, 12, 5, seed=1) @ randn(2, 5, 9) - new[1] @ new[0]
    assert (gap @ x.T).abs().max() < 1e-6
    for one in narrower_values(randn(2, 5, 9), randn(2, 12, 5), torch.zeros(9, 9).double(), 2):
        assert torch.isfinite(one).all()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_with_all_channels_kept_nothing_changes(name):
    """φ = 0: the values are another basis, queries and keys another order; biases have moved to the output."""
    model, anatomy, statistics = prepared(name)
    batch = inputs(name, dtype=torch.float64)
    before = logits(model, batch)
    for block in anatomy.blocks:
        _slice_queries_and_keys(block.attention, statistics, 8)
        _slice_values(block.attention, statistics, 8)
        assert block.attention.v.bias is None
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-6)


def test_a_value_bias_is_folded_where_the_output_matrix_has_none():
    _, anatomy, statistics = prepared("qwen2")
    attention = anatomy.blocks[0].attention
    v, o = attention.v, attention.o
    assert v.bias is not None and o.bias is None
    expected = o.weight @ v.bias.view(2, 1, 8).expand(2, 2, 8).flatten()
    _slice_values(attention, statistics, 3)
    torch.testing.assert_close(attention.o.bias, expected)


# The operators


def example_operators():
    a, bias = randn(4, 6), randn(12, seed=1)
    return [
        ScatteredRows.from_rows(a, torch.tensor([7, 0, 11, 3]), 12, bias),
        ScatteredRows.from_rows(a, torch.arange(4), 12),
        LeadingRows.from_rows(a, 2, 12, bias), LeadingColumns.from_columns(a.T, 2, 12, bias[:6]),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(4))
def test_operators_compute_their_dense_form_and_come_back_from_their_description(index):
    operator = example_operators()[index]
    x = randn(2, 3, operator.in_features)
    dense = operator.to_dense()
    assert dense.shape == (operator.out_features, operator.in_features) and (dense != 0).sum() == 24
    bias = 0 if operator.bias is None else operator.bias
    torch.testing.assert_close(operator(x), x @ dense.T + bias)
    torch.testing.assert_close(operator(x[0, 0]), operator(x)[0, 0])
    assert operator.flops == 2 * 24
    again = build(operator.describe()).double()
    assert again.describe() == operator.describe()
    again.load_state_dict(operator.state_dict())
    assert_alike(copy.deepcopy(again)(x), operator(x))
    operator(x).sum().backward()
    assert operator.inner.weight.grad.abs().sum() > 0


def test_the_order_in_which_rows_are_stored_does_not_matter():
    """Every pair of a rotary head in another order, with its place, is the same map."""
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    weight, bias, x = randn(6, 5), randn(6, seed=1), randn(3, 5, seed=2)
    permuted = ScatteredRows.from_rows(weight[order], order, 6, bias)
    torch.testing.assert_close(permuted(x), x @ weight.T + bias)
    with pytest.raises(TransectError, match="3 groups must divide"):
        LeadingRows.from_rows(randn(4, 6), 3, 12)


# Whole models


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_is_cut_within_its_budget(name):
    keep = 0.5
    model = tiny(name)
    dense, batch = Anatomy(model).matrix_bytes(), inputs(name)
    planned = [widths_for(block, keep, 1.0) for block in Anatomy(model).blocks]
    transect.compress(model, "modegpt", keep=keep, data=data_for(name), allocation="uniform")
    anatomy = Anatomy(model)
    assert (keep - 0.05) * dense < anatomy.matrix_bytes() <= keep * dense
    assert torch.isfinite(logits(model, batch)).all()
    for block, widths in zip(anatomy.blocks, planned, strict=True):
        attention, mlp = block.attention, block.mlp
        assert attention.heads == 4 and attention.head_size == 8  # what the model's own code sees
        assert mlp.neurons == widths.neurons < (128 if name in ("gpt2", "bloom") else 48)
        assert attention.v.module.inner.weight.shape == (attention.key_value_heads * widths.values, 32)
        assert attention.o.module.inner.weight.shape == (32, 4 * widths.values)
        if name in NORMALISED:
            assert isinstance(attention.q.module, torch.nn.Linear) and widths.channels == 8
        else:
            assert attention.q.module.inner.weight.shape == (4 * widths.channels, 32)
            assert attention.k.module.inner.weight.shape == (attention.key_value_heads * widths.channels, 32)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "qwen2", "qwen3", "phi3", "bert", "vit"])
def test_it_loads_again_and_generates_with_a_cache(name, tmp_path):
    model, batch = tiny(name), inputs(name)
    transect.compress(model, "modegpt", keep=0.6, data=data_for(name), allocation="uniform")
    model.save_pretrained(tmp_path)
    loaded = CONFIGS[name][1].from_pretrained(tmp_path)
    assert_same_model(loaded, model, batch)
    copied = copy.deepcopy(loaded).to(torch.float64)
    wide = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in batch.items()}
    torch.testing.assert_close(logits(copied, wide).float(), logits(model, batch), rtol=1e-4, atol=1e-4)
    if name in CAUSAL:
        ids = batch["input_ids"]
        with torch.no_grad():
            cached = loaded(ids[:, :7], use_cache=True)
            rest = loaded(ids[:, 7:], past_key_values=cached.past_key_values).logits
        torch.testing.assert_close(rest, logits(model, batch)[:, 7:], rtol=1e-4, atol=1e-4)


def test_queries_and_keys_can_be_spared():
    block = Anatomy(tiny("llama")).blocks[0]
    equal, spared, dense = (widths_for(block, 0.5, removal) for removal in (1.0, 0.25, 0.0))
    assert equal.channels < spared.channels < dense.channels == 8
    assert equal.values >= spared.values >= dense.values and equal.neurons > dense.neurons
    model = transect.compress(tiny("llama"), "modegpt", 0.5, DATA, allocation="uniform", query_key_removal=0.0)
    anatomy = Anatomy(model)
    assert isinstance(anatomy.blocks[0].attention.q.module, torch.nn.Linear)
    assert anatomy.matrix_bytes() <= 0.5 * Anatomy(tiny("llama")).matrix_bytes()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["llama", "gpt2", "qwen3", "gpt_neox"]), st.floats(0.02, 0.999), st.floats(0, 1))
def test_planned_widths_spend_the_budget_and_no_more(name, keep, removal):
    block = PLANNED[name]
    try:
        widths = widths_for(block, keep, removal)
    except OutOfReach:
        return
    heads, key_heads = block.attention.heads, block.attention.key_value_heads
    gated = 2 if block.mlp.gate is None else 3
    index = 2 if block.rotary_width > 0 and widths.channels < 8 else 0
    stored = (heads + key_heads) * (widths.channels * (32 * 4 + index) + widths.values * 32 * 4)
    stored += widths.neurons * gated * 32 * 4
    dense = sum(m.weight.numel() for m in block.matrices()) * 4
    slack = gated * 32 * 4 + 2 * (heads + key_heads) * (32 * 4 + 2)  # less than a neuron and one step of channels
    assert stored <= keep * dense < stored + slack
    assert min(widths.channels, widths.values, widths.neurons) >= 1


PLANNED = {name: Anatomy(tiny(name)).blocks[0] for name in ("llama", "gpt2", "qwen3", "gpt_neox")}


@pytest.mark.parametrize("unit", ["attention", "mlp"])
def test_blocks_that_have_lost_a_sublayer_or_heads(unit):
    model = tiny("llama")
    anatomy = Anatomy(model)
    getattr(anatomy.blocks[0], unit).drop()
    anatomy.blocks[1].attention.keep([2, 3])
    dense = anatomy.matrix_bytes()
    transect.compress(model, "modegpt", 0.6, DATA)
    assert anatomy.matrix_bytes() <= 0.6 * dense and torch.isfinite(logits(model, inputs("llama"))).all()


def test_sequential_calibration_and_reproducibility():
    made = [transect.compress(tiny("llama"), "modegpt", 0.6, DATA, sequential=True) for _ in range(2)]
    assert_same_tensors(*made)
    plain = transect.compress(tiny("llama"), "modegpt", 0.6, DATA)
    assert not torch.equal(logits(plain, inputs("llama")), logits(made[0], inputs("llama")))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"keep": 0.02}, "does not pay for one channel"), ("qwen3", {"keep": 0.2}, "does not pay"),
        ("llama", {"query_key_removal": 0.0, "keep": 0.1}, "does not pay"), ("llama", {"ridge": 0}, "ridge=0"),
        ("llama", {"selection": "random"}, "one of"), ("llama", {"roles": ["up"]}, "whole sublayers"),
        ("llama", {"data": None}, "needs calibration"),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(name, options, message):
    model = tiny(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(TransectError, match=message):
        transect.compress(model, "modegpt", **({"keep": 0.5, "data": DATA} | options))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_matrices_that_cannot_be_cut_are_refused():
    model = transect.compress(tiny("llama"), "svd", 0.6)
    with pytest.raises(TransectError, match="stored as LowRank"):
        transect.compress(model, "modegpt", 0.5, DATA)
    model = tiny("llama")
    model.config.head_dim = 10
    with pytest.raises(TransectError, match="do not consist of heads"):
        transect.compress(model, "modegpt", 0.5, DATA)
    model = tiny("opt")
    attention = Anatomy(model).blocks[1].attention
    attention.k.host.weight = attention.q.host.weight
    with pytest.raises(TransectError, match="share one weight"):
        transect.compress(model, "modegpt", 0.5, DATA)


# The allocation over blocks


def units(sizes=(1000, 1000, 1000, 1000)):
    return [
        Unit(f"blocks.{block}.{role}", block, role, size) for block, size in enumerate(sizes) for role in ("q", "up")
    ]


def shared(importances, keep, sizes=(1000, 1000, 1000, 1000), **settings):
    scores = {unit.name: importances[unit.block] for unit in units(sizes)}
    chosen = allocation_named("similarity")
    return chosen.function(units(sizes), keep, scores, **chosen.settings(settings))


def test_removed_shares_are_a_softmax_and_fall_with_importance():
    importances = torch.tensor([0.3, 0.1, 0.2, 0.25]).double()
    removed = removed_shares(importances, torch.ones(4).double(), 0.2, 0.5, 0.8)
    torch.testing.assert_close(removed, 4 * 0.2 * torch.softmax(-importances / 0.5, 0))
    assert removed.mean().item() == pytest.approx(0.2)
    assert (removed[importances.argsort()].diff() < 0).all()


def test_removed_shares_are_the_optimum_of_their_objective():
    """Nothing near them on the budget has a larger Σ s (1 - φ) + ε H(φ)."""
    importances, epsilon = torch.tensor([0.3, 0.1, 0.2, 0.25]).double(), 0.2
    removed = removed_shares(importances, torch.ones(4).double(), 0.3, epsilon, 0.99)

    def objective(phi):
        return (importances * (1 - phi) - epsilon * phi * phi.log()).sum()

    for seed in range(20):
        step = randn(4, seed=seed) * 1e-2
        assert objective(removed + step - step.mean()) < objective(removed)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1.5), st.integers(100, 5000)), min_size=1, max_size=8),
    st.floats(0.05, 0.99), st.floats(1e-5, 1e4),
)  # fmt: skip
def test_the_budget_is_met_under_the_cap(blocks, keep, temperature):
    importances, sizes = [list(column) for column in zip(*blocks, strict=True)]
    shares = shared(importances, keep, sizes, temperature=temperature)
    found = units(sizes)
    total = sum(unit.bytes for unit in found)
    spent = sum(unit.bytes * shares[unit.name] for unit in found)
    assert spent == pytest.approx(keep * total, rel=1e-9)
    assert all(min(0.2, keep) - 1e-9 <= share <= 1 for share in shares.values())
    assert all(shares[f"blocks.{block}.q"] == shares[f"blocks.{block}.up"] for block in range(len(sizes)))


def test_limits_of_the_temperature_and_the_cap():
    importances = [0.3, 0.1, 0.2, 0.25]
    assert list(shared(importances, 0.7, temperature=1e6).values()) == pytest.approx([0.7] * 8, abs=1e-5)
    cold = shared(importances, 0.9, temperature=1e-5)
    assert [cold[f"blocks.{block}.q"] for block in range(4)] == pytest.approx([1, 0.6, 1, 1])
    capped = shared(importances, 0.7, temperature=1e-5)  # 1.2 blocks to remove, at most 0.8 of each
    assert [capped[f"blocks.{block}.q"] for block in range(4)] == pytest.approx([1, 0.2, 0.6, 1])
    assert list(shared(importances, 0.1).values()) == pytest.approx([0.1] * 8)  # more than the cap from every block


@pytest.mark.parametrize("chosen", ["modegpt", "svd", "svd-llm"])
def test_it_goes_with_every_blockwise_method(chosen):
    model = transect.compress(tiny("llama"), chosen, 0.6, DATA, allocation="similarity")
    anatomy = Anatomy(model)
    assert 0.5 < anatomy.matrix_bytes() / Anatomy(tiny("llama")).matrix_bytes() <= 0.6


def test_a_blocks_score_is_its_measured_importance():
    anatomy = Anatomy(tiny("llama"))
    batches = [{"input_ids": DATA}]
    statistics = collect(anatomy, batches, [BlockSimilarity()])
    with torch.no_grad():
        states = anatomy.model(DATA, output_hidden_states=True).hidden_states
    cosine = torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean()
    score = importance(anatomy.blocks[0].matrix("up"), statistics)
    assert score == pytest.approx(1 - cosine.item(), abs=1e-6)
    everything = anatomy.matrices()
    scores = {m.name: importance(m, statistics) for m in everything}
    shares = share_out("similarity", everything, 0.6, scores, {})
    by_importance = sorted(everything, key=lambda m: scores[m.name])
    assert [shares[m.name] for m in by_importance] == sorted(shares.values())


def test_streamed_from_disk_it_is_the_same_model(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    options = {"batch_size": 4, "allocation": "similarity"}
    transect.compress(tmp_path / "dense", "modegpt", 0.6, DATA, **options, stream_to=tmp_path / "small")
    whole = transect.compress(tiny("llama"), "modegpt", 0.6, DATA, **options)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(streamed, inputs("llama")), logits(whole, inputs("llama")), rtol=1e-3, atol=1e-3)


def test_the_papers_allocation_is_the_default_and_a_named_one_wins(tmp_path):
    """Everywhere: in memory, block by block on compressed blocks, from disk, and in a comparison."""
    assert method("modegpt").allocation == "similarity" and method("svd-llm").allocation == "uniform"

    def shares(model):
        now, dense = Anatomy(model).blocks, Anatomy(tiny("llama")).blocks
        return [
            sum(stored_bytes(m.module) for m in block.matrices()) / sum(stored_bytes(m.module) for m in old.matrices())
            for block, old in zip(now, dense, strict=True)
        ]

    for options in ({}, {"sequential": True}):
        plain = transect.compress(tiny("llama"), "modegpt", 0.6, DATA, **options)
        named = transect.compress(tiny("llama"), "modegpt", 0.6, DATA, allocation="similarity", **options)
        uniform = transect.compress(tiny("llama"), "modegpt", 0.6, DATA, allocation="uniform", **options)
        assert torch.equal(logits(plain, inputs("llama")), logits(named, inputs("llama")))
        assert max(shares(plain)) - min(shares(plain)) > 0.2 > 0.03 > max(shares(uniform)) - min(shares(uniform))
        assert Anatomy(plain).record.history[-1]["compress"]["allocation"] == "similarity"
    tiny("llama").save_pretrained(tmp_path / "dense")
    transect.compress(tmp_path / "dense", "modegpt", 0.6, DATA, stream_to=tmp_path / "small")
    streamed = Anatomy(AutoModelForCausalLM.from_pretrained(tmp_path / "small"))
    assert streamed.record.history[-1]["compress"]["allocation"] == "similarity"
    assert shares(streamed.model)[0] > 0.7
    settings = {"similarity": {"temperature": 0.1}}
    frame = transect.compare(
        tiny("llama"), ["modegpt", "amp"], [0.6], DATA, DATA[:4], tmp_path / "run", settings=settings
    )  # fmt: skip
    assert list(zip(frame["method"], frame["allocation"], strict=True)) == [
        ("dense", "-"), ("modegpt", "similarity"), ("amp", "uniform"),
    ]  # fmt: skip
    assert "| modegpt | similarity |" in (tmp_path / "run" / "table.md").read_text()


def test_an_allocation_that_asks_too_much_of_a_block_is_named():
    model = tiny("qwen3")
    before = logits(model, inputs("qwen3"))
    with pytest.raises(OutOfReach, match=r"block 2.*similarity allocation"):
        transect.compress(model, "modegpt", 0.6, DATA)
    assert torch.equal(logits(model, inputs("qwen3")), before)


class Asked:
    """Stands for a context, and notes what is measured."""

    dense = SimpleNamespace(loss=0.0)
    keeps, budgets = (), Context.budgets

    def __init__(self):
        self.variants = []

    def require_language_model(self):
        pass

    def require_keep(self, keep):
        pass

    def compressed(self, variant, keep):
        self.variants.append(variant)
        return Measured(torch.zeros(3), torch.ones(3), keep)


@pytest.mark.parametrize(
    ("name", "allocation"), [("modegpt/nystrom", "uniform"), ("modegpt/nystrom-allocated", "similarity")]
)
def test_the_claims_on_the_update_fix_where_is_cut(name, allocation):
    (claimed,), asked = claims([name]), Asked()
    claimed.function(asked)
    assert {variant.allocation for variant in asked.variants} == {allocation}
    assert len({variant.settings for variant in asked.variants}) == 3


def test_claims_and_settings_are_there():
    assert [claim.name for claim in claims(["modegpt"])] == [
        "modegpt/nystrom", "modegpt/nystrom-allocated", "modegpt/below-svd-llm", "modegpt/allocation",
    ]  # fmt: skip
    assert all(
        parameter.help for parameter in [*method("modegpt").parameters, *allocation_named("similarity").parameters]
    )
