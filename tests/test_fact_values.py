"""Prompts of a fact in their contexts, and the values that an edit writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.facts import specimen_of
from tests.models import CAUSAL
from transect.editing.contexts import ESSENCE, Rows, prefixes_of, rows_of
from transect.editing.problems import Problem, requests
from transect.editing.values import Search, values
from transect.forward import changed, watch
from transect.probes.tracing import subject_span

CLOSE: dict[str, float] = {"rtol": 0, "atol": 1e-5}  # transformers takes the softmax in float32, batched or not


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_rows_agree_with_prompts_run_alone(name: str):
    specimen = specimen_of(name)
    wanted, prefixes = requests(specimen, "injection"), prefixes_of(specimen, 3)
    rows = rows_of(specimen, wanted, prefixes, essence=True)
    assert len(prefixes) == 3 and len(rows.ids) == 2 * (1 + 3 + 1)
    (keys,) = rows.at_edit(specimen, [("neurons", 1)])
    with torch.no_grad():
        chances = rows.answer_log_probabilities(rows.logits(specimen))
    sums = []
    for row, prefix in enumerate(["", *prefixes]):
        fact = replace(wanted[0].fact, prompt=f"{prefix} {wanted[0].fact.prompt}".strip())
        ids = torch.cat([specimen.encode(fact.text), wanted[0].target])
        with torch.no_grad(), watch(specimen.anatomy, ["neurons"], [1]) as seen:
            logits = specimen.model(input_ids=ids[None]).logits[0]
        alone = seen.neurons[1].reshape(len(ids), -1)[subject_span(specimen, fact)[1] - 1]
        torch.testing.assert_close(keys[row], alone, **CLOSE)
        torch.testing.assert_close(chances[row], logits[-2].log_softmax(-1)[ids[-1]], **CLOSE)
        sums.append(alone)
    torch.testing.assert_close(rows.in_context(keys)[0], torch.stack(sums).mean(0), **CLOSE)
    torch.testing.assert_close(rows.bare(keys)[0], sums[0], **CLOSE)
    halves = (sums[0] + torch.stack(sums[1:]).mean(0)) / 2
    torch.testing.assert_close(rows.by_kind(keys)[0], halves, **CLOSE)
    alone = rows_of(specimen, wanted, [])
    (keys,) = alone.at_edit(specimen, [("neurons", 1)])
    torch.testing.assert_close(alone.by_kind(keys), alone.bare(keys))
    assert int((rows.kind == ESSENCE).sum()) == 2


@pytest.mark.parametrize(("point", "layer"), [("down", 1), ("residual", 1), ("residual", 2)])
def test_values_of_many_requests_are_those_of_each_alone(point: Any, layer: int):
    specimen = specimen_of(count=3)
    specimen.model.requires_grad_(False)
    wanted, prefixes = requests(specimen, "injection"), prefixes_of(specimen, 2)
    search = Search(6, 0.1, 0.0625, 0.5, 2.0, lowers=False)
    together, start = values(specimen, rows_of(specimen, wanted, prefixes, True), point, layer, search)
    for number, one in enumerate(wanted):
        alone, m = values(specimen, rows_of(specimen, [one], prefixes, True), point, layer, search)
        torch.testing.assert_close(together[number], alone[0], rtol=0, atol=1e-8)
        torch.testing.assert_close(start[number], m[0], rtol=0, atol=1e-10)


def test_those_still_searched_go_on_alone(monkeypatch: pytest.MonkeyPatch):
    """Once half of the requests have values that are good enough, with the same values as each of them alone."""
    specimen = specimen_of(count=4)
    specimen.model.requires_grad_(False)
    wanted, prefixes = requests(specimen, "injection"), prefixes_of(specimen, 2)
    search = Search(40, 0.3, 0.01, 0.0, 100.0, lowers=False)
    at_once: list[int] = []
    behind = Rows.behind

    def watched(rows: Rows, *args: Any) -> Any:
        at_once.append(rows.requests)
        return behind(rows, *args)

    monkeypatch.setattr(Rows, "behind", watched)
    monkeypatch.setattr("transect.editing.values._ENOUGH", 3.12)  # which random weights reach, some sooner than others
    together, _ = values(specimen, rows_of(specimen, wanted, prefixes, True), "residual", 1, search)
    assert at_once == [4, 2, 1]
    for number, one in enumerate(wanted):
        alone, _ = values(specimen, rows_of(specimen, [one], prefixes, True), "residual", 1, search)
        torch.testing.assert_close(together[number], alone[0], rtol=0, atol=1e-6)


def test_values_lower_the_loss_written_out():
    """A few steps of Adam on one prompt at a time, with KL(edited || original) term by term."""
    specimen = specimen_of(count=1)
    specimen.model.requires_grad_(False)
    wanted, prefixes = requests(specimen, "injection"), prefixes_of(specimen, 2)
    rows = rows_of(specimen, wanted, prefixes, True)
    found, start = values(specimen, rows, "down", 1, Search(4, 0.5, 100.0, 0.5, 100.0, lowers=False))
    (fact, m, target) = wanted[0].fact, start[0], int(wanted[0].target[0])
    unit = m.norm() / len(m) ** 0.5
    moved = torch.zeros_like(m, requires_grad=True)
    optimizer = torch.optim.Adam([moved], lr=0.5)

    def said(text: str, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities behind a text, and at the subject's last token."""
        edit = subject_span(specimen, replace(fact, prompt=text))[1] - 1
        ids = specimen.encode(text.replace("{}", fact.subject))
        added = torch.zeros(1, len(ids), len(m), dtype=m.dtype).index_add(1, torch.tensor([edit]), delta[None, None])
        with changed(specimen.anatomy, {("down", 1): lambda x: x + added}):
            logits = specimen.model(input_ids=ids[None]).logits[0].log_softmax(-1)
        return logits[-1], logits[edit]

    with torch.no_grad():
        original = said("{}", torch.zeros_like(m))[1]
    for _ in range(4):
        delta = moved * unit
        answer = [said(f"{one} {fact.prompt}".strip(), delta)[0][target] for one in ["", *prefixes]]
        edited = said("{}", delta)[1]
        drift = (edited.exp() * (edited - original)).sum()
        loss = -torch.stack(answer).mean() + 100 * drift + 0.5 * delta.norm() / m.norm() ** 2
        (moved.grad,) = torch.autograd.grad(loss, moved)
        optimizer.step()
    torch.testing.assert_close(found[0], (moved * unit).detach(), rtol=1e-4, atol=1e-7)


