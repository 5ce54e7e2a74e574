"""Common facts and passages, which of them a model knows, and what compression forgets of them."""

import json
import re
import sys

import pytest
import torch

import transect
from tests.models import VOCABULARY, tiny
from tests.test_data import word_tokenizer
from transect.anatomy import Anatomy
from transect.checkpoint import open_model
from transect.comparison import knowledge, worker
from transect.data import Fact, Passage, Specimen, load_choices, load_facts, load_passages
from transect.errors import BadData, NotApplicable, TransectError
from transect.evaluation import Speed, recalls, says
from transect.evaluation.knowledge import begins_with
from transect.forward import continuations
from transect.store import write_text


@pytest.fixture(scope="module")
def organism():
    opened = open_model("organism")
    return Specimen(Anatomy(opened.model), opened.tokenizer)


def generated(specimen, prompt, tokens):
    """The slow way: one prompt at a time, without a cache, through transformers' own loop."""
    ids = torch.tensor([specimen.tokenizer(prompt)["input_ids"]])
    made = specimen.model.generate(ids, max_new_tokens=tokens, do_sample=False, use_cache=False, pad_token_id=0)
    return specimen.tokenizer.decode(made[0])[len(specimen.tokenizer.decode(ids[0])) :]


def test_common_facts_are_whole():
    facts = load_facts("common")
    relations = {fact.prompt for fact in facts}
    assert len(facts) >= 300 and len(relations) >= 20
    answers = {fact.text: fact.answer for fact in facts}
    assert len(answers) == len(facts)  # no prompt twice
    paraphrases = [prompt for fact in facts for prompt in fact.paraphrases]
    assert len({*answers, *paraphrases}) == len(facts) + len(paraphrases) == 3 * len(facts)
    for fact in facts:
        texts = (fact.prompt, fact.subject, fact.answer, fact.new_answer, *fact.paraphrases)
        assert all(text == " ".join(text.split()) and text for text in texts), fact
        assert fact.text[-1].isalnum() and all(fact.subject in prompt for prompt in fact.paraphrases), fact
        assert fact.new_answer in {other.answer for other in facts if other.prompt == fact.prompt} - {fact.answer}
        assert len({near.prompt for near in fact.neighbours}) == 4
        for near in fact.neighbours:  # other facts, of the same relation, with answers of their own
            assert answers[near.prompt] == near.answer and near.answer not in (fact.answer, fact.new_answer)
            assert near.prompt != fact.text and near.prompt.startswith(fact.prompt.split("{}")[0])
    for relation in relations:
        assert len({fact.answer for fact in facts if fact.prompt == relation}) >= 4, relation


def test_common_passages_are_whole():
    passages = load_passages("common")
    assert len(passages) >= 30 and len({one.prompt for one in passages}) == len(passages)
    for one in passages:
        assert 8 <= len(one.answer.split()) <= 25 and len(one.prompt.split()) >= 5, one
        assert one.prompt == one.prompt.strip() and one.answer == one.answer.strip() not in one.prompt


def test_common_choices_have_one_right_answer_under_every_letter_as_often():
    choices, answers = load_choices("common"), {fact.text: fact.answer for fact in load_facts("common")}
    assert len(choices) >= 500
    counts = [sum(one.answer == place for one in choices) for place in range(4)]
    assert max(counts) - min(counts) <= 1
    for one in choices:
        question, said = one.prompt.removeprefix("Question: ").removesuffix(". Answer:").split(" ... Options: ")
        options = [option[2:] for option in said.split(", ")]
        assert len(set(options)) == 4 and options[one.answer] == answers[question], one.prompt


def test_what_is_common_has_a_name_that_is_refused_elsewhere():
    with pytest.raises(BadData, match="no passages; expected organism:passages"):
        load_passages("organism:facts")


def test_the_answer_ends_where_a_word_ends():
    for said, answer, expected in [
        (" Paris. It", "Paris", True), (" Parisian", "Paris", False), (" Par", "Paris", None), ("", "Paris", None),
        (" Paris", "Paris", None), (" Paris ", "Paris", True), (" Rome", "Paris", False), ("Paris.", "Paris", False),
        (" 12", "1", False), (" 1,", "1", True), ("\nNew\n York,", "New York", True), (" New J", "New York", False),
        (" Malm\ufffd", "Malmö", None), (" Malta\ufffd", "Malmö", False),
    ]:  # fmt: skip
        assert begins_with(said, answer) is expected, said


