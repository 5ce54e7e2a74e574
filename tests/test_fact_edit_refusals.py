"""What edits of facts refuse, and that nothing is changed then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.facts import EDITS, QUICK, WORDS, assert_same, hooks, specimen_of, state
from tests.models import tiny
from transect.anatomy import Anatomy
from transect.data import Specimen, load
from transect.editing import edit_specimen
from transect.editing.catalog import rome as rome_file
from transect.editing.closed_form import rank_one
from transect.errors import NotApplicable, TransectError
from transect.parameters import block_numbers


def bad(case: str) -> tuple[Specimen, dict[str, Any]]:
    specimen = specimen_of()
    first, second = specimen.facts
    long = " ".join(["w1"] * 62)
    changes: dict[str, Any] = {
        "unknown subject": [replace(first, subject="Zanzibar")],
        "already said": [replace(first, new_answer=first.answer)],
        "contradiction": [first, replace(first, new_answer=second.answer + "")],
        "nothing to put in": [replace(first, new_answer=None)],
        "too long": [replace(first, prompt=f"{long} {{}}")],
        "no facts": [],
    }
    if case in changes:
        specimen = replace(specimen, known_facts=changes[case])
    if case == "not known":
        return specimen_of(answer=5), {"problem": "erasure"}
    if case == "short text":
        return replace(specimen, data=load(torch.randint(3, 60, (1, 20)), specimen.model)), {}
    if case == "no text":
        return replace(specimen, data=None), {}
    return specimen, {"problem": "reversal", "noise": 0} if case == "no noise" else {}


REFUSED = {
    "unknown subject": "not found", "already said": "nothing to put in", "contradiction": "contradict",
    "nothing to put in": "no new_answer", "too long": "context", "no facts": "needs facts",
    "not known": "nothing to erase", "no noise": "nothing to reverse", "short text": "at least 48",
    "no text": "needs text",
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("edit", EDITS)
def test_refusals_leave_the_weights(edit: str, case: str):
    if edit == "constrained-ft" and case.endswith("text"):
        return  # it needs none
    specimen, settings = bad(case)
    before = state(specimen.model)
    with pytest.raises(TransectError, match=REFUSED[case]):
        edit_specimen(specimen, edit, {**QUICK[edit], **settings})
    assert_same(specimen.model, before)
    assert hooks(specimen.model) == 0


@pytest.mark.parametrize("edit", EDITS)
def test_encoders_are_refused(edit: str):
    model = tiny("bert")
    specimen = Specimen(Anatomy(model), WORDS, None, specimen_of().facts)
    with pytest.raises(NotApplicable, match="next token"):
        edit_specimen(specimen, edit, {})


@pytest.mark.parametrize(("edit", "settings"), [("rome", {"layer": 3}), ("memit", {"layers": "2-1"})])
def test_layers_that_do_not_exist(edit: str, settings: dict[str, Any]):
    with pytest.raises(TransectError, match=r"do not exist|does not exist"):
        edit_specimen(specimen_of(), edit, settings)
    with pytest.raises(TransectError, match="numbers and ranges"):
        edit_specimen(specimen_of(), "memit", {"layers": "late"})


@pytest.mark.parametrize(
    ("text", "layers"), [("1", [1]), ("0-1", [0, 1]), ("2, 0-1,1", [0, 1, 2]), ("0,2", [0, 2]), ("all", [0, 1, 2])]
)
def test_layers_as_they_are_written(text: str, layers: list[int]):
    assert block_numbers(text, range(3)) == layers


def test_an_error_on_the_way_takes_everything_back(monkeypatch: pytest.MonkeyPatch):
    specimen, calls = specimen_of(), []

    def breaks(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise TransectError("the second fact fails")
        return rank_one(*arguments)

    monkeypatch.setattr(rome_file, "rank_one", breaks)
    before = state(specimen.model)
    with pytest.raises(TransectError, match="second fact"):
        edit_specimen(specimen, "rome", QUICK["rome"])
    assert len(calls) == 2 and hooks(specimen.model) == 0
    assert_same(specimen.model, before)


@pytest.mark.parametrize(("edit", "settings"), [("rome", {"layer": 2}), ("memit", {"layers": "1-2"})])
def test_the_last_layer_reaches_no_answer(edit, settings):
    """There the search would follow the rounding of its drift and decay terms."""
    specimen = specimen_of()
    before = state(specimen.model)
    with pytest.raises(NotApplicable, match="choose an earlier layer"):
        edit_specimen(specimen, edit, {**QUICK[edit], **settings})
    assert_same(specimen.model, before)
