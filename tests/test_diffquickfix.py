"""Diff-QuickFix: the ridge regression, captions, tracing, and the edit on encoders, decoders and CLIP's text tower."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers as tf

from tests.facts import WORDS, specimen_of
from tests.models import _TEXT, CAUSAL, assert_same_tensors, tiny
from transect.anatomy import Anatomy
from transect.data import Fact, Passage, Specimen
from transect.editing import edit_specimen
from transect.editing.catalog.diffquickfix.captions import batch_of, captions_of, embeddings, read_by
from transect.editing.catalog.diffquickfix.diffquickfix import aligned, reads, remap
from transect.editing.catalog.diffquickfix.tracing import traced
from transect.editing.patch import product
from transect.errors import BadData, NotApplicable, TransectError

NAME = "diffquickfix"
FACTS = [Fact("w3 {} w4", "w5 w6", "w9", "w7", neighbours=(Passage("w3 w20 w4", "w9"), Passage("w21 w22", "w9")))]
PLAIN = {"prefixes": "w30 w31, w32"}


def specimen(name, dtype=torch.float64, facts=FACTS):
    return Specimen(Anatomy(tiny(name, dtype=dtype)), WORDS, None, facts)


def problem(d_out=7, d_in=12, count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((d_out, d_in), (d_in, count), (d_out, count))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def solved(weight, keys, values, penalty):
    return weight + product(*remap(weight, keys, values, penalty, torch.float64))


@pytest.mark.parametrize("count", [1, 5, 12, 40])
def test_it_is_the_minimum_and_its_limits_are_the_old_weight_and_the_values(count):
    weight, keys, values = problem(count=count)
    made = solved(weight, keys, values, 0.01)
    gradient = 0.01 * (made - weight) + (made @ keys - values) @ keys.T
    assert gradient.abs().max() < 1e-11
    direct = (0.01 * weight + values @ keys.T) @ torch.linalg.inv(
        0.01 * torch.eye(12, dtype=torch.float64) + keys @ keys.T
    )
    torch.testing.assert_close(made, direct, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solved(weight, keys, values, 1e9), weight, rtol=0, atol=1e-6)
    if count <= 5:
        torch.testing.assert_close(solved(weight, keys, values, 1e-9) @ keys, values, rtol=0, atol=1e-4)
    twice = solved(weight, keys.repeat(1, 2), values.repeat(1, 2), 0.02)
    torch.testing.assert_close(twice, made, rtol=1e-10, atol=1e-10)
    order = torch.randperm(count)
    torch.testing.assert_close(solved(weight, keys[:, order], values[:, order], 0.01), made, rtol=1e-10, atol=1e-10)


def test_what_is_orthogonal_to_all_keys_stays_and_the_rank_is_that_of_the_keys():
    weight, keys, values = problem(count=4)
    left, right = remap(weight, keys, values, 0.01, torch.float64)
    assert left.shape[1] == 4
    orthogonal = torch.linalg.qr(keys, mode="complete")[0][:, 4:]
    assert (product(left, right) @ orthogonal).abs().max() < 1e-12
    assert remap(weight, keys.repeat(1, 5), values.repeat(1, 5), 0.01, torch.float64)[0].shape[1] == 4
    assert remap(weight, keys, weight @ keys, 0.01, torch.float64)[0].norm() < 1e-12  # nothing is asked for


def test_a_larger_penalty_leaves_more_and_changes_less():
    weight, keys, values = problem(count=30)
    made = [solved(weight, keys, values, penalty) for penalty in (1e-3, 1e-2, 0.1, 1, 10, 1e3)]
    left = [float((one @ keys - values).square().sum()) for one in made]
    changed = [float((one - weight).norm()) for one in made]
    assert left == sorted(left) and changed == sorted(changed, reverse=True)


def test_values_are_aligned_and_the_last_is_repeated():
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(aligned(rows, 2), rows[:2])
    assert torch.equal(aligned(rows, 5), rows[[0, 1, 2, 2, 2]])


@pytest.mark.parametrize("roles", ["o", "v,o", "k"])
@pytest.mark.parametrize("name", ["clip", "bert", "roberta", "llama", "gpt2", "bloom", "gpt_neox", "phi3"])
def test_only_the_chosen_weights_change_and_undo_is_bit_for_bit(name, roles):
    one = specimen(name)
    before = copy.deepcopy(one.model)
    edited = edit_specimen(one, NAME, {**PLAIN, "roles": roles})
    assert {row["matrix"] for row in edited.card.changes} == {f"blocks.0.attention.{role}" for role in roles.split(",")}
    biases = [name for name, _ in before.named_parameters() if name.endswith("bias")]
    assert all(torch.equal(before.get_parameter(n), one.model.get_parameter(n)) for n in biases)
    assert not set(edited.entry.writes) & set(biases) and edited.entry.reads is not None
    assert set(edited.entry.writes) <= set(edited.entry.reads)
    edited.undo()
    assert_same_tensors(one.model, before)


@pytest.mark.parametrize("name", ["clip", "bert", "llama"])
def test_the_phrase_comes_nearer_to_what_it_is_to_mean_and_others_move_less(name):
    one = specimen(name)
    edited = edit_specimen(one, NAME, PLAIN)
    before, after = edited.card["cosine of the phrase and what it is to mean"]
    notes = edited.card.notes
    assert after > before
    if name == "clip":  # with filling among the keys, all captions move
        return
    assert notes["1 - cosine, neighbours, from before"] < notes["1 - cosine, captions of the phrase, from before"]


@pytest.mark.parametrize("name", ["clip", "bert", "gpt2"])
def test_a_phrase_that_is_to_mean_itself_changes_nothing_though_there_is_a_bias(name):
    fact = replace(FACTS[0], new_answer=FACTS[0].subject)
    one = specimen(name, facts=[fact])
    before = copy.deepcopy(one.model)
    edit_specimen(one, NAME, PLAIN)
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(one.model.get_parameter(name), parameter, rtol=0, atol=1e-13)


def test_the_matrix_gives_what_it_gave_to_the_other_phrase():
    """With the last token alone and a small penalty, at the token that is edited, W' k = W x in the model itself."""
    for name in ("clip", "bert", "llama"):
        one = specimen(name)
        block = one.anatomy.blocks[0]
        o, old = block.matrix("o"), block.matrix("o").weight.clone()
        keys, values = (captions_of(one, FACTS[0], phrase, ["w30 w31"]) for phrase in ("w5 w6", "w7"))
        wanted = [x @ old.T for x in read_by(one, o, values, after=False)]
        edit_specimen(one, NAME, {"prefixes": "w30 w31", "after": False, "weight": 1e-10})
        for x, value in zip(read_by(one, o, keys, after=False), wanted, strict=True):
            assert x.shape == (1, 32)
            torch.testing.assert_close(x @ o.weight.T, value, rtol=0, atol=1e-4)


