"""AMP: scores, amounts, and that cutting equals masking, on every architecture."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.compression.catalog.amp import counts
from transect.errors import OutOfReach, TransectError
from transect.statistics import HeadContribution, SequenceMagnitude, collect, key_of

from .models import CONFIGS, VOCABULARY, assert_same_model, inputs, logits, tiny
from .test_llm_drop import DATA, data_for, decode

HEADS, NEURONS = HeadContribution(), SequenceMagnitude()
# OLMo-2 normalises queries over all heads at once, so fewer heads change what the others see.
APART = [name for name in CONFIGS if name != "olmo2"]


def scores(model, data):
    """Per block: the scores of its groups of heads, and of its neurons."""
    anatomy = Anatomy(model)
    store = collect(anatomy, data, [HEADS, NEURONS])
    found = []
    for block in anatomy.blocks:
        attention = block.attention
        channels = store.value(key_of(attention.o, HEADS), HEADS)
        heads = channels.view(attention.heads, attention.head_size)[:, 0]
        groups = heads.view(attention.key_value_heads, -1).sum(1)
        found.append((groups, store.value(key_of(block.mlp.down, NEURONS), NEURONS)))
    return found


def batches_of(name):
    data = data_for(name)
    return data if isinstance(data, list) else [{"input_ids": data}]


def test_neurons_are_chosen_with_every_prompt_counting_alike():
    """A long prompt that excites other neurons than many short ones must not outvote them."""
    model = tiny("llama")
    ids = torch.randint(3, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1:, 4:] = 0
    data = [{"input_ids": ids, "attention_mask": mask}]
    apart = [{"input_ids": ids[:1]}, *({"input_ids": ids[row : row + 1, :4]} for row in (1, 2, 3))]
    found = [[neurons for _, neurons in scores(model, [batch])] for batch in apart]
    expected = [torch.stack(rows).mean(0) for rows in zip(*found, strict=True)]
    cut = transect.compress(copy.deepcopy(model), "amp", 0.6, data)
    for block, dense, wanted in zip(Anatomy(cut).blocks, Anatomy(model).blocks, expected, strict=True):
        kept = wanted.argsort(descending=True)[: block.mlp.neurons].sort().values
        assert torch.equal(block.mlp.down.weight, dense.mlp.down.weight[:, kept])


def lowest(values, count):
    return values.argsort()[:count]


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("keep", [0.7, 0.5])
def test_cutting_equals_masking_the_lowest_scores(name, keep):
    model, batch = tiny(name), inputs(name)
    masked, handles = copy.deepcopy(model), []
    for block, (groups, neurons) in zip(Anatomy(masked).blocks, scores(model, batches_of(name)), strict=True):
        kept_groups, kept_neurons = counts(block, keep)
        width = block.attention.o.shape[1] // len(groups)
        off = lowest(groups, len(groups) - kept_groups)
        channels = (off[:, None] * width + torch.arange(width)).flatten()
        off = lowest(neurons, len(neurons) - kept_neurons)
        for matrix, gone in ((block.attention.o, channels), (block.mlp.down, off)):
            assert len(gone) > 0
            handles.append(
                matrix.host.register_forward_pre_hook(
                    lambda module, args, gone=gone: (args[0].index_fill(-1, gone, 0.0), *args[1:])
                )
            )
    expected = logits(masked, batch)
    transect.compress(model, "amp", keep, data_for(name))
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["output", "source"])
@pytest.mark.parametrize("name", APART)
def test_what_adds_nothing_scores_0_and_goes_without_a_trace(name, part):
    """A head with zero columns in o, or zero rows in v; a neuron with zero rows in gate (or up)."""
    model, batch = tiny(name), inputs(name)
    silent = []
    for block in Anatomy(model).blocks:
        kept_groups, kept_neurons = counts(block, 0.6)
        attention, mlp = block.attention, block.mlp
        generator = torch.Generator().manual_seed(block.index)
        groups = torch.randperm(attention.key_value_heads, generator=generator)[kept_groups:]
        neurons = torch.randperm(mlp.neurons, generator=generator)[kept_neurons:]
        silent.append((groups, neurons))
        if part == "output":
            width = attention.o.shape[1] // attention.key_value_heads
            weight = attention.o.weight.clone()
            weight[:, (groups[:, None] * width + torch.arange(width)).flatten()] = 0
            attention.o.write(weight)
        else:
            clear(attention.v, (groups[:, None] * attention.head_size + torch.arange(attention.head_size)).flatten())
        clear(mlp.up if mlp.gate is None else mlp.gate, neurons)
    for (groups, neurons), found in zip(silent, scores(model, batches_of(name)), strict=True):
        assert (found[0][groups] == 0).all() and (found[0] > 0).sum() == len(found[0]) - len(groups)
        assert (found[1][neurons] == 0).all() and (found[1] >= 0).all()
    before = logits(model, batch)
    transect.compress(model, "amp", 0.6, data_for(name))
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-5)


def clear(matrix, rows):
    weight = matrix.weight.clone()
    weight[rows] = 0
    bias = None if matrix.bias is None else matrix.bias.clone().index_fill(0, rows, 0.0)
    matrix.write(weight, bias)


def test_scores_follow_permutations_and_survive_a_change_of_basis_within_a_head():
    model, data = tiny("llama", dtype=torch.float64), [{"input_ids": DATA}]
    plain = scores(model, data)
    block = Anatomy(model).blocks[1]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    block.attention.keep([2, 3, 0, 1])
    block.mlp.keep(order)
    changed = scores(model, data)
    torch.testing.assert_close(changed[1][0], plain[1][0].flip(0))
    torch.testing.assert_close(changed[1][1], plain[1][1][order])

    turn = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    attention = Anatomy(model).blocks[2].attention
    value, output = attention.v.weight.clone(), attention.o.weight.clone()
    value[8:16] = turn @ value[8:16]  # key/value head 1, which query heads 2 and 3 read
    for head in (2, 3):
        output[:, head * 8 : head * 8 + 8] = output[:, head * 8 : head * 8 + 8] @ torch.linalg.inv(turn)
    attention.v.write(value)
    attention.o.write(output)
    up = Anatomy(model).blocks[2].mlp.up
    up.write(torch.cat([3 * up.weight[:1], up.weight[1:]]))
    turned = scores(model, data)
    torch.testing.assert_close(turned[2][0], plain[2][0])
    factors = torch.ones(48, dtype=torch.float64).index_fill(0, torch.tensor([0]), 3.0)
    torch.testing.assert_close(turned[2][1], plain[2][1] * factors)


def meta_llama(**sizes):
    config = LlamaConfig(vocab_size=8, num_hidden_layers=1, **sizes)
    with torch.device("meta"):
        return Anatomy(LlamaForCausalLM(config), weights=False).blocks[0]


def test_amounts_at_llama_2_7b():
    block = meta_llama(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    assert counts(block, 1 - 0.3125) == (32 - 10, 11008 - 3440)
    removed = 32 * (10 * 4 * 4096 * 128 + 3440 * 3 * 4096)
    assert removed == pytest.approx(2.0237e9, rel=1e-4)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (12, 3), (5, 1)])
def test_neurons_make_up_for_the_rounding_of_heads(heads):
    query, shared = heads
    block = meta_llama(
        hidden_size=60, head_dim=4, intermediate_size=300, num_attention_heads=query, num_key_value_heads=shared
    )
    whole = sum(m.shape[0] * m.shape[1] for m in block.matrices())
    per_neuron = 3 * 60
    per_group = (2 + 2 * query // shared) * 60 * 4
    for step in range(1, 100):
        keep = step / 100
        try:
            groups, neurons = counts(block, keep)
        except OutOfReach:
            assert per_group + per_neuron > keep * whole
            continue
        size = groups * per_group + neurons * per_neuron
        assert 1 <= groups <= shared and 1 <= neurons <= 300
        assert size <= keep * whole
        if neurons < 300:
            assert keep * whole - size < per_neuron
        else:  # so many heads went that the neurons cannot make up for them
            assert abs(groups - keep * shared) <= 0.5 + 1e-9


@pytest.mark.parametrize("name", list(CONFIGS))
def test_equal_shares_cut_every_block_alike_within_the_budget(name):
    dense = tiny(name)
    whole = Anatomy(dense).matrix_bytes()
    model = transect.compress(dense, "amp", 0.6, data_for(name))
    sizes = {(b.attention.heads, b.attention.key_value_heads, b.mlp.neurons) for b in Anatomy(model).blocks}
    assert len(sizes) == 1
    assert 0.58 * whole < Anatomy(model).matrix_bytes() <= 0.6 * whole
    assert torch.isfinite(logits(model, inputs(name))).all()


def kept_neurons(model, dense):
    """Which of the dense model's neurons each block still has, by their rows in up."""
    found = []
    for block, whole in zip(Anatomy(model).blocks, Anatomy(dense).blocks, strict=True):
        same = (block.mlp.up.weight[:, None] == whole.mlp.up.weight[None]).all(-1)
        assert (same.sum(1) == 1).all()
        found.append(same.int().argmax(1).tolist())
    return found


