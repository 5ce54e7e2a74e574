"""One layer and facts: the data as it should be, models that do not feel one another, measures against brute force."""

import copy
import math

import pytest
import torch
from torch.nn import functional

from transect.errors import TransectError
from transect.probes import drawings
from transect.studies import Bench, run_study, study_named
from transect.studies.catalog.one_layer_knowledge import learning
from transect.studies.catalog.one_layer_knowledge.asking import Asking
from transect.studies.catalog.one_layer_knowledge.facts import Facts, Rows, side_by_side, told
from transect.studies.catalog.one_layer_knowledge.layer import OneLayer, attach, joined, merge
from transect.studies.catalog.one_layer_knowledge.learning import Steps, fit
from transect.studies.catalog.one_layer_knowledge.measures import (
    KINDS,
    answered,
    error_bound,
    first_step,
    inside,
    kinds_of,
    mean_loss,
)

STUDY = study_named("one-layer-knowledge")
TINY = {
    "subjects": 6, "templates": 4, "multiplicity": "1,3", "fine_tuned": "1,4", "seeds": 2, "width": 8, "neurons": 12,
    "steps": 3, "full_steps": 2, "low_rank_steps": 12,
}  # fmt: skip


def pairs(rows):
    return [tuple(pair) for pair in rows.tokens.flatten(0, -2).tolist()]


def test_every_fact_is_told_in_so_many_templates_and_held_out_facts_only_there():
    facts = Facts(10, 3, 8, seed=4)
    seen = {}
    for count in (1, 2, 5, 8):
        rows = facts.statements(count)
        assert rows.tokens.shape == (10, 3, count, 2) and len(set(pairs(rows))) == 10 * 3 * count
        for (subject, template), answer in zip(pairs(rows), rows.answers.flatten().tolist(), strict=True):
            attribute = (template - 10) // 8
            assert 0 <= attribute < 3 and answer == facts.first_answer + 3 * subject + attribute
        assert seen.keys() <= set(pairs(rows))  # what is told at a smaller multiplicity, and more
        seen = dict.fromkeys(pairs(rows))
    learned, asked = facts.split(4)
    assert sorted([*learned.tolist(), *asked.tolist()]) == list(range(10))
    assert facts.split(7)[0][:4].tolist() == learned.tolist()
    questions = facts.questions(asked)
    assert set(questions.answers.flatten().tolist()) <= set(facts.statements(1).answers.flatten().tolist())
    assert not set(pairs(questions)) & set(pairs(facts.questions(learned)))
    asked_by = questions.tokens[..., 1]
    assert torch.equal(asked_by - facts.first_question, torch.arange(3).expand(6, 3))
    assert facts.vocabulary == 10 + 24 + 3 + 30 == len(facts.words()) == len(set(facts.words()))


def test_the_seed_decides_the_facts():
    one, same, other = Facts(10, 2, 8, 1), Facts(10, 2, 8, 1), Facts(10, 2, 8, 2)
    assert torch.equal(one.wordings, same.wordings) and torch.equal(one.order, same.order)
    assert not torch.equal(one.wordings, other.wordings) and told(one, 2, 3) == told(same, 2, 3)
    said = told(one, 2, 3).splitlines()
    assert [sum(line.startswith(part) for line in said) for part in ("pre", "fine", "held")] == [40, 6, 14]


def test_coverage_counts_templates_of_fine_tuned_subjects():
    facts = Facts(9, 2, 6, 0)
    for count in (1, 2, 6):
        for tuned in (1, 3, 8):
            templates = {pair[1] for pair in pairs(facts.statements(count, facts.order[:tuned]))}
            assert facts.coverage(count, tuned) == pytest.approx(len(templates) / 12)
    assert facts.coverage(6, 1) == 1 and facts.coverage(2, 1) == pytest.approx(2 / 6)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("neurons", [0, 7])