def test_tokens_behind_the_phrase_and_filling():
    one, tower = specimen("bert"), specimen("clip")
    (caption,) = captions_of(one, FACTS[0], "w5 w6", [])
    o = one.anatomy.blocks[0].matrix("o")
    text = WORDS("w3 w5 w6 w4")["input_ids"]
    assert caption.ids.tolist() == text and text[caption.last] == WORDS("w6")["input_ids"][-1]
    (read,) = read_by(one, o, [caption], after=True)
    assert len(read) == len(text) - caption.last
    (filled,) = read_by(tower, tower.anatomy.blocks[0].matrix("o"), [caption], after=True)
    assert len(filled) == _TEXT["max_position_embeddings"] - caption.last
    torch.testing.assert_close(  # filling is not seen where there is a mask
        embeddings(one, [caption.ids, torch.arange(3, 20)])[0], embeddings(one, [caption.ids])[0], rtol=0, atol=1e-12
    )
    assert "attention_mask" in batch_of(one, [caption.ids]) and "attention_mask" not in batch_of(tower, [caption.ids])


def test_clip_is_pooled_where_transformers_pools_it():
    model = tiny("clip", dtype=torch.float64)
    one = Specimen(Anatomy(model), WORDS, None, FACTS)
    end = model.config.eos_token_id = model.text_model.eos_token_id = 40
    ids = torch.tensor([3, 7, 9, end])
    with torch.no_grad():
        pooled = model.text_model(**batch_of(one, [ids])).pooler_output
    torch.testing.assert_close(embeddings(one, [ids]), pooled)


