"""LLM-Drop: what goes, in which order, within which budget, and that what is left still runs, caches and loads."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.anatomy.surgery import SkipAttention
from transect.compression.catalog.llm_drop import ranked, span_similarities, units_of
from transect.compression.registry import Calibration
from transect.errors import OutOfReach, TransectError
from transect.evaluation import parameters
from transect.statistics import BlockSimilarity, SublayerSimilarity, collect

from .models import CAUSAL, CONFIGS, VOCABULARY, assert_same_model, inputs, logits, tiny
from .test_new_statistics import PRE_NORM, cosine, stream

DATA = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(5))
VARIANTS = ["joint", "attention", "mlp", "block", "consecutive"]


def data_for(name):
    if name in ("vit", "deit"):
        return [inputs(name, batch=3, seed=seed) for seed in range(2)]
    if name in ("bert", "roberta"):
        return [{"input_ids": DATA, "labels": DATA}]
    return DATA


def drop(model, count=0, keep=1.0, name="llama", **settings):
    return transect.compress(model, "llm-drop", keep, data_for(name), drop=count, **settings)


def marked(name, **kwargs):
    """A tiny model whose blocks know their old number."""
    model = tiny(name, **kwargs)
    for block in Anatomy(model).blocks:
        block.module.number = block.index
    return model


def gone(model, blocks=3):
    """The sublayers that a marked model has lost."""
    left = {(b.module.number, kind) for b in Anatomy(model).blocks for kind in ("attention", "mlp") if getattr(b, kind)}
    return {(index, kind) for index in range(blocks) for kind in ("attention", "mlp")} - left


def silence(model, *sublayers):
    """Let these sublayers add nothing."""
    for index, kind in sublayers:
        block = Anatomy(model).blocks[index]
        matrix = block.attention.o if kind == "attention" else block.mlp.down
        matrix.write(torch.zeros(matrix.shape), None if matrix.bias is None else torch.zeros(matrix.shape[0]))
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_keeping_everything_changes_nothing(variant):
    model, batch = tiny("llama"), inputs("llama")
    before = logits(model, batch)
    drop(model, variant=variant)
    assert torch.equal(logits(model, batch), before) and not Anatomy(model).record


@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("name", PRE_NORM)
def test_what_adds_nothing_goes_first_and_changes_no_logits(name, iterative):
    silent = [(0, "attention"), (2, "mlp")]
    model, batch = silence(marked(name), *silent), inputs(name)
    before = logits(model, batch)
    drop(model, 2, name=name, iterative=iterative)
    assert gone(model) == set(silent)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-5)


def test_variants_choose_from_their_own_kind():
    silent = [(0, "attention"), (2, "mlp"), (2, "attention"), (1, "mlp")]
    chosen = {}
    for variant in VARIANTS:
        model = drop(silence(marked("llama"), *silent), 1, variant=variant)
        chosen[variant] = gone(model)
    # Which of several silent ones goes is a matter of rounding.
    assert all(len(chosen[variant]) == 1 for variant in ("joint", "attention", "mlp"))
    assert chosen["joint"] <= set(silent)
    assert chosen["attention"] <= {(0, "attention"), (2, "attention")} and chosen["mlp"] <= {(1, "mlp"), (2, "mlp")}
    assert chosen["block"] == chosen["consecutive"] == {(2, "attention"), (2, "mlp")}


@pytest.mark.parametrize("variant", ["joint", "attention", "mlp", "block"])
def test_dropping_more_drops_the_same_ones_and_others(variant):
    pool = 6 if variant == "joint" else 3
    sets = [gone(drop(marked("qwen3"), count, variant=variant)) for count in range(1, pool)]
    for smaller, larger in pairwise(sets):
        assert smaller < larger


def test_joint_is_the_other_variants_where_one_kind_does_not_count():
    class Masked:
        """The similarities with one kind at -inf."""

        def __init__(self, store, kind):
            self.store, self.kind = store, kind

        def value(self, key, statistic):
            values = self.store.value(key, statistic).clone()
            values[self.kind] = -torch.inf
            return values

    anatomy = Anatomy(tiny("llama"))
    store = collect(anatomy, [{"input_ids": DATA}], [SublayerSimilarity()])
    joint = units_of(anatomy, "joint")
    assert ranked(joint, Masked(store, 1))[:3] == ranked(units_of(anatomy, "attention"), store)
    assert ranked(joint, Masked(store, 0))[:3] == ranked(units_of(anatomy, "mlp"), store)
    pooled = [
        float(store.value(f"blocks.{i}", SublayerSimilarity())[int(kind == "mlp")])
        for ((i, kind),) in ranked(joint, store)
    ]
    assert pooled == sorted(pooled, reverse=True)


def test_the_blocks_chosen_are_those_of_highest_similarity():
    data = [{"input_ids": DATA}]
    model = marked("gemma3", dtype=torch.float64)
    values = [float(cosine(*stream(model, index, data))) for index in range(3)]
    assert gone(drop(model, 1, variant="block")) == {(values.index(max(values)), kind) for kind in ("attention", "mlp")}


@pytest.mark.parametrize("masked", [False, True])
def test_spans_by_brute_force(masked):
    model = tiny("llama", dtype=torch.float64)
    anatomy = Anatomy(model)
    mask = torch.ones_like(DATA)
    if masked:
        mask[2, 5:] = 0
    data = [{"input_ids": DATA[:4], "attention_mask": mask[:4]}, {"input_ids": DATA[4:], "attention_mask": mask[4:]}]
    counted = torch.cat([batch["attention_mask"].flatten() for batch in data]).bool()
    entering = [stream(model, index, data)[0][counted] for index in range(3)] + [stream(model, 2, data)[1][counted]]
    for length in (1, 2, 3):
        found = span_similarities(anatomy, Calibration(None, data), length)
        expected = torch.stack([cosine(entering[i], entering[i + length]) for i in range(4 - length)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # float32
    store = collect(anatomy, data, [BlockSimilarity()])
    singles = torch.stack([store.value(f"blocks.{i}", BlockSimilarity()) for i in range(3)])
    torch.testing.assert_close(span_similarities(anatomy, Calibration(None, data), 1), singles, rtol=0, atol=1e-6)
    best = int(span_similarities(anatomy, Calibration(None, data), 2).argmax())
    reduced = marked("llama", dtype=torch.float64)
    transect.compress(reduced, "llm-drop", 1, data, drop=2, variant="consecutive")
    assert gone(reduced) == {(i, kind) for i in (best, best + 1) for kind in ("attention", "mlp")}


def test_iterative_is_one_after_the_other():
    at_once = gone(drop(marked("qwen2"), 3, iterative=True))
    model = marked("qwen2")
    for _ in range(3):
        drop(model, 1)
    assert gone(model) == at_once


@pytest.mark.parametrize(
    ("name", "variant"),
    [(n, v) for n in CONFIGS for v in VARIANTS if n in PRE_NORM or v in ("block", "consecutive")],
)
def test_the_fewest_units_that_meet_the_budget_go(name, variant):
    """Several budgets where blocks are stored in different ways; elsewhere one that takes two units."""
    dense = tiny(name)
    whole = Anatomy(dense).matrix_bytes()
    two = {"attention": 0.8, "block": 0.6, "consecutive": 0.6}.get(variant, 0.75)
    for keep in (0.9, 0.7, 0.45) if name in ("llama", "gpt2", "bert") else (two,):
        try:
            model = drop(copy.deepcopy(dense), keep=keep, variant=variant, name=name)
        except OutOfReach:
            assert variant in ("attention", "mlp")
            continue
        kept = Anatomy(model).matrix_bytes()
        assert kept <= keep * whole and kept == Anatomy(model).record.history[-1]["matrix_bytes"]
        assert torch.isfinite(logits(model, inputs(name))).all()
        units = sum(len(units_of(Anatomy(m), "joint")) * sign for m, sign in ((dense, 1), (model, -1)))
        count = units // 2 if variant in ("block", "consecutive") else units
        if count > 1:  # one unit fewer would be too many bytes
            fewer = drop(copy.deepcopy(dense), count - 1, variant=variant, name=name)
            assert Anatomy(fewer).matrix_bytes() > keep * whole


def test_parameters_and_cache_that_are_left():
    model = silence(tiny("llama"), (0, "attention"), (1, "mlp"), (2, "attention"))
    before = parameters(model)
    drop(model, 3)
    d, queries, keys, neurons = 32, 32, 16, 48
    removed = 2 * (d * (queries + 2 * keys) + queries * d) + 3 * d * neurons  # the norms stay
    assert before - parameters(model) == removed
    with torch.no_grad():
        cache = model(**inputs("llama"), use_cache=True).past_key_values
    counter = 2 * 12  # a dropped sublayer counts positions with one number each
    assert [layer.keys.numel() for layer in cache.layers] == [counter, 2 * 2 * 12 * 8, counter]


def decode(model, ids):
    """Logits token by token through the cache."""
    cache, steps = None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_saving_and_loading_of_a_reduced_model(name, tmp_path):
    """Block 0 goes as a whole, so that the dropped attention of block 2 moves up."""
    silent = [(0, "attention"), (0, "mlp"), (2, "attention"), (1, "mlp")]
    model, batch = silence(tiny(name), *silent), inputs(name)
    expected = logits(model, batch)
    drop(model, 4, name=name)
    assert len(Anatomy(model).blocks) == 2 and isinstance(
        Anatomy(model).blocks[1].module.get_submodule(Anatomy(model).architecture.attention), SkipAttention
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for reduced in (model, loaded):
        torch.testing.assert_close(logits(reduced, batch), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decode(reduced, batch["input_ids"]), expected, rtol=1e-4, atol=1e-4)


def test_a_dropped_attention_moves_up_when_a_block_goes_later(tmp_path):
    model, batch = tiny("llama"), inputs("llama")
    silence(model, (2, "attention"))
    drop(model, 1, variant="attention")
    silence(model, (0, "attention"), (0, "mlp"))
    drop(model, 1, variant="block")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [b.module.self_attn.layer_idx for b in Anatomy(loaded).blocks] == [0, 1]
    assert isinstance(Anatomy(loaded).blocks[1].module.self_attn, SkipAttention)
    torch.testing.assert_close(decode(loaded, batch["input_ids"]), logits(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["block", "consecutive"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert"])
def test_dropped_blocks_leave_an_ordinary_checkpoint(name, variant, tmp_path):
    model = drop(tiny(name), 1, variant=variant, name=name)
    assert not Anatomy(model).record
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = CONFIGS[name][1].from_pretrained(tmp_path)
    assert len(Anatomy(loaded).blocks) == 2
    assert_same_model(loaded, model, inputs(name))


def test_a_model_that_cannot_lose_blocks_still_loses_sublayers():
    model = silence(tiny("gpt2"), (1, "attention"), (1, "mlp"))
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(TransectError, match="a block's place enters what it computes"):
        drop(model, 1, name="gpt2", variant="block")
    drop(model, 2, name="gpt2")
    block = Anatomy(model).blocks[1]
    assert len(Anatomy(model).blocks) == 3 and block.attention is None and block.mlp is None


@pytest.mark.parametrize(
    ("name", "keep", "settings", "message"),
    [
        ("llama", 0.5, {"variant": "attention"}, "needs keep >= "),
        ("llama", 0.01, {}, "needs keep >= "),
        ("llama", 1.0, {"drop": 6}, "none of the 6 units"), ("llama", 1.0, {"drop": 3, "variant": "block"}, "3 units"),
        ("llama", 0.5, {"drop": 1}, "both say how much"), ("llama", 1.0, {"drop": -1}, "drop=-1"),
        ("llama", 0.6, {"variant": "consecutive", "iterative": True}, "iteratively"),
        ("bert", 0.8, {}, "after the residual sum"), ("bert", 1.0, {"drop": 1, "variant": "mlp"}, "residual sum"),
        ("llama", 0.6, {"data": None}, "needs calibration"), ("llama", 0.6, {"roles": ["q"]}, "whole sublayers"),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(name, keep, settings, message):
    model = tiny(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TransectError, match=message):
        transect.compress(model, "llm-drop", keep, **{"data": data_for(name), **settings})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_smallest_budget_that_an_error_names_is_in_reach():
    with pytest.raises(OutOfReach) as error:
        drop(tiny("llama"), keep=0.5, variant="attention")
    least = float(str(error.value).rpartition(">= ")[2])
    model = drop(tiny("llama"), keep=least, variant="attention")
    assert sum(block.attention is not None for block in Anatomy(model).blocks) == 1