def test_orders():
    dense = tiny("llama")
    kept = {}
    runs = {
        "standard": {}, "reversed": {"order": "reversed"}, "random": {"order": "random"},
        "again": {"order": "random"}, "other": {"order": "random", "draw": 1}, "output": {"neuron_score": "output"},
    }  # fmt: skip
    for run, settings in runs.items():
        torch.manual_seed(len(run))  # which must not matter
        state = torch.get_rng_state()
        kept[run] = kept_neurons(transect.compress(copy.deepcopy(dense), "amp", 0.6, DATA, **settings), dense)
        assert torch.equal(torch.get_rng_state(), state)
    for index, (_, values) in enumerate(scores(dense, [{"input_ids": DATA}])):
        count = len(kept["standard"][index])
        order = values.argsort()
        assert kept["standard"][index] == sorted(order[-count:].tolist())
        assert kept["reversed"][index] == sorted(order[:count].tolist())
        output = values * Anatomy(dense).blocks[index].mlp.down.weight.abs().sum(0)
        assert kept["output"][index] == sorted(output.argsort()[-count:].tolist())
    assert kept["random"] == kept["again"] != kept["other"]
    assert kept["random"][0] != kept["random"][1]


def test_an_ordinary_smaller_checkpoint(tmp_path):
    """Equal shares in every block need nothing but config.json: heads and their size, neurons."""
    model = transect.compress(tiny("llama"), "amp", 0.6, DATA)
    batch = inputs("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and "per_layer_config" not in config
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
    assert config["intermediate_size"] == 32 and config["hidden_size"] == 32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM and not Anatomy(loaded).record
    assert_same_model(loaded, model, batch)
    torch.testing.assert_close(decode(loaded, batch["input_ids"]), logits(model, batch), rtol=1e-4, atol=1e-5)


def test_a_number_of_heads_that_the_config_refuses_is_recorded(tmp_path):
    """transformers wants the width to be a multiple of the number of heads, though nothing in the model does."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, head_dim=8
    )
    model = transect.compress(LlamaForCausalLM(config).eval(), "amp", 0.7, DATA)
    assert {block.attention.heads for block in Anatomy(model).blocks} == {3}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(loaded, model, inputs("llama"))


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "phi3", "gemma3", "olmo2", "bert", "vit"])
def test_round_trip(name, tmp_path):
    model = transect.compress(tiny(name), "amp", 0.6, data_for(name))
    model.save_pretrained(tmp_path)
    loaded = CONFIGS[name][1].from_pretrained(tmp_path)
    assert_same_model(loaded, model, inputs(name))


def test_blocks_that_have_lost_a_sublayer_and_sequential_calibration():
    model = tiny("llama")
    Anatomy(model).blocks[0].attention.drop()
    Anatomy(model).blocks[1].mlp.drop()
    whole = Anatomy(model).matrix_bytes()
    transect.compress(model, "amp", 0.6, DATA, sequential=True)
    anatomy = Anatomy(model)
    assert anatomy.matrix_bytes() <= 0.6 * whole
    assert anatomy.blocks[0].mlp.neurons == math.floor(0.6 * 48) and anatomy.blocks[1].attention.key_value_heads == 1
    assert torch.isfinite(logits(model, inputs("llama"))).all()


@pytest.mark.parametrize(
    ("keep", "settings", "message"),
    [
        (0.05, {}, "need keep >= "), (0.6, {"order": "best"}, "order='best'"), (0.6, {"draw": -1}, "draw=-1"),
        (0.6, {"data": None}, "needs calibration"), (0.6, {"roles": ["q"]}, "whole sublayers"),
        (0.6, {"allocation": "global"}, "no"),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(keep, settings, message):
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TransectError, match=message):
        transect.compress(model, "amp", keep, **{"data": DATA, **settings})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_smallest_budget_that_an_error_names_is_in_reach_and_factors_are_refused():
    with pytest.raises(OutOfReach) as error:
        transect.compress(tiny("llama"), "amp", 0.05, DATA)
    least = float(str(error.value).rpartition(">= ")[2])
    block = Anatomy(transect.compress(tiny("llama"), "amp", least, DATA)).blocks[0]
    assert (block.attention.key_value_heads, block.mlp.neurons) == (1, 1)
    with pytest.raises(TransectError, match="dense matrices"):
        transect.compress(transect.compress(tiny("llama"), "svd", 0.6), "amp", 0.6, DATA)
