"""What the claims about localization and editing share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.facts import EDITS, QUICK, assert_same, specimen_of, state
from transect.claims import fact_editing
from transect.claims.catalog.localization import correlation, explained
from transect.claims.context import Context
from transect.claims.fact_editing import Bench
from transect.editing import edit_specimen
from transect.errors import NotApplicable


def test_layer_and_tracing_never_explain_less_than_the_layer():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores, effects = (torch.rand(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        by_layer, by_effect, by_both, statistic, chance = explained(scores, effects)
        assert by_both >= max(by_layer, by_effect) - 1e-12 and statistic >= 0 and 0 <= chance <= 1
        assert by_effect == pytest.approx(correlation(scores.flatten(), effects.flatten()) ** 2)


def test_planted_effects_are_explained():
    generator = torch.Generator().manual_seed(1)
    effects, noise = (torch.rand(30, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    layer = torch.tensor([0.1, 0.9, 0.5, 0.3]).double().expand(30, 4)
    by_layer, by_effect, by_both, _, chance = explained(layer + 0.01 * noise, effects)
    assert by_layer > 0.99 and by_effect < 0.1 and by_both - by_layer < 0.01 and chance > 1e-3
    by_layer, by_effect, by_both, _, chance = explained(effects + 0.01 * noise, effects)
    assert by_layer < 0.1 and by_effect > 0.99 and by_both > 0.99 and chance < 1e-9
    assert explained(torch.ones(5, 4).double(), effects[:5])[:3] == (1, 1, 1)


@pytest.mark.parametrize("edit", EDITS)
def test_a_bench_edits_a_copy_and_puts_it_back(edit: str):
    specimen = specimen_of()
    context = Context(specimen.model, specimen.data, specimen.data, specimen=specimen)
    bench, before = Bench.of(context, 2, least=2), state(specimen.model)
    copied = state(bench.specimen.model)
    outcome = bench.edited(edit, bench.facts, bench.facts, **QUICK[edit])
    alone = edit_specimen(replace(context.fresh(), known_facts=bench.facts), edit, QUICK[edit])
    assert outcome.after == pytest.approx({name: alone.card[name][1] for name in outcome.after}, rel=1e-3)
    assert outcome.before != outcome.after and 0 <= outcome.others <= 1
    assert bench.scored(edit, bench.facts, **QUICK[edit]) == pytest.approx(outcome.scores)
    assert_same(bench.specimen.model, copied)
    assert_same(specimen.model, before)
    with pytest.raises(NotApplicable, match="5 are needed"):
        Bench.of(context, 20)


def test_a_fact_that_the_model_begins_a_longer_word_with_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    specimen = specimen_of()
    said = replace(specimen.facts[0], new_answer=specimen.facts[0].answer)
    bench = Bench(specimen, [said])
    monkeypatch.setattr(fact_editing, "says", lambda specimen, questions: [False] * len(questions))
    assert specimen.data is not None
    none, one = bench.one_after_another("memit", bench.facts, [], specimen.data)
    assert (none["edits"], one["edits"], one["all written"]) == (0, 1, 0) and none["loss"] == one["loss"]
