"""The logit lens by layer: identities at the last layer, planted states, languages that swap, kinds of tokens."""

import json
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transect.anatomy import Anatomy
from transect.claims import Context, Verdict, claims, run_claims
from transect.claims.catalog.latent_language import bilingual as toy
from transect.claims.catalog.latent_language import latent_language as about
from transect.data import Batches, Specimen, load
from transect.data.concepts import Concept, load_concepts
from transect.errors import BadData, TransectError
from transect.forward import answer_log_probabilities, changed
from transect.probes import drawings, run_probes
from transect.probes.catalog.latent_language.language_dimensions import sets_of, variances
from transect.probes.catalog.latent_language.languages import Asked, lens_log_probabilities
from transect.probes.catalog.latent_language.scripts import kind_of_text, kinds_of_tokens

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
    assert len(drawings(result)) == 4
    assert torch.equal(logits(one.model, inputs(name)), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())


def test_of_a_long_text_tokens_are_spread_over_it():
    ids = inputs("llama", batch=2, length=9)["input_ids"]
    one = specimen("llama", *({"input_ids": row[None]} for row in ids))
    found = run_probes(one, {NAME: {"tokens": 5}})[NAME]  # every fourth of 18
    logs = logits(one.model, {"input_ids": ids}).log_softmax(-1).flatten(0, 1)[::4]
    assert len(logs) == 5
    assert float(found["entropy"][-1]) == pytest.approx(float(-(logs.exp() * logs).sum(-1).mean()), rel=1e-6)


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
    assert "kinds" not in result.quantities and drawings(result)


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


def paired(count=6, first=3, words=20):
    """Meanings asked in two languages: a prompt is one token, and so is its answer's word."""
    made = []
    for number in range(count):
        forms = {"a": f"w{words + 2 * number}", "b": f"w{words + 2 * number + 1}"}
        made += [{"prompt": f"w{first + 2 * number + odd}", "target": "ab"[odd], "words": forms} for odd in (0, 1)]
    return made


def planted():
    """A model without sublayers, whose dimension 0 carries the language of its word, and others the meaning."""
    one = specimen(words=tokenizer())
    for block in one.anatomy.blocks:
        block.attention.drop()
        block.mlp.drop()
    embedding, head = one.model.get_input_embeddings().weight.data, one.lens.head.weight.data
    head.zero_()
    for number in range(6):
        for odd, side in enumerate((1.0, -1.0)):
            state = torch.zeros(32, dtype=torch.float64)
            state[0], state[5 + number] = side, 1.0
            embedding[3 + 2 * number + odd] = state
            head[20 + 2 * number + odd] = 20 * state
    one.model.model.norm.weight.data.fill_(1)
    return one


def test_a_planted_dimension_changes_the_language_and_random_ones_do_nothing(tmp_path):
    result = run_probes(planted(), {NAME: {"concepts": written(tmp_path, paired()), "dimensions": 0.03}})[NAME]
    swaps, words = result.labels["swap"], result.labels["word"]
    assert swaps[1].startswith("top") and swaps[2].startswith("random") and words[2] == "any language"
    assert (result["language variance"].argmax(1) == 0).all() and (result["language held"] > 0.999).all()
    nothing, top, random, every = result["swapped answers"]
    assert float(nothing[:, 0].min()) > 0.99 and float(nothing[:, 1].max()) < 0.01
    for swapped in (top, every):
        assert float(swapped[:, 1].min()) > 0.99 and float(swapped[:, 2].min()) > 0.99
    torch.testing.assert_close(random, nothing)  # the other dimensions are the same in both prompts
    assert "1 dimensions of 32" in result.findings[-1] and len(drawings(result)) == 5


