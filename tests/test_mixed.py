"""Mixed structures: prices against brute force, the program against enumeration, the refit against no refit."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.compression import method
from transect.compression.catalog.mixed.integers import (
    GROUP,
    best_grid,
    correction_leaves,
    integer_low_rank_options,
    integer_options,
)
from transect.compression.catalog.mixed.options import (
    Metric,
    Option,
    choose,
    dense,
    dictionary_options,
    factorized,
    least_narrow_bytes,
    low_rank_options,
    narrow_mlp_options,
    narrow_query_key_options,
    narrow_value_options,
)
from transect.compression.catalog.mixed.refit import refit_to_dense
from transect.compression.copying import working_copy
from transect.compression.integers import Grid
from transect.compression.weighted_svd import shrink
from transect.errors import OutOfReach
from transect.operators import LowRank
from transect.operators.corrected import Corrected
from transect.operators.dictionary import SparseDictionary
from transect.operators.grouped_integer import BITS, GroupedInteger
from transect.operators.quantized import Quantized
from transect.operators.scattered import LeadingColumns, LeadingRows, ScatteredRows
from transect.statistics import InputCovariance, InputMean, OutputGradientCovariance, collect, key_of

from .models import CAUSAL, VOCABULARY, assert_same_model, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
BATCHES = [{"input_ids": DATA[i : i + 4]} for i in (0, 4, 8)]


def metrics(model, shrinkage=0.1):
    wanted = [InputCovariance(), OutputGradientCovariance(), InputMean()]
    anatomy = Anatomy(model)
    store = collect(anatomy, BATCHES, wanted)

    def metric(matrix):
        inputs, gradients, mean = (store.value(key_of(matrix, one), one).double() for one in wanted)
        return Metric(matrix, shrink(inputs, shrinkage), shrink(gradients, shrinkage), mean)

    return [metric(matrix) for matrix in anatomy.blocks[0].matrices()]


def again(metrics):
    """Gives a matrix's metric, as the options ask for it when they are taken."""
    by_name = {metric.matrix.name: metric for metric in metrics}
    return lambda matrix: by_name[matrix.name]


def placed(model, option):
    """A copy of the model with the option in its first block."""
    copy = working_copy(Anatomy(model))
    option.put(copy.blocks[0])
    return copy


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_price_of_an_option_is_that_of_the_matrix_it_puts_in_place(name):
    model = tiny(name)
    for metric in metrics(model):
        weight = metric.matrix.weight.double().clone()
        one = lambda matrix, metric=metric: metric  # noqa: E731
        losses = factorized(metric).losses()
        options = [*low_rank_options(metric.matrix, losses, one, (0.3, 0.6)), *dictionary_options(metric, (0.6,), 3, 0)]
        assert len(options) == 3
        for option in options:
            copy = working_copy(Anatomy(model))
            option.put(copy.blocks[0])
            placed = copy.blocks[0].matrix(metric.matrix.role)
            assert isinstance(placed.module, (LowRank, SparseDictionary))
            change = weight - placed.weight.double()
            expected = torch.einsum("ij,jk,kl,il->", metric.gradients, change, metric.inputs, change)
            assert option.loss == pytest.approx(float(expected), rel=1e-3)
            tensors = [*placed.module.parameters(), *placed.module.buffers()]
            stored = sum(t.numel() * t.element_size() for t in tensors if t is not placed.module.bias)
            assert stored == option.bytes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_price_of_integers_is_about_that_of_what_they_put_in_place(name):
    """It is what is expected before anything is rounded, and the bytes are those that are stored."""
    model, found = tiny(name), []
    for metric in metrics(model):
        weight = metric.matrix.weight.double().clone()
        one = lambda matrix, metric=metric: metric  # noqa: E731
        whole = list(integer_options(metric.matrix, one))
        options = [*whole, *integer_low_rank_options(metric.matrix, factorized(metric), (0.3, 0.6), one, one)]
        whole = [option for option in whole if option.structure == "integer"]
        assert len(whole) == len(BITS) and [option.structure for option in options].count("integer low-rank") == 6
        kinds = {"integer": GroupedInteger, "corrected": Corrected, "integer low-rank": Quantized}
        for option in options:
            copy = working_copy(Anatomy(model))
            option.put(copy.blocks[0])
            placed = copy.blocks[0].matrix(metric.matrix.role)
            assert isinstance(placed.module, kinds[option.structure])
            found.append((option.loss, metric.price(weight - placed.weight.double())))
            tensors = [*placed.module.parameters(), *placed.module.buffers()]
            bias = 0 if placed.bias is None else placed.bias.numel() * 4
            assert sum(t.numel() * t.element_size() for t in tensors) - bias == option.bytes
        losses = [option.loss for option in whole]
        assert losses == sorted(losses, reverse=True)  # more and more bits
    ratios = torch.tensor([expected / price for expected, price in found])
    assert 0.9 < ratios.median() < 1.1 and ((ratios > 0.5) & (ratios < 2)).double().mean() > 0.9