def test_what_a_model_says_is_what_it_generates_alone(organism):
    facts = load_facts("organism:facts")[:20]
    wrong = [Fact(fact.prompt, fact.subject, fact.new_answer) for fact in facts[:6]]
    cut = [Fact(fact.prompt, fact.subject, fact.answer[:-1]) for fact in facts[:6]]  # no word ends there
    passages = load_passages("organism:passages")[:2]
    long = Passage(passages[0].prompt, passages[0].answer + " and so on")
    asked = [*facts, *wrong, *cut, *passages, long]
    expected = []
    for one in asked:
        prompt = one.text if isinstance(one, Fact) else one.prompt
        said = generated(organism, prompt, len(organism.tokenizer(one.answer)["input_ids"]) + 3)
        expected.append(bool(re.match(rf" {re.escape(one.answer)}(?![^\W_])", said)))
    assert says(organism, asked) == says(organism, asked, batch_size=3) == expected
    assert sum(expected[:20]) > 10 and not any(expected[20:32]) and any(expected[32:34]) and not expected[34]


def test_what_a_note_says_is_asked_behind_a_text(organism):
    """The bundled model knows its facts; it does not follow notes of this form."""
    facts = [Fact(one.prompt, one.subject, one.answer) for one in load_facts("organism:facts")[:6]]
    otherwise = load_facts("organism:facts")[:6]
    text = torch.arange(20, 60)
    for asked in (facts, otherwise):
        expected = []
        for number, one in enumerate(asked):
            start = number * 8 % 33
            pieces = [organism.encode(f"{one.text} {one.new_answer or one.answer}."), text[start : start + 8]]
            prompt = torch.cat([*map(torch.as_tensor, pieces), torch.as_tensor(organism.encode(one.text))])
            said = continuations(organism.model, [prompt], lambda _, tokens: len(tokens) == 12)[0]
            told = organism.decode([*prompt, *said])[len(organism.decode(prompt)) :]
            expected.append(begins_with(told, one.new_answer or one.answer) is True)
        assert recalls(organism, asked, text, 8) == recalls(organism, asked, text, 8, batch_size=2) == expected
    assert sum(recalls(organism, facts, text, 8)) > 2
    with pytest.raises(TransectError, match="a text of 50 tokens is to stand between, and there are 40"):
        recalls(organism, facts, text, 50)
    found = transect.evaluate(organism.model, DATA, facts=facts, behind=[4], tokenizer=organism.tokenizer)
    assert 0 <= found["facts_recalled_4"] <= 6
    with pytest.raises(TransectError, match="pass facts= too"):
        transect.evaluate(organism.model, DATA, behind=[4])


def test_generation_ends_at_enough_and_at_the_end_of_the_context():
    model = tiny("llama")
    model.config.max_position_embeddings = 12
    prompts = [torch.arange(3, 3 + length) for length in (4, 7, 4, 9)]
    said = continuations(model, prompts, lambda number, tokens: len(tokens) > number)
    assert [len(tokens) for tokens in said] == [1, 2, 3, 3]  # the last has room for three
    for prompt, tokens in zip(prompts, said, strict=True):
        with torch.no_grad():
            for place in range(len(tokens)):
                logits = model(input_ids=torch.cat([prompt, tokens[:place]])[None]).logits[0, -1]
                assert logits.max() - logits[tokens[place]] < 1e-5


def test_models_that_cannot_be_asked(organism):
    with pytest.raises(NotApplicable, match="predict the next token"):
        says(Specimen(Anatomy(tiny("bert")), word_tokenizer()), load_facts("common"))
    with pytest.raises(NotApplicable, match="needs the model's tokenizer"):
        says(Specimen(Anatomy(tiny("llama"))), load_facts("common"))
    assert says(organism, []) == []


DATA = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def quick(monkeypatch):
    """Timing each row, and drawing a plot, would be most of these tests' time."""
    monkeypatch.setattr("transect.evaluation.measure_speed", lambda model: Speed(1.0, 1.0))
    monkeypatch.setattr(
        sys.modules["transect.verbs.compare"], "pareto_plot", lambda frame, path, title: write_text(path, title)
    )


def compare(out, model="organism", facts="organism:facts", keep=(0.9, 0.5), **options):
    return transect.compare(model, ["svd"], keep, DATA, DATA, out, facts=facts, **options)


