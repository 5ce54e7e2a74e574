"""Mixed structures: prices against brute force, the program against enumeration, the refit against no refit."""

import itertools

import pytest
import torch

import transect
from transect.anatomy import Anatomy
from transect.compression import method
from transect.compression.copying import working_copy
from transect.compression.options import (
    Metric,
    Option,
    choose,
    dictionary_options,
    low_rank_options,
    narrow_mlp_options,
)
from transect.compression.refit import refit_to_dense
from transect.compression.weighted_svd import shrink
from transect.errors import OutOfReach
from transect.operators import LowRank
from transect.operators.dictionary import SparseDictionary
from transect.statistics import InputCovariance, OutputGradientCovariance, collect, key_of

from .models import VOCABULARY, tiny

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
BATCHES = [{"input_ids": DATA[i : i + 4]} for i in (0, 4, 8)]


def metrics(model):
    wanted = [InputCovariance(), OutputGradientCovariance()]
    anatomy = Anatomy(model)
    store = collect(anatomy, BATCHES, wanted)
    return [
        Metric(matrix, *(shrink(store.value(key_of(matrix, one), one).double(), 0.1) for one in wanted))
        for matrix in anatomy.blocks[0].matrices()
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_price_of_an_option_is_that_of_the_matrix_it_puts_in_place(name):
    model = tiny(name)
    for metric in metrics(model):
        weight = metric.matrix.weight.double().clone()
        options = [*low_rank_options(metric, (0.3, 0.6)), *dictionary_options(metric, (0.6,), 3, 0)]
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


def test_a_narrow_mlp_costs_what_its_down_matrix_then_gets_wrong():
    model = tiny("llama")
    mlp = [metric for metric in metrics(model) if metric.matrix.role in ("gate", "up", "down")]
    down = next(metric for metric in mlp if metric.matrix.role == "down")
    losses = []
    for option in narrow_mlp_options(mlp, (0.25, 0.5, 0.75), ridge=1e-2):
        copy = working_copy(Anatomy(model))
        option.put(copy.blocks[0])
        kept = copy.blocks[0].mlp.neurons
        assert kept in (12, 24, 36) and option.bytes == kept * 3 * 32 * 4
        assert set(option.covers) == {"blocks.0.mlp.gate", "blocks.0.mlp.up", "blocks.0.mlp.down"}
        losses.append(option.loss)
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0
    assert down.price(torch.zeros_like(down.matrix.weight).double()) == 0


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


@pytest.mark.parametrize("structure", ["low-rank", "dictionary", "narrow"])
def test_one_structure_alone_and_the_budget(structure):
    model = tiny("llama")
    whole = Anatomy(model).matrix_bytes()
    transect.compress(model, "mixed", 0.75, DATA, structures=structure, iterations=2)
    anatomy = Anatomy(model)
    assert 0.6 * whole < anatomy.matrix_bytes() <= 0.75 * whole
    kinds = {type(matrix.module).__name__ for matrix in anatomy.matrices()}
    assert kinds <= {"low-rank": {"LowRank", "Linear"}, "dictionary": {"SparseDictionary", "Linear"}}.get(
        structure, {"Linear"}
    )


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
    assert {s.label for s in method("mixed").needs} == {s.label for s in method("kfac-svd").needs}