def test_of_a_whole_CLIP_the_text_tower_is_asked_for():
    torch.manual_seed(0)
    image = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = tf.CLIPConfig(text_config={**_TEXT, "projection_dim": 24}, vision_config=image, projection_dim=24)
    model = tf.CLIPModel(config).eval()
    with pytest.raises(NotApplicable, match="open its text tower alone"):
        edit_specimen(Specimen(Anatomy(model), WORDS, None, FACTS), NAME, PLAIN)


def test_tracing_finds_the_layer_that_was_made_to_carry_the_phrase():
    """The first layer's attention is silent, and what the last one writes at the phrase reaches no later token."""
    one = specimen("clip")
    o = one.anatomy.blocks[0].matrix("o")
    o.write(torch.zeros(o.shape), torch.zeros(o.shape[0]))
    effects = traced(one, one.facts, 3.0, 4)
    assert effects.argmax() == 1 and effects[1] > 0 and effects[[0, 2]].abs().max() < 1e-9
    card = edit_specimen(one, NAME, {**PLAIN, "layer": -1}).card
    assert card.notes["layer"] == 1 and "1: +" in card.notes["attention brings the phrase back by, cosine"]


def test_two_edits_of_different_layers_depend_on_each_other_one_way():
    one = specimen("llama")
    names = [name for name, _ in one.model.named_parameters()]
    first = reads(one, layer=0)
    assert "model.layers.0.self_attn.q_proj.weight" in first and "model.embed_tokens.weight" in first
    assert not {"model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.v_proj.weight", "model.norm.weight",
                "lm_head.weight"} & first  # fmt: skip
    assert "model.layers.0.mlp.down_proj.weight" in reads(one, layer=1)
    assert reads(one, layer=-1) == set(names)
    lower = copy.deepcopy(one.model)
    later = edit_specimen(one, NAME, {**PLAIN, "layer": 1})
    edit_specimen(one, NAME, PLAIN)
    later.undo()
    edit_specimen(Specimen(Anatomy(lower), WORDS, None, FACTS), NAME, PLAIN)
    assert_same_tensors(one.model, lower)  # as if the edit of layer 1 had never been made


@pytest.mark.parametrize("name", CAUSAL)
def test_every_decoder(name):
    one = specimen_of(name, count=1)
    before, after = edit_specimen(one, NAME, PLAIN).card["cosine of the phrase and what it is to mean"]
    assert after == after and before == before


@pytest.mark.parametrize(
    ("given", "fact", "error", "message"),
    [
        ({"roles": "q"}, {}, TransectError, "some of o, v, k"), ({"roles": ""}, {}, TransectError, "some of o, v, k"),
        ({"layer": 3}, {}, TransectError, "layer 3 does not exist"),
        ({}, {"new_answer": None}, BadData, "no new_answer"),
        ({"weight": 0}, {}, TransectError, "weight=0 must be"), ({}, {"new_answer": " "}, BadData, "no new_answer"),
        ({"prefixes": "w9 " * 70}, {}, TransectError, "longer than the model's context"),
    ],
)  # fmt: skip
def test_refusals(given, fact, error, message):
    one = specimen("clip", facts=[replace(FACTS[0], **fact)])
    before = copy.deepcopy(one.model)
    with pytest.raises(error, match=message):
        edit_specimen(one, NAME, {**PLAIN, **given})
    assert_same_tensors(one.model, before)


def test_images_and_dropped_attention_are_refused():
    with pytest.raises(NotApplicable, match="reads images"):
        edit_specimen(Specimen(Anatomy(tiny("vit")), WORDS, None, FACTS), NAME, {})
    one = specimen("llama")
    one.anatomy.blocks[0].attention.drop()
    with pytest.raises(NotApplicable, match="was dropped"):
        edit_specimen(one, NAME, {})