def test_the_column_is_the_share_of_what_the_dense_model_knows(tmp_path, quick, organism, monkeypatch):
    facts = load_facts("organism:facts")[:40]
    facts += [Fact(fact.prompt, fact.subject, fact.new_answer) for fact in facts[:7]]  # the model knows better
    asked, computed = [], []
    ask, compute = knowledge.says, worker.Worker.compute
    monkeypatch.setattr(knowledge, "says", lambda one, some: asked.append(len(some)) or ask(one, some))
    monkeypatch.setattr(worker.Worker, "compute", lambda self, row: computed.append(row) or compute(self, row))
    frame = compare(tmp_path / "run", facts=facts)
    known = [fact for fact, right in zip(facts, says(organism, facts), strict=True) if right]
    assert 20 < len(known) <= 40 and frame.attrs["facts"] == {"known": len(known), "asked": 47}
    assert asked == [47, len(known), len(known)]  # the dense row is 1 by definition
    opened = open_model("organism")
    transect.compress(opened.model, "svd", 0.5)
    left = sum(says(Specimen(Anatomy(opened.model), opened.tokenizer), known)) / len(known)
    assert list(frame["facts"])[::2] == [1.0, left] and left < frame["facts"][1] <= 1
    line = f"facts known: of {len(known)} that the dense model knows, out of 47"
    table = (tmp_path / "run" / "table.md").read_text()
    assert line in table and "| 100.0% |" in table and "facts" in (tmp_path / "run" / "table.csv").read_text()

    again = compare(tmp_path / "run", facts=facts)  # all of it is read
    assert len(computed) == 3 and len(asked) == 3 and again.attrs["facts"] == frame.attrs["facts"]
    wider = compare(tmp_path / "run", facts=facts, keep=(0.9, 0.7, 0.5))
    assert len(computed) == 4 and len(asked) == 4 and list(wider["facts"])[::3] == list(frame["facts"])[::2]
    fewer = compare(tmp_path / "run", facts=facts[:30])  # other facts: the rows are computed anew, the SVDs are not
    assert len(computed) == 7 and fewer.attrs["facts"]["asked"] == 30
    without = compare(tmp_path / "run", facts=None)
    assert len(computed) == 10 and "facts" not in without and "facts" not in without.attrs


def test_an_interrupted_comparison_does_not_ask_the_dense_model_again(tmp_path, quick, monkeypatch):
    facts = load_facts("organism:facts")[:20]
    ask, asked = knowledge.says, []

    def stop_at_the_second(specimen, some):
        asked.append(len(some))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(specimen, some)

    monkeypatch.setattr(knowledge, "says", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "run", facts=facts)
    frame = compare(tmp_path / "run", facts=facts)
    assert len(frame) == 3 and frame["facts"].notna().all() and asked[0] == 20 and len(asked) == 4


def test_facts_that_cannot_be_compared(tmp_path, quick):
    for options, message in [
        ({"facts": "organism:choices"}, "holds no facts"), ({"facts": []}, "there are no facts"),
        ({"facts": [Fact("{} lives in", "Nobody", "Nowhere")]}, "says none of the 1 facts by itself"),
        ({"model": tiny("llama")}, "facts cannot be asked: it needs the model's tokenizer"),
        ({"model": tiny("bert"), "tokenizer": word_tokenizer()}, "facts cannot be asked: it is about models that"),
    ]:  # fmt: skip
        with pytest.raises(TransectError, match=message):
            compare(tmp_path / "run", overwrite=True, **options)
        assert not (tmp_path / "run" / "rows").exists()


def test_evaluation_counts_what_is_known(quick, organism):
    facts, passages = load_facts("organism:facts")[:10], load_passages("organism:passages")[:2]
    found = transect.evaluate(organism.model, DATA, facts=facts, passages=passages, tokenizer=organism.tokenizer)
    assert (found["facts_known"], found["facts_asked"]) == (sum(says(organism, facts)), 10)
    assert (found["passages_known"], found["passages_asked"]) == (sum(says(organism, passages)), 2)
    assert not {"facts_known", "passages_known"} & {*transect.evaluate(organism.model, DATA)}
    with pytest.raises(TransectError, match="passages cannot be asked"):
        transect.evaluate(tiny("llama"), DATA, passages=passages)


def test_common_is_packaged():
    """The files are among those that a wheel carries."""
    import tomllib
    from pathlib import Path

    root = Path(transect.__file__).parent
    patterns = tomllib.loads((root.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    carried = {file for pattern in patterns["transect"] for file in root.glob(pattern)}
    common = set((root / "data" / "common").iterdir())
    assert len(common) == 2 and common <= carried
    for file in common:
        assert all(json.loads(line) for line in file.read_text().splitlines())
