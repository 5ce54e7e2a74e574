"""Prompts of a fact in their contexts, and the values that an edit writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.facts import specimen_of
from transect.editing.contexts import ESSENCE, prefixes_of, rows_of
from transect.editing.problems import requests
from transect.editing.values import Search, values
from transect.forward import watch
from transect.probes.tracing import subject_span


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
        torch.testing.assert_close(keys[row], alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(chances[row], logits[-2].log_softmax(-1)[ids[-1]], rtol=0, atol=1e-10)
        sums.append(alone)
    torch.testing.assert_close(rows.in_context(keys)[0], torch.stack(sums).mean(0), rtol=0, atol=1e-10)
    torch.testing.assert_close(rows.bare(keys)[0], sums[0], rtol=0, atol=1e-10)
    assert int((rows.kind == ESSENCE).sum()) == 2


@pytest.mark.parametrize(("point", "layer"), [("down", 1), ("residual", 2), ("residual", 3)])
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
