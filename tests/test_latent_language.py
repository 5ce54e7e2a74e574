"""The logit lens by layer: identities at the last layer, planted states, languages that swap, kinds of tokens."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transect.activations import Specimen, answer_log_probabilities, changed
from transect.anatomy import Anatomy
from transect.data import Batches
from transect.data.concepts import Concept, load_concepts
from transect.errors import BadData
from transect.probes import run_probes
from transect.probes.catalog.latent_language import lens_log_probabilities
from transect.probes.scripts import kind_of_text, kinds_of_tokens

from .models import CAUSAL, CONFIGS, VOCABULARY, inputs, logits, tiny

NAME = "latent-language"
CONCEPTS = [
    {"prompt": "w5 w6", "target": "b", "words": {"a": "w10", "b": "w20"}},
    {"prompt": "w7 w8 w9", "target": "b", "words": {"a": "w11", "b": "w21"}},
    {"prompt": "w9", "target": "a", "words": {"a": "w12", "b": "w22"}},
]


def tokenizer():
    """w2 to w63, each one token."""
    names = ["<unk>", "<pad>", *(f"w{number}" for number in range(2, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def specimen(name="llama", *batches, dtype=torch.float64, words=None):
    model = tiny(name, dtype=dtype)
    return Specimen(Anatomy(model), words, Batches(list(batches) or [inputs(name)]))


def written(tmp_path, concepts):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(concepts))
    return str(path)


def inspected(one, concepts=""):
    return run_probes(one, {NAME: {"concepts": concepts}})


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_model_runs_and_ends_with_its_own_predictions(name, tmp_path):
    one = specimen(name, words=tokenizer(), dtype=torch.float32)
    before = logits(one.model, inputs(name))
    result = inspected(one, written(tmp_path, CONCEPTS))[NAME]
    logs = before.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1).mean()
    assert float(result["entropy"][-1]) == pytest.approx(float(entropy), rel=1e-4)
    assert float(result["divergence"][-1]) == pytest.approx(0, abs=1e-9)
    assert float(result["rank"][-1]) == 0 and float(result["agreement"][-1]) == 1
    torch.testing.assert_close(result["kinds"].sum(1), torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert len(result.plots()) == 4
    assert torch.equal(logits(one.model, inputs(name)), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(CAUSAL)))
def test_encoders_are_refused(name):
    assert "does not predict a next token" in inspected(specimen(name)).refused[NAME]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_last_layer_gives_words_of_several_tokens_the_models_own_probability(name):
    one = specimen(name)
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 1), (3, 1), (5, 2), (1, 3), (5, 2)]
    pairs = [tuple(torch.randint(3, 60, (n,), generator=generator) for n in shape) for shape in shapes]
    logs = lens_log_probabilities(one, one.lens, pairs)
    torch.testing.assert_close(logs[:, -1], answer_log_probabilities(one.model, pairs), rtol=1e-5, atol=1e-5)
    assert (logs <= 0).all()
    every = [(pairs[0][0], torch.tensor([token])) for token in range(VOCABULARY)]
    total = lens_log_probabilities(one, one.lens, every).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64))


def test_a_planted_state_says_its_word_at_its_layer(tmp_path):
    one = specimen(words=tokenizer())
    one.lens.head.weight.data.mul_(30)  # so that every layer is sure of some token
    direction = (one.lens.weight * one.lens.gain)[10]

    def planted(activations):
        return 1e3 * direction.expand_as(activations)

    concepts = written(tmp_path, CONCEPTS[:1])
    with changed(one.anatomy, {("residual", 2): planted}):
        result = inspected(one, concepts)[NAME]
    target, a, b = 1, 0, 1
    assert result.label("language", 0) == ["a", "b"]
    assert float(result["language"][target, 2, a]) == pytest.approx(1, abs=1e-3)
    assert float(result["language"][target, 2, b]) < 1e-3 and float(result["language"][target, 1, a]) < 0.5
    assert "pass through a (probability 1.00 at layer 2)" in " ".join(result.findings)
    assert result["language"][0].isnan().all()  # no prompt asks for language a


def test_swapped_rows_of_the_head_swap_the_languages(tmp_path):
    concepts = written(tmp_path, CONCEPTS)
    one = specimen(words=tokenizer())
    first = inspected(one, concepts)[NAME]["language"]
    head = one.lens.head.weight.data
    head[[10, 11, 12, 20, 21, 22]] = head[[20, 21, 22, 10, 11, 12]].clone()
    swapped = inspected(one, concepts)[NAME]["language"]
    torch.testing.assert_close(swapped, first.flip(-1))
    assert not torch.allclose(swapped, first)


def test_order_and_repetition_of_concepts_mean_nothing(tmp_path):
    one = specimen(words=tokenizer())
    first = inspected(one, written(tmp_path, CONCEPTS))[NAME]["language"]
    doubled = inspected(one, written(tmp_path, [*CONCEPTS, *CONCEPTS]))[NAME]["language"]
    turned = inspected(one, written(tmp_path, CONCEPTS[1::-1] + CONCEPTS[2:]))[NAME]["language"]
    torch.testing.assert_close(doubled, first)
    torch.testing.assert_close(turned, first)


def test_forms_add_up_and_are_not_counted_twice(tmp_path):
    one = specimen(words=tokenizer())
    forms = {"a": ["w10", "w10 w11", "w13", "w13"], "b": "w20 w21"}
    entry = {"prompt": "w5", "target": "a", "words": forms}
    result = inspected(one, written(tmp_path, [entry]))[NAME]
    prompt = torch.tensor([5])
    single = lens_log_probabilities(one, one.lens, [(prompt, torch.tensor([token])) for token in (10, 13)])
    torch.testing.assert_close(result["language"][0, :, 0], single.exp().sum(0))  # w10 w11 begins with w10
    pair = lens_log_probabilities(one, one.lens, [(prompt, torch.tensor([20, 21]))])[0]
    torch.testing.assert_close(result["language"][0, :, 1], pair.exp())
    torch.testing.assert_close(result["language per token"][0, :, 1], (pair / 2).exp())


def test_concepts_that_cannot_tell_languages_apart_are_left_out(tmp_path):
    one = specimen(words=tokenizer())
    shared = {"prompt": "w5", "target": "a", "words": {"a": "w10 w11", "b": "w10 w12"}}
    result = inspected(one, written(tmp_path, [*CONCEPTS, shared]))[NAME]
    assert any(caveat.startswith("1 concepts were left out") for caveat in result.caveats)
    assert "nothing tells them apart" in inspected(one, written(tmp_path, [shared])).refused[NAME]
    said = {"prompt": "w10 w5", "target": "a", "words": {"a": "w10", "b": "w20"}}
    result = inspected(one, written(tmp_path, [said]))[NAME]
    assert any(caveat.startswith("1 prompts contain") for caveat in result.caveats)


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([], "no concepts"), ({}, "should hold a list"), ([{"prompt": "w5", "target": "a"}], "'words' is missing"),
        ([{"prompt": "w5", "target": "a", "words": {"a": "w10"}}], "two languages"),
        ([{"prompt": "w5", "target": "c", "words": {"a": "w10", "b": "w20"}}], "target language 'c'"),
        ([{"prompt": "w5", "target": "a", "words": {"a": "w10", "b": []}}], "no word in 'b'"),
        ([{"prompt": " ", "target": "a", "words": {"a": "w10", "b": "w20"}}], "prompt is empty"),
        ([{"prompt": "w5", "target": "a", "words": {"a": "dog", "b": "w20"}}], "not in the tokenizer's vocabulary"),
    ],
)  # fmt: skip
def test_bad_concepts_are_named(tmp_path, concepts, message):
    with pytest.raises(BadData, match=message):
        inspected(specimen(words=tokenizer()), written(tmp_path, concepts))


def test_concepts_that_are_no_file_need_one_and_a_tokenizer(tmp_path):
    with pytest.raises(BadData, match="cannot be read"):
        inspected(specimen(words=tokenizer()), str(tmp_path / "nowhere.json"))
    assert "tokenizer" in inspected(specimen(), written(tmp_path, CONCEPTS)).refused[NAME]
    result = inspected(specimen())[NAME]
    assert "kinds" not in result.quantities and result.plots()


def test_concepts_of_the_bundled_model():
    made = load_concepts("organism")
    assert len(made) == 300 and all(isinstance(one, Concept) and len(one.words) == 2 for one in made)
    assert {one.target for one in made} == {"language 1", "language 2"}
    assert load_concepts("organism") == made == load_concepts(made)


def test_padding_does_not_count():
    long, short = inputs("gpt2", batch=1, length=12), inputs("gpt2", batch=1, length=9, seed=5)
    alone = inspected(specimen("gpt2", long, short))[NAME]
    ids = torch.cat([long["input_ids"], torch.nn.functional.pad(short["input_ids"], (0, 3))])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    padded = inspected(specimen("gpt2", {"input_ids": ids, "attention_mask": mask}))[NAME]
    for name in alone.quantities:
        torch.testing.assert_close(padded[name], alone[name], rtol=1e-6, atol=1e-7)


def test_energy_is_that_of_the_formula():
    one, batch = specimen(), inputs("llama")
    with torch.no_grad():
        states = one.model(**batch, output_hidden_states=True).hidden_states[1]
        h = torch.nn.functional.normalize(one.lens.norm(states).flatten(0, 1).float(), dim=-1)
    w = torch.nn.functional.normalize(one.lens.weight.float(), dim=1)
    within = (w @ w.T).square().mean().sqrt()
    random = torch.nn.functional.normalize(torch.randn(200_000, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    energy = ((h @ w.T).square().mean(1) / within).sqrt().mean()
    reference = ((random @ w.T).square().mean() / within).sqrt()
    assert float(inspected(one)[NAME]["energy"][1]) == pytest.approx(float(energy / reference), rel=5e-3)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("dog", "latin, inside"), (" dog", "latin, new word"), ("été", "latin, inside"), ("кот", "cyrillic"),
        ("猫", "cjk"), ("ネコ", "katakana"), ("ねこ", "hiragana"), ("고양이", "hangul"), ("قط", "arabic"),
        ("42", "digits"), ("...", "punctuation"), (" \n", "white space"), ("\ufffd", "bytes"),
        ("١", "digits"), ("€", "punctuation"),
    ],
)  # fmt: skip
def test_kinds_of_text(text, kind):
    assert kind_of_text(text, text.startswith(" ")) == kind


def test_kinds_of_tokens_of_a_vocabulary():
    words = ["<unk>", "▁dog", "s", "▁кот", "7", ".", "▁"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    kinds, index = kinds_of_tokens(made, 9)
    shown = [kinds[number] for number in index.tolist()]
    expected = ["special", "latin, new word", "latin, inside", "cyrillic", "digits", "punctuation"]
    assert shown[:6] == expected and shown[7:] == ["unused", "unused"]