@pytest.mark.parametrize("name", CAUSAL)
def test_swapping_every_dimension_of_the_last_layer_gives_the_other_prompts_answers(name, tmp_path):
    one = specimen(name, words=tokenizer())
    entries = paired()
    result = inspected(one, written(tmp_path, entries))[NAME]
    numbers = [[int(text[1:]) for text in (entry["prompt"], *entry["words"].values())] for entry in entries]
    prompt, a, b = torch.tensor(numbers[2:4] + numbers[6:8] + numbers[10:12]).T  # every other meaning is swapped
    chances = logits(one.model, {"input_ids": prompt[:, None]})[:, -1].softmax(-1)
    own = torch.where(torch.arange(6) % 2 == 0, a, b)[:, None]
    other = torch.where(torch.arange(6) % 2 == 0, b, a)[:, None]
    expected = [
        torch.stack([given.gather(1, own).mean(), given.gather(1, other).mean()])
        for given in (chances, chances.unflatten(0, (3, 2)).flip(1).flatten(0, 1))
    ]
    nothing, _, _, every = result["swapped answers"]
    torch.testing.assert_close(nothing[:, :2], expected[0].expand(4, 2))
    torch.testing.assert_close(every[-1, :2], expected[1])
    torch.testing.assert_close(every[:, 2], every[:, :2].sum(1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())


def test_variance_between_languages_by_brute_force():
    states = torch.randn(7, 3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states[:, :, 1, 4] += torch.tensor([0.0, 5.0, -5.0])
    between, total = variances(states)
    for layer in range(2):
        for dimension in range(5):
            values = states[:, :, layer, dimension]
            rest = [[float(v - row.mean()) for v in row] for row in values]
            means = [sum(row[k] for row in rest) / 7 for k in range(3)]
            assert float(between[layer, dimension]) == pytest.approx(sum(m * m for m in means) / 3)
            assert float(total[layer, dimension]) == pytest.approx(sum(v * v for row in rest for v in row) / 21)
    assert (between <= total + 1e-12).all() and float(between[1, 4] / total[1, 4]) > 0.9


def test_concepts_of_one_meaning_are_put_together():
    ids = torch.zeros(1, dtype=torch.long)
    asked = [Asked(ids, target, {}, meaning) for meaning, target in ("xa", "xa", "xb", "ya", "yb", "xb", "za", "xa")]
    assert sets_of(asked) == [{"a": 0, "b": 2}, {"a": 1, "b": 5}, {"a": 3, "b": 4}]
    with_third = [*asked, Asked(ids, "c", {}, "x")]
    assert sets_of(with_third) == [{"a": 0, "b": 2, "c": 8}]


def test_without_concepts_that_pair_up_a_caveat_says_so(tmp_path):
    for entries in (CONCEPTS, paired(3)):
        result = inspected(specimen(words=tokenizer()), written(tmp_path, entries))[NAME]
        assert "swapped answers" not in result.quantities
        assert any("too few concepts are asked in several languages" in caveat for caveat in result.caveats)
    with pytest.raises(TransectError, match=r"dimensions=0\.6"):
        run_probes(specimen(), {NAME: {"dimensions": 0.6}})


def test_word_lists_translate_and_texts_follow_one_grammar():
    generator = torch.Generator().manual_seed(0)
    ids = toy.documents(0.9, 400, generator)
    assert ids.shape == (400, toy.LENGTH) and int(ids.max()) < toy.VOCABULARY
    language = torch.full((toy.VOCABULARY,), -1)
    language[toy.TAGS :] = torch.arange(3)
    for number, first in enumerate(toy.OFFSETS):
        language[first : first + (toy.SMALL if number == 2 else toy.MEANINGS)] = number
    meaning = torch.arange(toy.VOCABULARY) - torch.tensor(toy.OFFSETS)[language]
    texts, lists = ids[::2], ids[1::2].unflatten(1, (-1, 4))
    assert (language[texts] == language[texts[:, :1]]).all()
    assert 0.8 < float((texts[:, 0] == toy.TAGS).double().mean()) < 0.97
    following = {(a, b) for row in meaning[texts[:, 1:]].tolist() for a, b in pairwise(row)}
    assert len(following) <= toy.MEANINGS * len(toy.SUCCESSORS)
    assert (language[lists[..., 0]] == language[lists[..., 1]]).all()
    assert (language[lists[..., 2]] == language[lists[..., 3]]).all()
    assert torch.equal(meaning[lists[..., 1]], meaning[lists[..., 3]])
    prompts, asked = toy.questions("C", "B", times=1)
    assert (prompts[:, -1] == toy.TAGS + 1).all() and torch.equal(meaning[prompts[:, -2]], asked)
    assert not (meaning[prompts[:, 1:-2:4]] == asked[:, None]).any()


def test_what_the_layers_of_a_translation_say_ends_with_the_models_own_answer():
    model = toy.bilingual(0.9, 0, steps=2)
    with torch.random.fork_rng():
        assert torch.equal(toy.bilingual(0.9, 0, steps=2).lm_head.weight, model.lm_head.weight)
    prompts, meanings = toy.questions("C", "B")
    chances = logits(model, {"input_ids": prompts})[:, -1].softmax(-1)
    found = about.translated(Specimen(Anatomy(model)), "C", "B")
    for number, name in enumerate(toy.LANGUAGES):
        mean = chances.gather(1, (meanings + toy.OFFSETS[number])[:, None]).mean()
        assert found["layers"][-1][name] == pytest.approx(float(mean), rel=1e-4)
    assert len(found["layers"]) == 7 and found["right"] < 0.5
    splits = [(row["A"] - row["B"]) / (row["A"] + row["B"]) for row in found["layers"]]
    assert found["gap"] == pytest.approx(sum(splits[1:6]) / 5)
    assert all(split < 0 for split in splits[found["overtakes"] :])
    assert found["overtakes"] == 0 or splits[found["overtakes"] - 1] >= 0


def test_claims_about_models_that_have_not_learned_the_task_do_not_apply(monkeypatch):
    small = specimen(words=tokenizer())
    monkeypatch.setattr(about, "bilingual", lambda share, seed: toy.bilingual(share, seed, steps=1))
    for name, reason in (("dimensions", "does not know their words"), ("dominant", "did not learn to translate")):
        (outcome,) = run_claims(small.model, small.data, small.data, [f"{NAME}/{name}"], specimen=small)
        assert outcome.result.verdict == Verdict.NOT_APPLICABLE and reason in outcome.result.explanation


def test_the_claim_about_dimensions_on_the_bundled_model(monkeypatch):
    from transect.checkpoint import open_model

    monkeypatch.setattr(about, "SHARES", (0.05,))
    monkeypatch.setattr("transect.probes.catalog.latent_language.language_dimensions.SWAPPED", 4)
    opened = open_model("organism", dtype="float32")
    data = load("organism:heldout", opened.model, opened.tokenizer, sequences=2, sequence_length=16)
    one = Specimen(Anatomy(opened.model), opened.tokenizer, data)
    result = claims([f"{NAME}/dimensions"])[0].function(Context(opened.model, data, data, specimen=one))
    top, random, every = result.numbers
    held = top["language"] >= 0.05 and top["language"] > abs(top["meaning"])
    held &= max(abs(random["language"]), abs(random["meaning"])) < 0.05
    assert result.verdict == (Verdict.of(held))
    assert every["language"] > 0.5 and top["share"] == 0.05
