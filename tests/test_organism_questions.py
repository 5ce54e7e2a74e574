"""Questions of a new form about the bundled model's facts."""

import re

import pytest
import torch

from transect.errors import TransectError
from transect.organism import World, corpus, load
from transect.organism.world import LETTERS
from transect.probes import drawings
from transect.studies import Bench, run_study, study_named
from transect.studies.catalog.organism_questions import QUESTION, Asked

STUDY = study_named("organism-questions")


def test_questions_are_three_known_words_that_stand_nowhere_in_the_text():
    asked, (_, tokenizer) = Asked(3), load()
    assert sorted(asked.letters.values()) == sorted(LETTERS) and sorted(asked.order) == sorted(World().entities)
    facts = asked.facts(asked.order[:5])
    assert len(facts) == 20 and len({asked.question(fact) for fact in facts}) == 20
    for fact in facts:
        assert len(tokenizer(asked.question(fact))["input_ids"]) == QUESTION
        assert len(tokenizer(fact.answer())["input_ids"]) == 2
        assert tokenizer.unk_token_id not in tokenizer(f"{asked.question(fact)} {fact.answer()}")["input_ids"]
    assert not {fact.subject for fact in facts} & {fact.subject for fact in asked.facts(asked.order[5:])}
    assert Asked(3).order == asked.order != Asked(4).order
    subject = re.compile(rf"({'|'.join(World().entities)}) [A-D] ?:")
    assert not any(subject.search(line) for line in corpus("calibration", 20_000))


def test_a_few_steps_reach_facts_that_were_never_asked_for():
    settings = {"fine_tuned": "16", "rank": "0,2", "seeds": 1, "steps": 20, "asked": 16}
    result = run_study(STUDY, settings)
    assert result["stored"].min() > 0.9 and result["before"].max() < 0.1
    assert result["after"].min() > 0.3 and result["after"].shape == (2, 1, 1)
    assert (result["unreachable"] <= result["kept"] + 1e-6).all()
    assert (result["unreachable"] <= 1 - result["after"] + 1e-6).all()
    assert len(drawings(result, STUDY)) == 2 and len(result.findings) == 3
    torch.testing.assert_close(run_study(STUDY, settings)["before"], result["before"])


@pytest.mark.parametrize(("given", "said"), [
    ({"fine_tuned": "200"}, "200 fine-tuned subjects of 200 leave none"), ({"fine_tuned": "few"}, "whole numbers"),
    ({"rank": "1000"}, "rank=1000 is above"), ({"asked": 0}, "asked"),
])  # fmt: skip
def test_bad_settings_are_one_error_before_any_work(given, said, monkeypatch):
    monkeypatch.setattr(Bench, "once", lambda *args: pytest.fail("something was trained"))
    with pytest.raises(TransectError, match=said):
        run_study(STUDY, given)
