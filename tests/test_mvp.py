"""Model-tuning via prompts: scores at a blank, what the text may lose, training, and the attacks that judge it."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

import transect
from transect import PromptClassifier
from transect.checkpoint import save
from transect.cli import main_group
from transect.errors import BadData, TransectError
from transect.evaluation.attacks import Neighbours, added, perturbation, substitution_attack
from transect.goals import Reading
from transect.training import Machine

from .models import VOCABULARY, tiny

NAMES = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "it", "was", ".", "good", "great", "bad", "awful"]
NAMES += [f"w{number}" for number in range(VOCABULARY - len(NAMES))]
TWO = ["{text} it was {blank} .", "{blank} : {text}"]
WORDS = {"no": ["bad", "awful"], "yes": ["good", "great"]}
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10"]
ROWS = [{"text": f"w{1 + i % 5} w{6 + 5 * (i % 2)} w{2 + i % 3}", "label": ("no", "yes")[i % 2]} for i in range(40)]


def masked_tokenizer():
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        unk_token="[UNK]",
    )  # fmt: skip


def byte_tokenizer():
    """As GPT-2 writes: a space belongs to the word behind it. " good" and " bad" are one token, all else letters."""
    merges = [("Ġ", "g"), ("Ġg", "o"), ("Ġgo", "o"), ("Ġgoo", "d"), ("Ġ", "b"), ("Ġb", "a"), ("Ġba", "d")]
    pieces = ["<|end|>", *"abdegilmnorstwxyz.", "Ġ", *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>")


def classifier_of(model=None, templates=TWO, words=WORDS, **more):
    return PromptClassifier(model or tiny("bert"), masked_tokenizer(), templates, words, **more)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama"])
def test_with_one_template_and_one_word_the_score_is_the_models_own_logit(name):
    model, masked = tiny(name).eval(), name in ("bert", "roberta")
    tokenizer = masked_tokenizer() if masked else byte_tokenizer()
    texts = TEXTS if masked else ["a great toy.", "no", "it is in sand"]
    template = "{text} it was {blank} ." if masked else "{text} it was {blank}"
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = PromptClassifier(model, tokenizer, template, {"no": ["bad"], "yes": ["good"]}).scores(texts)
    for row, text in zip(found, texts, strict=True):  # each alone, without padding
        filled = f"{text} it was [MASK] ." if masked else f"{text} it was"
        ids = torch.tensor(tokenizer(filled)["input_ids"])
        place = int((ids == 3).nonzero()[0, 0]) if masked else -1
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, place]
        words = tokenizer(" bad good", add_special_tokens=False)["input_ids"]
        assert len(words) == 2
        torch.testing.assert_close(row, logits[words], rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_pools_and_orders():
    plain = classifier_of().scores(TEXTS)
    alone = torch.stack([
        torch.stack([classifier_of(templates=[one], words={"a": [x], "b": [y]}).scores(TEXTS) for one in TWO])
        for x, y in zip(*WORDS.values(), strict=True)
    ])  # word, template, text, class  # fmt: skip
    torch.testing.assert_close(plain, alone.max(0).values.mean(0))
    other = classifier_of(pool_words="mean", pool_templates="max").scores(TEXTS)
    torch.testing.assert_close(other, alone.mean(0).max(0).values)
    turned = classifier_of(templates=TWO[::-1], words={name: words[::-1] for name, words in WORDS.items()})
    torch.testing.assert_close(turned.scores(TEXTS), plain)
    written = classifier_of(templates=" | ".join(TWO), words="no: bad, awful; yes: good, great")
    assert torch.equal(written.scores(TEXTS), plain) and written.classes == ("no", "yes")


def test_the_largest_word_alone_gets_a_gradient():
    model = tiny("bert")
    model.cls.predictions.decoder.weight = torch.nn.Parameter(model.cls.predictions.decoder.weight.detach().clone())
    words = [NAMES.index(word) for word in ("good", "great", "bad", "awful")]
    for pool in ("max", "mean"):
        goal = classifier_of(model, templates=TWO[:1], pool_words=pool).goal
        model.zero_grad()
        goal.prompt.scores(model, goal.prompt.encode(TEXTS[:1])).sum().backward()
        rows = model.cls.predictions.decoder.weight.grad.norm(dim=1).nonzero()[:, 0].tolist()
        if pool == "mean":
            assert rows == words
        else:
            assert len(rows) == 2 and rows[0] in words[:2] and rows[1] in words[2:]


def test_the_loss_sees_the_classes_alone():
    model = tiny("bert").eval()
    goal = classifier_of(model).goal
    batch = goal.read(ROWS[:6], Reading(batch_size=6)).batches[0]
    bias = model.cls.predictions.decoder.bias
    with torch.no_grad():
        before = goal.losses(model, batch)[0]
        bias[12:] += torch.randn(VOCABULARY - 12) * 5  # of tokens that are no label word
        bias[8:12] += 3.0  # of all that are
        torch.testing.assert_close(goal.losses(model, batch)[0], before, rtol=1e-5, atol=1e-5)
        bias[8:10] += 1.0
        assert not torch.allclose(goal.losses(model, batch)[0], before, atol=1e-2)


def test_a_long_text_loses_its_end_and_the_template_nothing():
    prompt, tokenizer = classifier_of().goal.prompt, masked_tokenizer()
    long = " ".join(f"w{i}" for i in range(30))
    batch = prompt.encode([long, "w1 [MASK] w2", "w3"], length=12)
    assert batch["input_ids"].shape == (3, 2, 12)
    shown = [[tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*rows, strict=True)]
             for rows in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    assert shown[0] == [
        "[CLS] w0 w1 w2 w3 w4 w5 it was [MASK] . [SEP]",
        "[CLS] [MASK] [UNK] w0 w1 w2 w3 w4 w5 w6 w7 [SEP]",
    ]
    assert batch["blank"].tolist() == [[9, 1], [6, 1], [4, 1]]  # not the text's own mask
    causal = PromptClassifier(tiny("gpt2"), byte_tokenizer(), "{text} so {blank}", {"no": ["bad"], "yes": ["good"]})
    row = causal.goal.prompt.encode(["mad " * 20], length=9)
    assert byte_tokenizer().decode(row["input_ids"][0, 0]) == "mad ma so" and row["blank"].tolist() == [[8]]
    with pytest.raises(BadData, match="takes 6 tokens of the sequence_length of 6, so that none is left for the text"):
        prompt.encode([long], length=6)


def test_it_is_learned_by_the_command_and_from_python(tmp_path):
    model, tokenizer = tiny("bert"), masked_tokenizer()
    save(model, tmp_path / "model", tokenizer)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    line = ["adapt", tmp_path / "model", "--method", "full", "--objective", "mvp", "--mvp.templates", " | ".join(TWO)]
    line += ["--mvp.words", "no: bad, awful; yes: good, great", "--data", tmp_path / "rows.jsonl", "--lr", "1e-2"]
    line += ["--eval", tmp_path / "rows.jsonl", "--out", tmp_path / "out", "--epochs", "10", "--device", "cpu"]
    done = CliRunner().invoke(main_group, list(map(str, line)), catch_exceptions=False)
    assert done.exit_code == 0 and ", accuracy 0." in done.stdout and "-> 1.0000" in done.stdout
    from transformers import AutoModelForMaskedLM

    trained = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    classifier = classifier_of(trained)
    assert classifier.predict([row["text"] for row in ROWS]) == [row["label"] for row in ROWS]
    assert classifier.evaluate(ROWS).accuracy == 1.0 > classifier_of(model).evaluate(ROWS).accuracy
    assert sum(p.numel() for p in trained.parameters()) == sum(p.numel() for p in model.parameters())
    _attacked(classifier)
    # an adapter on it, one template a text, on moved embeddings; losses are those of all templates as they are
    settings = {"mvp": {"templates": "|".join(TWO), "words": "no: bad; yes: good", "train_on": "one", "epsilon": 0.1}}
    few = {"no": ["bad"], "yes": ["good"]}
    before = classifier_of(trained, words=few).evaluate(ROWS).loss
    adapted = transect.adapt(
        trained, "lora", ROWS, eval_data=ROWS, objective="mvp", settings=settings, tokenizer=tokenizer, steps=2,
        device="cpu",
    )  # fmt: skip
    found = adapted.outcome["texts"]["eval"]
    assert found["before"] == pytest.approx(before, rel=1e-5) and adapted.outcome["steps"] == 2
    assert found["after"] == pytest.approx(classifier_of(adapted.model, words=few).evaluate(ROWS).loss, rel=1e-5)


def _attacked(classifier):
    """What is to hold of the attacks on a trained model."""
    model, goal = classifier.model, classifier.goal
    batch = goal.read(ROWS, Reading(batch_size=len(ROWS))).batches[0]
    batch["attention_mask"][:, :, -1] = 0  # a place of padding
    real = goal.given(batch)["attention_mask"]

    def loss():
        return goal.losses(model, batch)[0].sum()

    with torch.no_grad():
        clean = loss()
    for steps, epsilon in itertools.product((1, 4), (0.0, 0.5)):
        torch.manual_seed(0)
        delta = perturbation(model, loss, real, epsilon=epsilon, steps=steps)
        assert float(delta.flatten(1).norm(dim=1).max()) <= epsilon * (1 + 1e-5) and not delta[real == 0].any()
        with added(model.get_input_embeddings(), delta), torch.no_grad():
            moved = loss()
        assert moved > clean if epsilon else moved == clean
    torch.testing.assert_close(goal.measure(model, [batch], Machine("cpu")), float(clean) / len(ROWS))  # all put back
    torch.manual_seed(0)
    one, moving = replace(goal, train_on="one"), replace(goal, epsilon=0.5)
    with torch.no_grad():
        each = [goal.prompt.scores(model, batch, torch.full((len(ROWS),), which)) for which in range(2)]
    nats = torch.stack([functional.cross_entropy(scores, batch["labels"], reduction="none") for scores in each], 1)
    drawn = [one.loss(model, batch)[0].item() for _ in range(20)]
    assert len(set(drawn)) > 1 and all(nats.min(1).values.sum() <= loss <= nats.max(1).values.sum() for loss in drawn)
    assert all(moving.loss(model, batch)[0] > clean and moving.loss(model, batch)[1] == len(ROWS) for _ in range(2))
    robust = classifier.move_embeddings(ROWS, epsilon=3.0)
    assert robust.robust < robust.clean == 1.0
    exchanged = classifier.exchange_words(ROWS, {f"w{i}": ["w6", "w11"] for i in range(20)}, most=0.4)
    assert exchanged.robust < exchanged.clean == 1.0
    assert all(one.changed <= 1 and one.words == 3 for one in exchanged.examples)
    assert classifier.exchange_words(ROWS, {}, most=1.0).robust == 1.0


VALUES = {"fine": 2.0, "nice": 1.5, "so": 0.3, "poor": -1.0, "meh": -0.5, "well": 0.9}


def sums(texts):
    """A classifier by the sum of known words."""
    total = torch.tensor([sum(VALUES.get(word.strip(".,"), 0.0) for word in text.split()) for text in texts])
    return torch.stack([-total, total], 1)


def test_words_are_exchanged_in_the_order_of_their_weight():
    text = "So, a nice and fine day, so to say."
    table = {"fine": ["meh", "well"], "nice": ["poor"], "day": ["night"]}
    labels = [1, 0]
    result = substitution_attack(sums, [text, text], labels, table, most=0.25)  # 2 of 9 words
    attacked, wrong = result.examples
    assert attacked.text == "So, a poor and meh day, so to say." and not attacked.after and attacked.changed == 2
    assert attacked.queries == 1 + 3 + 2 + 1  # itself, without each word that has a substitute, and the substitutes
    assert not wrong.before and wrong.queries == 1 and (result.clean, result.robust) == (0.5, 0.0)
    one = substitution_attack(sums, [text], [1], table, most=0.2).examples[0]  # 1 of 9
    assert one.after and one.text == "So, a nice and meh day, so to say." and one.changed == 1
    for table, most in (({}, 1.0), ({"fine": ["meh"]}, 0.0), ({"fine": ["fine"]}, 1.0)):
        kept = substitution_attack(sums, [text], [1], table, most=most)
        assert kept.robust == kept.clean == 1.0 and kept.examples[0].text == text
    with pytest.raises(BadData, match="no example to attack"):
        substitution_attack(sums, [], [], {})
    with pytest.raises(BadData, match="1 texts and 2 labels"):
        substitution_attack(sums, [text], labels, {})


def test_neighbours_are_words_that_lie_near():
    model, tokenizer = tiny("gpt2"), byte_tokenizer()
    rows = model.get_input_embeddings().weight
    good, bad, part = (tokenizer.convert_tokens_to_ids(piece) for piece in ("Ġgood", "Ġbad", "Ġgoo"))
    with torch.no_grad():
        rows[bad] = rows[good] + 0.1 * rows[good].norm() / rows.shape[1] ** 0.5
        rows[part] = -rows[good]
    near = Neighbours(model, tokenizer)
    assert near("good") == ["bad"] and near("bad") == ["good"]  # not letters, which begin no word
    assert near("unheard") == [] and Neighbours(model, tokenizer, least=0.9999)("good") == []
    assert "good" not in Neighbours(model, tokenizer, least=-1.0)("good")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": "{text} it was"}, "needs {blank} exactly once, not 0 times"),
        ({"templates": "{blank} {text} {blank}"}, "needs {blank} exactly once, not 2 times"),
        ({"templates": "it was {blank}"}, "needs {text} exactly once"),
        ({"words": "no: bad"}, "two classes or more are needed, got 1"),
        ({"words": ""}, "two classes or more are needed, got 0"),
        ({"words": "no: bad; yes:"}, "the class 'yes' needs a list of label words"),
        ({"words": "no: bad; no: awful"}, "every class once"),
        ({"words": "bad, good"}, "are written `class: word"),
        ({"words": "no: bad; yes: good, bad"}, "'bad' and 'bad' are the same token"),
        ({"words": "no: bad; yes: very good"}, "'very good' is 2 tokens"),
        ({"words": "no: bad; yes: unheard"}, "does not know the label word 'unheard'"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_said_before_any_work(change, message):
    settings = {"mvp": {"templates": TWO[0], "words": "no: bad; yes: good", **change}}
    with pytest.raises(TransectError) as refused:
        transect.adapt(
            tiny("bert"), "full", ROWS, objective="mvp", settings=settings, tokenizer=masked_tokenizer(), device="cpu"
        )
    assert message in str(refused.value)


def test_words_that_the_tokenizer_splits_and_data_that_is_none():
    model, tokenizer = tiny("gpt2"), byte_tokenizer()
    made = PromptClassifier(model, tokenizer, "{text} so {blank}", {"no": ["bad"], "yes": ["good"]})
    for template, words, message in (
        ("{text} so {blank}", "no: bad; yes: great", "the label word 'great' is 5 tokens (Ġg, r, e, a, t)"),
        ("{text} so{blank}", "no: bad; yes: good", "the label word 'bad' is 3 tokens (b, a, d)"),  # no space before it
        ("{text} so {blank} .", "no: bad; yes: good", "put {blank} last"),
    ):
        with pytest.raises(TransectError) as refused:
            PromptClassifier(model, tokenizer, template, words)
        assert message in str(refused.value)
    with pytest.raises(TransectError, match="has no mask token"):
        PromptClassifier(tiny("bert"), tokenizer, "{text} so {blank}", "no: bad; yes: good")
    with pytest.raises(TransectError, match="neither: load it with its language-model head"):
        PromptClassifier(tiny("vit"), tokenizer, "{text} so {blank}", "no: bad; yes: good")
    for rows, message in (
        ([], "the data is empty"),
        ([{"text": "a"}], "need a column `label`"),
        ([{"text": "a", "label": "maybe"}], "label 'maybe' is none of the classes no, yes"),
        ([{"text": "a", "label": 2}], "label 2 is none of the classes"),
    ):
        with pytest.raises(BadData, match=message):
            made.evaluate(rows)
    assert made.evaluate([{"text": "a", "label": 1}]).loss == made.evaluate([{"text": "a", "label": "yes"}]).loss
