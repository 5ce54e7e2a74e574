import itertools
from dataclasses import replace
from math import inf, isnan
from random import Random

import pytest
import torch

from tests.models import CAUSAL, inputs, logits, tiny
from tests.test_causal_trace import specimen_of, tokenizer
from transect.anatomy import Anatomy
from transect.claims import claims
from transect.claims.catalog.cola import Hits
from transect.claims.context import Context
from transect.data import Batches, Fact, Specimen, load_choices
from transect.errors import BadData, TransectError
from transect.probes import drawings, run_probes
from transect.probes.catalog.cola.asked import Answers, Question, questions_of
from transect.probes.catalog.cola.cola import random_paths, rates_of, within
from transect.probes.catalog.cola.executor import Executor
from transect.probes.catalog.cola.paths import Edit, Path, Space, edits_of, runs, segments, written
from transect.probes.catalog.cola.search import Node, search

SMALL = {"cola": {"simulations": 12, "inputs": 2}}
IDS = torch.tensor([5, 9, 3, 17, 4])


def only(path):
    """A reward that one path gets."""
    return lambda given: float(given == path)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_plain_path_is_the_model_and_others_are_its_blocks_in_that_order(name):
    model = tiny(name)
    anatomy = Anatomy(model)
    executor = Executor(anatomy, IDS)
    asked: dict = {"input_ids": IDS[None], "use_cache": False}
    plain = logits(model, asked)[0]
    assert torch.equal(executor.logits((0, 1, 2)), plain)
    skipped, repeated = executor.logits((0, 2)), executor.logits((0, 1, 1, 2))
    assert torch.equal(logits(model, asked)[0], plain)
    block = anatomy.block_list[1]

    def instead(module, args, kwargs, output):
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    hook = block.register_forward_hook(instead, with_kwargs=True)
    without = logits(model, asked)[0]
    hook.remove()
    assert torch.equal(skipped, without)

    def again(module, args, kwargs, output):
        first = output[0] if isinstance(output, tuple) else output
        return module.forward(first, *args[1:], **kwargs)

    hook = block.register_forward_hook(again, with_kwargs=True)
    twice = logits(model, asked)[0]
    hook.remove()
    assert torch.equal(repeated, twice)
    assert not torch.equal(skipped, plain) and not torch.equal(repeated, plain)


def test_many_paths_together_are_as_each_alone(monkeypatch):
    paths = [(0, 1, 2), (0, 2), (2, 1), (0, 1, 1, 2), (1,), (2, 2, 2, 2)]
    for kept in (1 << 24, 1):  # nothing is kept: only the embeddings
        monkeypatch.setattr("transect.probes.catalog.cola.executor.KEPT", kept)
        together = Executor(Anatomy(tiny("gemma3", dtype=torch.float64)), IDS).run(paths)
        alone = Executor(Anatomy(tiny("gemma3", dtype=torch.float64)), IDS)
        for path, state in zip(paths, together, strict=True):
            torch.testing.assert_close(state, alone.state(path), rtol=1e-9, atol=1e-11)


def test_edits_are_what_they_say():
    assert Edit(1, 2, 0).of((0, 1, 2, 3)) == (0, 3)
    assert Edit(1, 2, 2).of((0, 1, 2, 3)) == (0, 1, 2, 1, 2, 1, 2, 3)
    for space in ("both", "skip", "repeat"):
        found = [edit.of((0, 1, 2, 2, 3)) for edit in edits_of((0, 1, 2, 2, 3), space, 8)]
        assert found and all(1 <= len(path) <= 8 and set(path) <= {0, 1, 2, 3} for path in found)
        assert all(len(path) < 5 for path in found) == (space == "skip")
        assert all(len(path) > 5 for path in found) == (space == "repeat")
    assert edits_of((0,), "skip", 8) == [] and edits_of((0,), "repeat", 1) == []
    assert {edit.of((0, 1)) for edit in edits_of((0, 1), "skip", 4)} == {(0,), (1,)}


def test_paths_are_read_as_programs():
    assert runs((0, 2, 2), 4) == [1, 0, 2, 0]
    assert segments([0, 0, 1, 0, 2, 3], repeated=False) == [2, 1] and segments([0, 2, 3, 1], repeated=True) == [2]
    assert [written(path, 3) for path in [(0, 1, 2), (0, 1, 1, 2), (2,)]] == ["all, once", "0-1 1-2", "2"]
    assert rates_of([(0, 2), (0, 1, 1, 1)], 3, False).tolist() == [0, 0.5, 0.5]
    assert rates_of([(0, 2), (0, 1, 1, 1)], 3, True).tolist() == [0, 1, 0]
    assert within(torch.tensor([2.0, torch.nan]), 3).tolist() == [0, 0.5, 0.5]