def test_values_stay_within_their_length_and_raise_the_answer():
    specimen = specimen_of()
    specimen.model.requires_grad_(False)
    rows = rows_of(specimen, requests(specimen, "injection"), [], True)
    change, start = values(specimen, rows, "down", 1, Search(10, 0.2, 0.0625, 0.0, 0.5, lowers=False))
    assert (change.norm(dim=1) <= 0.5 * start.norm(dim=1) * (1 + 1e-9)).all()
    asked = rows.kind != ESSENCE
    with torch.no_grad():
        plain = rows.answer_log_probabilities(rows.logits(specimen))[asked]
        moved = rows.answer_log_probabilities(rows.logits(specimen, {("down", 1): rows.adding(change)}))[asked]
    assert (moved > plain).all()


@pytest.mark.parametrize("problem", ["injection", "forcing"])
def test_rows_of_some_requests_are_as_without_the_others(problem: Problem):
    """Whose answers are longer than theirs."""
    specimen = specimen_of(count=3)
    first, *others = specimen.facts
    longer = replace(first, answer="w8 w9 w8", new_answer="w8 w9 w8")
    specimen = replace(specimen, known_facts=[longer, *others])
    wanted, prefixes = requests(specimen, problem), prefixes_of(specimen, 2)
    rows = rows_of(specimen, wanted, prefixes, True)
    some, alone = rows.of(torch.tensor([1, 2])), rows_of(specimen, wanted[1:], prefixes, True)
    assert rows.targets.shape[1] == 3 and some.targets.shape[1] == 1
    assert torch.equal(some.ids[:, : alone.ids.shape[1]], alone.ids)
    for field in ("targets", "owner", "edit", "last", "tokens", "kind"):
        assert torch.equal(getattr(some, field), getattr(alone, field)), field
    with torch.no_grad():
        found, expected = (one.answer_log_probabilities(one.logits(specimen)) for one in (some, alone))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("problem", ["injection", "forcing"])
@pytest.mark.parametrize("name", CAUSAL)
def test_logits_behind_a_layer_are_those_of_the_whole_model(name: str, problem: Problem):
    """In contexts of several lengths, or with noise on the subject, and a change at the layer."""
    specimen = specimen_of(name)
    rows = rows_of(specimen, requests(specimen, problem), prefixes_of(specimen, 4), essence=True)
    vector = torch.ones(2, specimen.anatomy.blocks[1].matrix("down").shape[0])
    cut, feed = rows.behind(specimen, 1)
    whole = name in ("gemma2", "gemma3") and problem == "injection"  # their windows are shorter than the rows
    if whole:
        assert cut is rows
    else:
        assert cut.ids.shape[1] < rows.ids.shape[1] and not cut.edit.any()
    ran: list[int] = []
    for index, block in enumerate(specimen.anatomy.block_list):
        block.register_forward_hook(lambda module, args, output, index=index: ran.append(index))

    def asked(one: Rows) -> Tensor:
        return torch.cat([one.answer_places[rows.tokens > 0].flatten(), one.places[rows.kind == ESSENCE]])

    with torch.no_grad():
        found = cut.logits_behind(specimen, feed, 1, {("down", 1): cut.adding(vector)}, asked(cut))
        assert ran == list(range(1, specimen.layers))
        expected = rows.logits(specimen, {("down", 1): rows.adding(vector)}).flatten(0, 1)[asked(rows)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for layer in (0, 1):
            change = {("down", 1): rows.adding(vector)}
            found = rows.logits_behind(specimen, rows.before(specimen, layer), layer, change, asked(rows))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ran.clear()
    rows.at_edit(specimen, [("neurons", 1)])
    assert ran == [0, 1]
    ran.clear()
    values(specimen, rows, "down", 1, Search(4, 0.1, 0.0, 0.5, 2.0, lowers=False))
    assert ran.count(0) == 2 and ran.count(1) == 2 + (not whole) + 4  # once to see that cut rows give the same