def test_forward_is_the_formula(uniform, neurons):
    model = OneLayer(11, [5, 6], width=4, neurons=neurons, uniform=uniform).double()
    tokens = torch.tensor([[[0, 3], [2, 9]], [[1, 4], [10, 0]]])
    logits = model(tokens)
    off = model(tokens, uniform=True, mlp=False)
    for g in range(2):
        w = {name: parameter[g] for name, parameter in model.named_parameters()}
        for b in range(2):
            h = [w["embedding"][tokens[g, b, j]] + w["position"][j] for j in range(2)]
            alpha = torch.tensor([0.5, 0.5], dtype=torch.float64)
            plain = w["unembedding"] @ (h[1] + w["v"] @ (alpha[0] * h[0] + alpha[1] * h[1]))
            if not uniform:
                scores = torch.stack([(w["q"] @ h[1]) @ (w["k"] @ each) / math.sqrt(4) for each in h])
                alpha = scores.softmax(0)
            z = h[1] + w["v"] @ (alpha[0] * h[0] + alpha[1] * h[1])
            if neurons:
                z = z + w["down"] @ (w["up"] @ z + w["up_bias"]).relu() + w["down_bias"]
            torch.testing.assert_close(logits[g, b], w["unembedding"] @ z)
            torch.testing.assert_close(off[g, b], plain)


def rows_for(seeds, multiplicity, subjects=6):
    facts = [Facts(subjects, 2, 4, seed) for seed in seeds]
    return facts, side_by_side([one.statements(multiplicity) for one in facts])


def test_models_side_by_side_go_as_each_alone_and_pieces_change_nothing(monkeypatch):
    facts, rows = rows_for([3, 8], 2)
    together = OneLayer(facts[0].vocabulary, [3, 8], 8, 12).double()
    pieced = copy.deepcopy(together)
    fit(together, rows, Steps(5, 1e-2), "together")
    for g, seed in enumerate([3, 8]):
        alone = OneLayer(facts[0].vocabulary, [seed], 8, 12).double()
        fit(alone, Rows(rows.tokens[g : g + 1], rows.answers[g : g + 1]), Steps(5, 1e-2), "alone")
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(getattr(together, name)[g], parameter[0], rtol=1e-6, atol=1e-9)
    monkeypatch.setattr(learning, "_LOGITS", 2 * facts[0].vocabulary * 5)  # five rows at a time
    assert [len(one.answers[0]) for one in learning.pieces(pieced, rows)] == [5, 5, 5, 5, 4]
    fit(pieced, rows, Steps(5, 1e-2), "in pieces")
    for name, parameter in pieced.named_parameters():
        torch.testing.assert_close(getattr(together, name), parameter, rtol=1e-6, atol=1e-9)
    expected = [functional.cross_entropy(together(rows.tokens)[g], rows.answers[g]).float().detach() for g in range(2)]
    torch.testing.assert_close(mean_loss(pieced, rows), torch.stack(expected))


def test_a_question_token_only_decays_while_it_does_not_occur():
    facts, rows = rows_for([0], 2)
    model = OneLayer(facts[0].vocabulary, [0], 8, 12).double()
    before = model.questions(facts[0].first_question, 2).detach() - model.position[:, 1:].detach()
    loss = learning.summed_loss(model, rows)
    gradient = torch.autograd.grad(loss, model.embedding)[0]
    inside_ids = slice(facts[0].first_question, facts[0].first_question + 2)
    assert gradient[:, inside_ids].eq(0).all() and gradient[:, : facts[0].first_question].ne(0).any(-1).all()
    fit(model, rows, Steps(7, 1e-2, weight_decay=0.1), "pretraining")
    after = model.embedding[:, inside_ids].detach()
    torch.testing.assert_close(after, before * (1 - 1e-2 * 0.1) ** 7)


def test_low_rank_changes_four_matrices_by_that_rank_and_nothing_else():
    facts, rows = rows_for([0, 1], 2)
    model = OneLayer(facts[0].vocabulary, [0, 1], 8, 12).double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    logits = model(rows.tokens)
    trained = attach(model, 2, [0, 1])
    assert len(trained) == 8
    torch.testing.assert_close(model(rows.tokens), logits)  # the factors begin at nothing
    fit(model, rows, Steps(4, 1e-2), "low rank", trained)
    moved = model(rows.tokens)
    merge(model)
    torch.testing.assert_close(model(rows.tokens), moved)
    for name, weight in before.items():
        change = getattr(model, name).detach() - weight
        if name in ("q", "k", "v", "up"):
            assert torch.linalg.matrix_rank(change, rtol=1e-9).tolist() == [2, 2]
        else:
            assert change.eq(0).all()