def test_the_tree_counts_rightly_and_its_paths_are_allowed():
    found = search(5, lambda path: float(len(path) % 2), simulations=80, longest=9, weight=0.5)
    stack = [found.root]
    while stack:
        node = stack.pop()
        own = node.visits - sum(child.visits for child in node.children)
        assert own >= 1 and 0 <= node.total <= node.visits
        assert 1 <= len(node.path) <= 9 and set(node.path) <= set(range(5))
        assert all(child.depth == node.depth + 1 for child in node.children)
        stack += node.children
    assert found.root.visits == 80 and found.root.path == (0, 1, 2, 3, 4)
    assert max(found.depths) > 1 and len(found.rewards) == len(found.depths) <= 80
    assert Node((0,), 0, []).score(10, 5, 5.0) == inf


def test_no_path_is_run_twice_and_the_seed_decides():
    asked = []

    def reward(path):
        asked.append(path)
        return 0.0

    one = search(4, reward, simulations=60, seed=3)
    assert len(asked) == len(set(asked)) == len(one.rewards)
    assert list(search(4, only(()), simulations=60, seed=3).rewards) == asked
    assert list(search(4, only(()), simulations=60, seed=4).rewards) != asked


def test_the_front_is_not_dominated_and_more_simulations_never_find_less():
    def reward(path):
        return float(sum(path) % 3 == 0)  # 0 + 1 + 2 + 3: the plain path is right

    shortest: list[int] = []
    for simulations in (1, 5, 20, 80):
        found = search(4, reward, simulations=simulations, seed=1)
        front, best = found.front, len(found.shortest or ())
        assert front[0][0] == 1 and front[0][1] == best and 1 <= best <= 4
        for point in ((reward, len(path)) for path, reward in found.rewards.items()):
            assert any(kept[0] >= point[0] and kept[1] <= point[1] for kept in front)
        assert len(front) == 1 or (front[1][0] < front[0][0] and front[1][1] < front[0][1])
        shortest.append(best)
    assert shortest == sorted(shortest, reverse=True) and shortest[0] == 4
    assert search(3, only(()), simulations=5).shortest is None


def test_a_hidden_path_of_every_space_is_found_in_both():
    hidden: list[tuple[Path, Space]] = [((0, 2), "skip"), ((0, 1, 1, 2), "repeat"), ((0, 0, 2), "both")]
    for path, space in hidden:
        for chosen in (space, hidden[-1][1]):
            assert search(3, only(path), simulations=400, space=chosen, weight=0.0, longest=5).shortest == path
    assert search(3, only((0, 0, 2)), simulations=400, space="skip", weight=0.0).shortest is None


def test_a_small_space_runs_out_without_harm():
    found = search(2, only(()), simulations=30, space="skip")
    assert set(found.rewards) == {(0, 1), (0,), (1,)} and found.root.visits == 30


def test_random_paths_have_the_edits_of_the_searched_ones():
    depths = [0, 1, 1, 2, 2, 3]
    drawn = random_paths(4, depths, "both", 8, Random(0))
    assert len(set(drawn)) == 6 and drawn[0] == (0, 1, 2, 3) and drawn[1] != drawn[0]
    assert all(1 <= len(path) <= 8 for path in drawn)
    assert len(random_paths(2, [0] + [1] * 9, "skip", 4, Random(0))) == 3  # there are no more


def test_answers_are_greedy_ones():
    specimen = specimen_of("llama", tokens=2)
    question = questions_of(specimen, "facts", 1, 4)[0]
    assert len(question.answer) == 2 and Answers(specimen, question)((0, 1, 2)) == 1
    wrong = replace(question, answer=(question.answer[0], question.answer[1] + 1))
    assert Answers(specimen, wrong)((0, 1, 2)) == 0
    assert len(questions_of(specimen, "facts", 3, 1)) == 3 and len(questions_of(specimen, "any", 1, 1)[0].answer) == 1


def test_different_guesses_hit_with_their_share_of_the_answers():
    """Counted: every set of so many different answers of four holds the right one as often."""
    for tried in (1, 2, 3, 4):
        sets = list(itertools.combinations(range(4), tried))
        expected = sum(0 in one for one in sets) / len(sets)
        assert Question("", IDS, (1,), None, 4).chance(tried) == pytest.approx(expected)
    assert Question("", IDS, (1,), None, 4).chance(9) == 1 and Question("", IDS, (1,), None, 4).chance(0) == 0
    assert isnan(Question("", IDS, (1,), None, 1).chance(2))


