"""What a token reads of a model's parameters, against what is known of the model."""

import pytest
import torch
from torch import nn

import transect
from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.evaluation import generates_alike, operations_of, parameters, quality_of
from transect.evaluation.active import ParametersRead
from transect.evaluation.operations import operations_counted
from transect.operators.grouped_integer import GroupedInteger
from transect.operators.int4_kernel import knows
from transect.parts import insert
from transect.parts.experts import ExpertsPart, set_active

from .models import VOCABULARY, inputs, tiny


def dense_count(model):
    """All but the rows of the embeddings that a single token does not look up."""
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    table = 0 if head is words else words.numel() - words.shape[1]
    return parameters(model) - table


@pytest.mark.parametrize("name", ["llama", "gemma", "phi"])
def test_a_token_reads_all_of_a_dense_model_but_the_rows_of_other_words(name):
    model = tiny(name)
    assert operations_of(model).active_parameters == dense_count(model)
    assert quality_of(model, [4])[0].active_parameters == dense_count(model)


def test_a_model_that_is_not_causal_reads_the_rows_of_its_input():
    model = tiny("vit")
    with ParametersRead(model) as read:
        model(**inputs("vit"))
    assert operations_of(model).active_parameters == read.count <= parameters(model)


def test_a_table_of_positions_is_read_at_one():
    model = tiny("gpt2")
    positions = model.transformer.wpe.weight
    assert operations_of(model).active_parameters == dense_count(model) - positions.numel() + positions.shape[1]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_of_experts_those_that_are_chosen(name):
    model = tiny(name)
    config = model.config
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    stored = sum(p.numel() for path, p in model.named_parameters() if ".experts." in path)
    expected = dense_count(model) - stored + stored * config.num_experts_per_tok // experts
    for way in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(way)
        assert operations_of(model).active_parameters == expected


def test_converted_into_experts_what_runs_is_what_is_read():
    model = tiny("llama")
    data = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))
    transect.convert(model, "dense2moe", data, steps=0, experts=6, active=2, shared=0.25)
    routed = [part.split for part in model.modules() if isinstance(part, ExpertsPart)]
    stored = sum(p.numel() for split in routed for p in split.parameters())
    for active in (1, 2, 4, 6):
        set_active(model, active)
        expected = dense_count(model) - stored * (6 - active) // 6
        assert operations_of(model).active_parameters == expected


def test_blocks_that_are_skipped_are_not_read_and_loops_once():
    model = tiny("llama")
    whole = operations_of(model).active_parameters
    transect.convert(model, "algoformer", steps=0, times=3)
    assert operations_of(model).active_parameters == whole
    model = tiny("llama")
    insert(model, "block", "first", layers=[1], settings={"prompt": 2, "start": -5.0})
    block = sum(p.numel() for p in Anatomy(model).blocks[1].module.parameters())
    router = model.config.hidden_size + 1
    assert operations_of(model).active_parameters == pytest.approx(whole - (block - router), abs=router)


def test_operators_read_their_factors_and_codes():
    model = transect.compress(tiny("llama"), "svd", 0.5)
    assert operations_of(model).active_parameters == dense_count(model)
    model = transect.compress(tiny("llama"), "rtn", 0.5)
    assert parameters(model) > sum(p.numel() for p in model.parameters())  # codes
    assert operations_of(model).active_parameters == dense_count(model)


def test_views_look_ups_and_storages_in_common():
    model = nn.Module()
    both = torch.arange(24.0).view(6, 4)
    model.first, model.second = nn.Parameter(both[:3]), nn.Parameter(both[3:])
    model.third = nn.Parameter(torch.ones(3, 4, 8))
    x = torch.ones(1, 4)

    def read(run):
        with torch.no_grad(), ParametersRead(model) as seen:
            run()
        return seen.count

    assert read(lambda: model.first.T[1:].view(3, 3)) == 0
    assert read(lambda: x @ model.first.T) == 12
    assert read(lambda: (x @ model.second[1:].T, x @ model.second[:2].T)) == 12  # the row in common once
    assert read(lambda: model.second[torch.tensor([2, 0, 2])]) == 8
    assert read(lambda: model.second.index_select(1, torch.tensor([3]))) == 3
    assert read(lambda: model.second.gather(0, torch.tensor([[1, 2, 2, 0]]))) == 4
    assert read(lambda: x.expand(2, 4) @ model.third[torch.tensor([1])]) == 32
    assert read(lambda: model.third[0, 0].expand(5, 8) + 1) == 8
    offs = torch.tensor([0, 3, 3], dtype=torch.int32)
    assert read(lambda: torch._grouped_mm(torch.ones(3, 4), model.third, offs=offs)) == 32


def test_prompts_may_be_as_long_as_the_model_has_positions_for():
    gpt2, llama = tiny("gpt2"), tiny("llama")
    most = gpt2.config.max_position_embeddings
    assert quality_of(gpt2, [most - 1])[0].decode > 0
    with pytest.raises(TransectError, match=f"from 2 to {most - 1}"):
        quality_of(gpt2, [most])
    longer = llama.config.max_position_embeddings + 8  # positions are turned: cost can be measured beyond
    assert quality_of(llama, [longer])[0].length == longer
    with pytest.raises(TransectError, match="does not go on with"):
        quality_of(tiny("bert"), [8])
    assert generates_alike(llama)


@torch.no_grad()
@pytest.mark.parametrize(("bits", "products"), [(3, 1), (4, 1), (8, 2)])
def test_products_with_packed_integers_are_operations(bits, products):
    codes = torch.randint(2**bits, (48, 64), generator=torch.Generator().manual_seed(0))
    one = GroupedInteger.from_codes(codes, torch.ones(48, 2), None, bits, 32).bfloat16()
    with operations_counted() as counted:
        one(torch.ones(5, 64, dtype=torch.bfloat16))
    kernel = products * 2 * 5 * 64 * 48 + 2 * 5 * 2 * 48  # and what zero points add
    assert counted.get_total_flops() == (kernel if knows(one) else 2 * 5 * 64 * 48)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_operations_are_those_that_eager_attention_and_a_loop_over_experts_have(name):
    """Torch's own counter does not know the kernels that stand for them on a CPU."""
    model, counts = tiny(name), []
    for attention, experts in (("eager", "eager"), ("sdpa", "grouped_mm")):
        model.set_attn_implementation(attention)
        if name == "mixtral":
            model.set_experts_implementation(experts)
        counts.append([(one.flops, one.decode_flops) for one in quality_of(model, [8, 32])])
    assert counts[0] == counts[1] and counts[0][0] < counts[0][1]


@torch.no_grad()
@pytest.mark.parametrize(("name", "everything"), [("llama", True), ("gpt2", True), ("mixtral", False)])
def test_a_token_that_reads_everything_stands_for_all(name, everything):
    model = tiny(name)
    with ParametersRead(model) as read:
        model(torch.tensor([[3]]), use_cache=True)
    assert read.everything is everything
    model = transect.compress(tiny(name), "rtn", 0.5)
    with ParametersRead(model) as read:
        model(torch.tensor([[3]]), use_cache=True)
    assert read.everything is everything