def test_what_stands_in_place_of_the_right_answer():
    facts = Facts(3, 2, 1, 0)
    first = facts.first_answer
    answers = torch.tensor([[first, first + 1, first + 2, first + 5]])
    said = torch.tensor([[first, first, first + 5, 0]])  # right, the other attribute, another subject, no answer
    assert kinds_of(facts, said, answers)[:, 0].tolist() == [0.25] * 4 and len(KINDS) == 4
    assert kinds_of(facts, answers, answers)[:, 0].tolist() == [1, 0, 0, 0]


def test_the_first_step_is_the_losses_gradient():
    facts, _ = rows_for([0, 1], 1)
    model = OneLayer(facts[0].vocabulary, [0, 1], 8, 12).double()
    rows = side_by_side([one.questions(one.order[:3]) for one in facts])
    found = first_step(model, rows)
    assert model.watched == ["q", "k", "v", "up"]
    for g in range(2):
        loss = functional.cross_entropy(model(rows.tokens)[g], rows.answers[g])
        for m, name in enumerate(model.watched):
            gradient = torch.autograd.grad(loss, getattr(model, name), retain_graph=True)[0][g]
            values = torch.linalg.svdvals(gradient)
            share = (values[0] ** 2 / gradient.square().sum()).float()
            torch.testing.assert_close(found.share[m, g], share)
            along = (gradient @ found.inputs[m, g].double()).norm()
            torch.testing.assert_close(along, values[0], rtol=1e-5, atol=0)
    span = model.questions(facts[0].first_question, 2).detach()
    within = inside(found.inputs, span)
    torch.testing.assert_close(within[0], torch.ones(2))  # Q reads nothing but the question tokens
    assert within[3].lt(1).all()
    noise = torch.randn(1, 192, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(noise[0])
    assert float(values[0] ** 2 / values.square().sum()) < 0.1


def test_inside_is_the_cosine_for_one_vector_and_one_for_the_span():
    generator = torch.Generator().manual_seed(0)
    span = torch.randn(3, 2, 9, generator=generator, dtype=torch.float64)
    vector = functional.normalize(span[:, 0] - 2 * span[:, 1], dim=-1)
    torch.testing.assert_close(inside(vector, span), torch.ones(3))
    cosine = functional.cosine_similarity(vector, span[:, 0]).abs().float()
    torch.testing.assert_close(inside(vector, span[:, :1]), cosine)


def test_the_bound_falls_with_what_should_help_and_rises_with_templates():
    assert error_bound(8, 4, 8) == pytest.approx(math.exp(-8 * 16 * math.log(8) / 128))
    assert error_bound(8, 4, 8) < error_bound(8, 2, 8) < error_bound(8, 2, 16)
    assert error_bound(16, 2, 8) < error_bound(8, 2, 8) and error_bound(8, 1, 1) == 1


def test_own_templates_are_those_a_model_was_told():
    facts = [Facts(5, 2, 4, seed) for seed in (0, 1)]
    asking = Asking(facts, [1, 3])
    model = OneLayer(facts[0].vocabulary, asking.seeds, 8, 12)
    found = asking.own_templates(model, [None, None])
    for k, count in enumerate((1, 3)):
        for s, one in enumerate(facts):
            single = joined([{name: p[2 * k + s : 2 * k + s + 1] for name, p in model.state_dict().items()}])
            rows = side_by_side([one.statements(count)])
            right = (answered(single, rows) == rows.answers).float().view(10, count).mean(1)
            torch.testing.assert_close(found[k, s], right)


def test_pretraining_stores_what_is_a_function_of_subject_and_template():
    facts = [Facts(20, 2, 4, 0)]
    rows = side_by_side([facts[0].statements(2)])
    model = OneLayer(facts[0].vocabulary, [0])
    fit(model, rows, Steps(150, 3e-3), "pretraining")
    assert float(mean_loss(model, rows)) < 0.05 and torch.equal(answered(model, rows), rows.answers)


@pytest.mark.parametrize("layer", ["whole", "no-mlp", "uniform-attention"])
def test_the_study_at_its_limits(layer):
    result = run_study(STUDY, {**TINY, "layer": layer})
    matrices = {"whole": ["q", "k", "v", "up"], "no-mlp": ["q", "k", "v"], "uniform-attention": ["v", "up"]}[layer]
    assert result.labels["matrix"] == matrices and result.labels["rank"] == ["all parameters", "rank 1"]
    assert result["after"].shape == (4, 2, 2, 2, 2) and result["course"].shape == (2, 2, 11, 2, 2)
    torch.testing.assert_close(result["after"].sum(0), torch.ones(2, 2, 2, 2))
    for rank in range(2):
        torch.testing.assert_close(result["course"][rank, :, 0], result["before"][0])
    torch.testing.assert_close(result["course"][:, :, -1], result["after"][0])
    torch.testing.assert_close(result["parts"][0], result["after"][0])
    assert result["unreachable"].le(result["kept"] + 1e-6).all()
    assert result["unreachable"].le(1 - result["after"][0] + 1e-6).all()
    if layer == "uniform-attention":
        torch.testing.assert_close(result["parts"][2], result["parts"][0])
    if layer == "no-mlp":
        torch.testing.assert_close(result["parts"][1], result["parts"][0])
    assert result["gradient_share"].min() > 1 / 8 and result["gradient_share"].max() <= 1 + 1e-6
    assert len(drawings(result, STUDY)) == 12 and len(result.findings) >= 5


def test_one_way_of_fine_tuning_and_one_cell_are_enough():
    result = run_study(STUDY, {**TINY, "multiplicity": "2", "fine_tuned": "3", "rank": "1", "seeds": 1})
    assert "gradient_change" not in result.quantities and result["after"].shape == (4, 1, 1, 1, 1)
    assert drawings(result, STUDY)
    again = run_study(STUDY, {**TINY, "multiplicity": "2", "fine_tuned": "3", "rank": "1", "seeds": 1})
    other = run_study(STUDY, {**TINY, "multiplicity": "2", "fine_tuned": "3", "rank": "1", "seeds": 1}, seed=1)
    torch.testing.assert_close(result["pretraining_loss"], again["pretraining_loss"])
    assert not torch.equal(result["pretraining_loss"], other["pretraining_loss"])


def test_with_one_attribute_it_says_that_it_shows_nothing():
    alone, several = (run_study(STUDY, {**TINY, "attributes": count}).caveats for count in (1, 2))
    assert "show nothing" in alone[0] and not any("show nothing" in one for one in several)


@pytest.mark.parametrize(("given", "said"), [
    ({"multiplicity": "1,9"}, "multiplicity 9: a fact is told in 1 to 4 different templates"),
    ({"multiplicity": "0"}, "multiplicity is whole numbers of 1 or more"),
    ({"fine_tuned": "2,6"}, "6 fine-tuned subjects of 6"),
    ({"fine_tuned": "0"}, "fine_tuned is whole numbers of 1 or more"), ({"attributes": 0}, "attributes"),
    ({"rank": "9"}, "rank 9: the matrices have rank 8 at most"), ({"rank": "full"}, "rank is whole numbers"),
    ({"fine_tuned": "-2,3"}, "fine_tuned is whole numbers"), ({"layer": "two"}, "layer"),
])  # fmt: skip
def test_bad_settings_are_one_error_before_any_work(given, said, monkeypatch):
    monkeypatch.setattr(Bench, "once", lambda *args: pytest.fail("something was trained"))
    with pytest.raises(TransectError, match=said):
        run_study(STUDY, {**TINY, **given})


def test_facts_that_cannot_be():
    with pytest.raises(TransectError, match="1 or more"):
        Facts(0, 2, 8, 0)