def test_of_a_choice_the_best_letter_counts(monkeypatch):
    specimen = specimen_of("llama")
    choices = load_choices(
        [
            {"question": "w5", "options": ["w6", "w7"], "answer": n, "template": "{question} {options} w3"}
            for n in (0, 1)
        ]
    )
    letters = {"A": 20, "B": 21}
    monkeypatch.setattr(Specimen, "single_token", lambda self, prompt, letter: letters[letter])
    specimen = replace(specimen, known_choices=choices)
    asked = questions_of(specimen, "choices", 2, 4)
    assert all(one.among == (20, 21) and one.options == 2 for one in asked)
    at = logits(specimen.model, {"input_ids": asked[0].ids[None]})[0, -1]
    right = [Answers(specimen, one)((0, 1, 2)) for one in asked]
    assert right == [float(at[20] >= at[21]), float(at[20] < at[21])]


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture(name):
    specimen = specimen_of(name, torch.float32)
    before = specimen.model(specimen.encode("w3 w4")[None]).logits
    result = run_probes(specimen, SMALL)["cola"]
    assert result["plain"].tolist() == [1, 1] and result["searched"].shape == (1, 2)
    assert (result["searched"] <= 3).all() and (result["random"] <= 3).all()
    assert result["skipped"].shape == result["repeated_tried"].shape == (1, 3)
    assert "right path of fewer than 3 layers" in result.findings[0] and "random" in result.findings[0]
    assert len(drawings(result)) == 3
    assert torch.equal(before, specimen.model(specimen.encode("w3 w4")[None]).logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in specimen.model.modules())


def test_all_spaces_and_both_controls_are_told_beside_every_success():
    specimen = specimen_of("llama")
    first, *others = specimen.facts
    wrong = sorted({f"w{number}" for number in range(9)} - {fact.answer for fact in specimen.facts})
    facts = [first, *(replace(fact, answer=word) for fact, word in zip(others, wrong, strict=False))]
    result = run_probes(replace(specimen, known_facts=facts), {"cola": {"space": "all", "simulations": 20}})["cola"]
    assert result["plain"].tolist() == [1, 0, 0, 0] and result["searched"].shape == (3, 4)
    assert torch.equal(result["chance"], (result["answers"] / 4).clamp_max(1))
    assert (result["chance_shorter"] <= result["chance"]).all() and (result["chance_shorter"][2] == 0).all()
    for right, times in ((True, 1), (False, 2)):  # of the wrong ones: any right path, and a shorter one
        told = [line for line in result.findings if ("answers rightly" if right else "answers wrongly") in line]
        assert len(told) == 3
        for space, line in enumerate(told):
            assert line.count("as many random paths") == times == line.count("guessing as many different answers")
            of = (result["plain"] > 0) == right
            for name in ["chance_shorter"] if right else ["chance", "chance_shorter"]:
                assert f"guessing as many different answers: {float(result[name][space][of].mean()):.0%}" in line
            assert right or "oracle success" in line
    assert (result["answers"] >= 1).all() and len(drawings(result)) == 3


def test_refusals():
    specimen = specimen_of("llama")
    for given in ({"simulations": 0}, {"space": "none"}, {"kind": "passages"}, {"chance": 2}):
        with pytest.raises(TransectError):
            run_probes(specimen, {"cola": given})
    assert "--facts" in run_probes(Specimen(specimen.anatomy, tokenizer()), SMALL).refused["cola"]
    for name in ("bert", "vit"):
        other = Specimen(Anatomy(tiny(name)), tokenizer(), known_facts=specimen.facts)
        assert "next token" in run_probes(other, SMALL).refused["cola"]
    with pytest.raises(BadData, match="answer"):
        run_probes(replace(specimen, known_facts=[Fact("w3 {} w5", "w7", " ")]), SMALL)
    shallow = tiny("llama")
    shallow.model.layers = shallow.model.layers[:1]
    shallow.config.num_hidden_layers = 1
    one = Specimen(Anatomy(shallow), tokenizer(), known_facts=specimen.facts)
    assert "only one" in run_probes(one, SMALL).refused["cola"]


def test_claims_ask_and_compare(monkeypatch):
    monkeypatch.setattr("transect.claims.catalog.cola.SETTINGS", {"inputs": 2, "simulations": 8})
    specimen = specimen_of("llama", torch.float32)
    data = Batches([inputs("llama", batch=2)])
    context = Context(specimen.model, data, data, specimen=specimen)
    shorter = next(one for one in claims(["cola"]) if one.name == "cola/shorter").function(context)
    assert "random" in shorter.explanation and len(shorter.numbers) == 2 and "guesses" in shorter.explanation


def test_a_claim_needs_more_than_what_luck_gives():
    ones, none = torch.ones(17).double(), torch.zeros(17).double()
    one_more, five_more = ones.clone(), ones.clone()
    one_more[0] = 0
    five_more[:5] = 0
    assert not Hits(ones, one_more, none).beyond_random and Hits(ones, five_more, none).beyond_random
    assert not Hits(five_more, ones, none).beyond_random and not Hits(ones, ones, none).beyond_random
    every_letter = torch.tensor([1.0] * 16 + [0.75]).double()
    assert not Hits(ones, none, every_letter).beyond_guesses and Hits(ones, none, ones / 4).beyond_guesses
    assert "for 16 of the 17 every possible answer was tried" in Hits(ones, one_more, every_letter).told()