def test_corrections_cost_what_is_expected_and_are_offered_below_the_next_number_of_bits():
    generator = torch.Generator().manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=96, intermediate_size=192,
                                         num_hidden_layers=1, num_attention_heads=4)).bfloat16()  # fmt: skip
    matrix = Anatomy(model).blocks[0].matrix("down")  # 96 x 192
    sides = []
    for size in (96, 192):
        seen = torch.randn(400, size, generator=generator, dtype=torch.float64)
        sides.append((seen * torch.linspace(0.1, 3, size)).T @ (seen * torch.linspace(0.1, 3, size)) / 400)
    metric = Metric(matrix, sides[1], sides[0], torch.zeros(192, dtype=torch.float64))
    found = list(integer_options(matrix, lambda matrix: metric))
    assert [option.structure for option in found] == [
        *(["integer", *["corrected"] * 2] * 4), "integer", *["corrected"] * 3, "integer"  # from 6 to 8 bits is further
    ]  # fmt: skip
    assert [option.bytes for option in found] == sorted(option.bytes for option in found)
    weight = matrix.weight.double().clone()
    for option in found:
        copy = working_copy(Anatomy(model))
        option.put(copy.blocks[0])
        price = metric.price(weight - copy.blocks[0].matrix("down").weight.double())
        assert 0.8 < option.loss / price < 1.25, option
    plain, corrected = found[12], found[13:16]
    losses = [plain.loss, *(option.loss for option in corrected)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.65 * losses[0]
    assert correction_leaves(torch.zeros(2), torch.ones(2, 3), torch.ones(3), [1]) == [1.0]


def test_a_grid_that_reaches_less_far_is_taken_where_it_loses_less():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    strengths = torch.rand(128, generator=torch.Generator().manual_seed(1))
    groups = weight.unflatten(1, (-1, GROUP))
    error = [
        ((grid.values(grid.codes(groups)) - groups).square().flatten(1) * strengths).sum()
        for grid in (best_grid(weight, strengths, 2), Grid.of(groups, 2, False))
    ]
    assert error[0] < 0.9 * error[1]


def test_a_narrow_mlp_costs_what_its_down_matrix_then_gets_wrong():
    model = tiny("llama")
    mlp = [metric for metric in metrics(model) if metric.matrix.role in ("gate", "up", "down")]
    down = next(metric for metric in mlp if metric.matrix.role == "down")
    losses = []
    for option in narrow_mlp_options(mlp, again(mlp), (0.25, 0.5, 0.75), ridge=1e-2):
        copy = working_copy(Anatomy(model))
        option.put(copy.blocks[0])
        kept = copy.blocks[0].mlp.neurons
        assert kept in (12, 24, 36) and option.bytes == kept * 3 * 32 * 4
        assert set(option.covers) == {"blocks.0.mlp.gate", "blocks.0.mlp.up", "blocks.0.mlp.down"}
        losses.append(option.loss)
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0
    assert down.price(torch.zeros_like(down.matrix.weight).double()) == 0


def test_the_rows_that_matter_to_the_loss_are_learned_first():
    model = tiny("llama")
    metric = metrics(model)[0]
    even, odd = torch.ones(32).double(), torch.ones(32).double()
    even[::2], odd[1::2] = 1e4, 1e4
    errors = []
    for gradients in (even, odd):
        weighed = Metric(metric.matrix, metric.inputs, gradients.diag(), metric.mean)
        (option,) = dictionary_options(weighed, (0.5,), 5, 0)
        change = metric.matrix.weight.double() - placed(model, option).blocks[0].matrix("q").weight.double()
        errors.append(((change @ metric.inputs) * change).sum(1).view(-1, 2).sum(0))
    assert errors[0][0] < 0.5 * errors[1][0] and errors[1][1] < 0.5 * errors[0][1]


ATTENTION = ["llama", "gpt2", "opt", "gpt_neox", "qwen2", "qwen3", "phi3", "gemma2"]


@pytest.mark.parametrize("name", ATTENTION)
def test_narrower_queries_and_keys_cost_what_they_say(name):
    model = tiny(name)
    found = metrics(model)
    options = list(narrow_query_key_options(found, (0.25, 0.5, 0.75)))
    if name == "qwen3":
        assert not options  # a norm on queries and keys
        return
    query, key = found[0], found[1]
    losses = []
    for option, channels in zip(options, (2, 4, 6), strict=True):
        anatomy = placed(model, option)
        assert option.covers == (query.matrix.name, key.matrix.name)
        assert anatomy.matrix_bytes(["q", "k"]) - Anatomy(model).matrix_bytes(["q", "k"]) * 2 // 3 == option.bytes
        expected = 0.0
        for metric in (query, key):  # E[y_i y_j] of the outputs that are gone, by the data themselves
            weight = torch.cat([metric.matrix.weight, _column(metric.matrix.bias, metric.matrix)], 1).double()
            small = anatomy.blocks[0].matrix(metric.matrix.role)
            stays = small.weight.ne(0).any(1)
            if isinstance(small.module, LeadingRows):  # the kept rows moved to the front of their head
                rows = small.weight[stays]
                stays = (metric.matrix.weight[:, None] == rows).all(2).any(1)
            assert int(stays.sum()) == channels * metric.matrix.shape[0] // 8
            weight[stays] = 0
            moments = torch.cat([metric.inputs, metric.mean[None]])
            moments = torch.cat([moments, torch.cat([metric.mean, torch.ones(1)])[:, None]], 1)
            expected += float(torch.einsum("ij,ik,kl,jl->", metric.gradients, weight, moments, weight)) / 2
        assert option.loss == pytest.approx(expected, rel=1e-6)
        losses.append(option.loss)
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0


def _column(bias, matrix):
    return torch.zeros(matrix.shape[0], 1) if bias is None else bias[:, None]


@pytest.mark.parametrize("name", ATTENTION)
def test_narrower_values_cost_what_they_say(name):
    model = tiny(name, dtype=torch.float64)
    found = metrics(model, 1e-6)
    by_role = {metric.matrix.role: metric for metric in found}
    out = by_role["o"]
    losses = []
    for option, count in zip(narrow_value_options(found, again(found), (0.25, 0.5, 0.75)), (2, 4, 6), strict=True):
        assert option.covers == (by_role["v"].matrix.name, out.matrix.name)
        block = placed(model, option).blocks[0]
        assert isinstance(block.matrix("v").module, LeadingRows) and isinstance(
            block.matrix("o").module, LeadingColumns
        )
        heads, groups = block.attention.heads, block.attention.key_value_heads
        assert block.matrix("v").module.inner.out_features == groups * count
        assert option.bytes == 8 * 32 * count * (heads + groups)
        # V' = T V head by head; then O' T stands for O, on the values of the dense model
        old, new = (matrix.weight.view(groups, 8, 32) for matrix in (by_role["v"].matrix, block.matrix("v")))
        turned = torch.linalg.lstsq(old.mT, new.mT).solution.mT
        torch.testing.assert_close(turned @ old, new, rtol=1e-4, atol=1e-5)
        all_heads = torch.block_diag(*turned.repeat_interleave(heads // groups, dim=0))
        change = out.matrix.weight - block.matrix("o").weight @ all_heads
        assert option.loss == pytest.approx(out.price(change), rel=1e-3)
        bias = by_role["v"].matrix.bias
        if bias is not None:
            expected = (turned @ bias.view(groups, 8, 1)).flatten()
            torch.testing.assert_close(block.matrix("v").bias, expected, rtol=1e-4, atol=1e-4)
        losses.append(option.loss)
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0


def test_heads_that_do_not_fit_are_not_narrowed():
    model = tiny("llama")
    found = metrics(model)
    model.config.head_dim = 12  # 32 and 16 rows are no whole number of such heads
    assert not [*narrow_query_key_options(found, (0.5,)), *narrow_value_options(found, again(found), (0.5,))]


@pytest.mark.parametrize("name", CAUSAL)
def test_the_least_size_of_a_narrow_block_is_that_of_its_smallest_options(name):
    found = metrics(tiny(name))
    shares = (0.25, 0.5)
    made = [
        *narrow_query_key_options(found, shares), *narrow_value_options(found, again(found), shares),
        *narrow_mlp_options(found, again(found), shares, 1e-2), *(dense(metric) for metric in found),
    ]  # fmt: skip
    smallest = choose([Option(o.structure, o.covers, o.bytes, o.bytes, o.put) for o in made], 1e9)
    assert least_narrow_bytes(found[0].matrix.block, shares, shares) == sum(option.bytes for option in smallest)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_channels_that_do_nothing_are_given_up_first(name):
    model = tiny(name)
    anatomy = Anatomy(model)
    for block in anatomy.blocks:
        for role in "qkv":  # channels 1, 2, 5 and 6 of every head are 0 (1 and 5, 2 and 6 are rotary pairs)
            matrix = block.matrix(role)
            gone = torch.tensor([1, 2, 5, 6]) + torch.arange(0, matrix.shape[0], 8)[:, None]
            weight, bias = matrix.weight.clone(), matrix.bias
            weight[gone.flatten()] = 0
            if bias is not None:
                bias = bias.clone()
                bias[gone.flatten()] = 0
            matrix.write(weight, bias)
    before, neurons = logits(model, inputs(name)), anatomy.blocks[0].mlp.neurons
    attention = sum(m.shape[0] * m.shape[1] for m in anatomy.blocks[0].matrices() if m.role in "qkvo")
    whole = anatomy.matrix_bytes()
    keep = 1 - 0.48 * attention * 3 * 4 / whole
    transect.compress(model, "mixed", keep, DATA, structures="narrow", refit_outputs=False, input_shrinkage=1e-6)
    anatomy = Anatomy(model)
    assert anatomy.matrix_bytes() <= keep * whole
    for block in anatomy.blocks:
        assert isinstance(block.matrix("q").module, ScatteredRows if name in ("llama", "phi3") else LeadingRows)
        assert isinstance(block.matrix("o").module, LeadingColumns) and block.mlp.neurons == neurons
    torch.testing.assert_close(logits(model, inputs(name)), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_it_loads_again_and_generates_with_a_cache(name, tmp_path):
    model = tiny(name)
    transect.compress(model, "mixed", 0.5, DATA, structures="narrow")
    kinds = {type(matrix.module) for matrix in Anatomy(model).matrices()}
    assert kinds & {ScatteredRows, LeadingColumns}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(again, model, inputs(name))
    made = again.generate(
        inputs(name)["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    full = logits(again, {"input_ids": made})[:, -6:-1].argmax(-1)
    assert torch.equal(made[:, -5:], full)


def test_refitting_narrow_attention_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(200, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    seen = x + 0.3 * noise
    weight = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    covariance, cross = seen.T @ seen / 200, x.T @ seen / 200
    wide = LeadingColumns.from_columns(torch.zeros(6, 4).double(), 2, 8)
    wide.refit(weight, covariance, cross)
    read = seen[:, [0, 1, 4, 5]]
    torch.testing.assert_close(wide.inner.weight, torch.linalg.lstsq(read, x @ weight.T).solution.T)
    places = torch.tensor([5, 0, 2])
    rows = ScatteredRows.from_rows(torch.zeros(3, 8).double(), places, 6)
    rows.refit(weight, covariance, cross)
    torch.testing.assert_close(rows.inner.weight, torch.linalg.lstsq(seen, (x @ weight.T)[:, places]).solution.T)
    rows.refit(weight, covariance)
    torch.testing.assert_close(rows.inner.weight, weight[places])


def test_the_program_finds_what_enumeration_finds():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        options = [Option("dense", (name,), 10, 0.0, print) for name in "abc"]
        for name in "abc":
            for size in (3, 5, 7):
                options.append(
                    Option("low-rank", (name,), size, float(torch.rand(1, generator=generator)) / size, print)
                )
        options.append(Option("narrow", ("a", "b"), 8, float(torch.rand(1, generator=generator)) / 4, print))
        single = [[o for o in options if o.covers == (name,)] for name in "abc"]
        pair = options[-1]
        candidates = [*itertools.product(*single), *((pair, last) for last in single[2])]
        for budget in (12, 18, 25):
            fitting = [c for c in candidates if sum(o.bytes for o in c) <= budget]
            best = min(sum(o.loss for o in c) for c in fitting)
            chosen = choose(options, budget)
            assert sum(o.loss for o in chosen) == pytest.approx(best, abs=1e-9)
            assert sum(o.bytes for o in chosen) <= budget
            assert sorted(name for o in chosen for name in o.covers) == ["a", "b", "c"]
    with pytest.raises(OutOfReach, match="smallest takes about 9"):
        choose(options[:-1], 5)


@pytest.mark.parametrize("structure", ["low-rank", "dictionary", "narrow", "integer"])
def test_one_structure_alone_and_the_budget(structure):
    model = tiny("llama")
    whole = Anatomy(model).matrix_bytes()
    transect.compress(model, "mixed", 0.75, DATA, structures=structure, iterations=2)
    anatomy = Anatomy(model)
    assert (0.1 if structure == "integer" else 0.6) * whole < anatomy.matrix_bytes() <= 0.75 * whole
    kinds = {type(matrix.module).__name__ for matrix in anatomy.matrices()}
    allowed = {
        "low-rank": {"LowRank"}, "integer": {"GroupedInteger", "Quantized"}, "dictionary": {"SparseDictionary"},
        "narrow": {"ScatteredRows", "LeadingRows", "LeadingColumns"},
    }  # fmt: skip
    assert kinds <= {*allowed[structure], "Linear"}


@pytest.mark.parametrize("keep", [0.12, 0.6])
def test_all_structures_together_at_any_budget(keep):
    model = tiny("llama")
    whole = Anatomy(model).matrix_bytes()
    transect.compress(model, "mixed", keep, DATA, iterations=5)
    assert 0.1 * whole < Anatomy(model).matrix_bytes() <= keep * whole


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_refitting_brings_the_last_hidden_states_nearer_to_the_dense_ones(name):
    model = tiny(name)
    compressed = Anatomy(model)
    dense = working_copy(compressed)
    batches = BATCHES if name != "bert" else [{**b, "labels": b["input_ids"]} for b in BATCHES]
    transect.compress(model, "svd", 0.4)
    states = {}

    def error():
        with torch.no_grad():
            for key, one in (("a", model), ("b", dense.model)):
                states[key] = one.base_model(DATA).last_hidden_state
        return float((states["a"] - states["b"]).square().mean())

    before = error()
    refit_to_dense(compressed, dense, batches)
    assert error() < 0.9 * before
    assert {type(matrix.module) for matrix in compressed.matrices()} == {LowRank}


def test_what_it_needs_and_refuses():
    with pytest.raises(OutOfReach, match="leaves no rank"):
        transect.compress(tiny("llama"), "mixed", 0.01, DATA)
    with pytest.raises(transect.TransectError, match="structures"):
        transect.compress(tiny("llama"), "mixed", 0.6, DATA, structures="sparse")
    with pytest.raises(OutOfReach, match="leaves no atom"):
        transect.compress(tiny("llama"), "mixed", 0.01, DATA, structures="dictionary")
    with pytest.raises(OutOfReach, match="narrower layers alone"):
        transect.compress(tiny("llama"), "mixed", 0.2, DATA, structures="narrow")
    with pytest.raises(transect.TransectError, match="too little for integers alone"):
        transect.compress(tiny("llama"), "mixed", 0.002, DATA, structures="integer")
    needed = {s.label for s in method("mixed").needs}
    assert needed == {s.label for s in (*method("kfac-svd").needs, InputMean())}
