"""Objectives: the frame that reads the user's data, trains on it and judges it, whatever is lowered."""

import math

import pytest
import torch
from torch.nn import functional

import transect
from transect.data import Batches, load_rows
from transect.errors import BadData, TransectError
from transect.goals import ExampleGoal, objective, registry
from transect.training import Machine

from .models import VOCABULARY, tiny

TEXT = torch.randint(3, VOCABULARY, (20, 12), generator=torch.Generator().manual_seed(5))
PAIRS = [{"better": [3, 4, 5 + i % 7], "worse": [3, 9, 5 + i % 7]} for i in range(20)]
OPTIONS = {"lr": 1e-2, "epochs": 2, "batch_size": 4, "device": "cpu"}


class Preferred(ExampleGoal):
    """Of two sequences the first is to be the likelier at its end: -log sigmoid of the difference."""

    def __init__(self, scale):
        self.scale = scale

    def read(self, data, reading):
        rows = [{name: torch.tensor(ids) for name, ids in row.items()} for row in data][: reading.sequences]
        parts = [rows[i : i + reading.batch_size] for i in range(0, len(rows), reading.batch_size)]
        return Batches([{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in parts])

    def losses(self, model, batch):
        margin = torch.stack([model(input_ids=batch[name]).logits[:, -1, 7] for name in ("better", "worse")])
        margin = self.scale * (margin[0] - margin[1])
        return -functional.logsigmoid(margin), margin > 0


@pytest.fixture
def preferred(monkeypatch):
    monkeypatch.setattr(registry, "_objectives", dict(registry._objectives))

    @objective("preferred", paper="this test", score="accuracy of pairs")
    def preferred(opened, *, scale: float = 1.0):
        """Tell the better one.

        scale: of the difference.
        """
        return Preferred(scale)


def test_the_models_own_loss_is_the_default():
    plain, named = tiny("llama"), tiny("llama")
    transect.adapt(plain, "full", TEXT, **OPTIONS)
    outcome = transect.adapt(named, "full", TEXT, eval_data=TEXT, objective="own", **OPTIONS).outcome
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), named.parameters(), strict=True))
    result = transect.evaluate(named, TEXT)
    assert outcome["texts"]["eval"]["after"] == pytest.approx(result["loss"], abs=1e-5)
    assert outcome["texts"]["eval"]["accuracy"][1] == pytest.approx(result["accuracy"], abs=1e-9)


def test_pairs_are_learned_and_judged_by_what_is_lowered(preferred):
    model, settings = tiny("llama"), {"preferred": {"scale": 2.0}}
    goal = Preferred(2.0)
    batches = goal.read(PAIRS, transect.goals.Reading(batch_size=3))
    with torch.no_grad():
        losses, right = (torch.cat(each) for each in zip(*(goal.losses(model, one) for one in batches), strict=True))
    result = goal.evaluate(model, batches)
    assert result.loss == pytest.approx(losses.mean().item(), rel=1e-5) and result.tokens == 20
    assert result.accuracy == pytest.approx(right.double().mean().item())
    assert goal.measure(model, [*batches, None], Machine("cpu")) == pytest.approx(result.loss, rel=1e-5)
    assert math.isnan(goal.measure(model, [], Machine("cpu")))
    outcome = transect.adapt(
        model, "lora", PAIRS, eval_data=PAIRS, objective="preferred", settings=settings, **OPTIONS
    ).outcome  # fmt: skip
    learned = outcome["texts"]["eval"]
    assert learned["before"] == pytest.approx(result.loss, rel=1e-5) and learned["after"] < 0.7 * learned["before"]
    assert learned["accuracy"] == [pytest.approx(result.accuracy), 1.0]
    assert outcome["settings"]["objective_options"] == {"scale": 2.0}


def test_rows_of_any_container_reach_an_objective(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "text {i}", "label": {i % 2}}}\n' for i in range(6)))
    assert load_rows(rows) == load_rows(tmp_path / "rows.jsonl") == rows
    assert load_rows({"text": [row["text"] for row in rows], "label": [0, 1] * 3}, 3) == rows[::2]
    for bad, said in (([], "empty"), ([{"input_ids": [3, 4]}], "not token ids"), (TEXT, "not token ids")):
        with pytest.raises(BadData, match=said):
            load_rows(bad)


def test_what_does_not_go(preferred):
    with pytest.raises(TransectError, match=r"unknown objective 'pairs'; known: .*own, preferred"):
        transect.adapt(tiny("llama"), "lora", TEXT, objective="pairs")
    with pytest.raises(TransectError, match="scale='much' must be of type float"):
        transect.adapt(tiny("llama"), "lora", PAIRS, objective="preferred", settings={"preferred": {"scale": "much"}})
