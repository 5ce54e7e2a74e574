"""Contests of trainings: the table, the rate that is chosen, resuming, processes, and bad input."""

import json

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import transect
from transect.cli import main_group
from transect.contest import Trial
from transect.contest.worker import Worker
from transect.errors import TransectError

from .models import VOCABULARY, tiny

DATA = torch.randint(3, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))
HELD_OUT = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(6))
OTHER = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    return path


def race(model, out, adapters=("lora", "full"), **options):
    given = {"rates": (1.0, 30.0), "shares": (0.2,), "seeds": 2, "batch_size": 4, "device": "cpu", **options}
    return transect.race(model, adapters, DATA, HELD_OUT, out, forgets=OTHER, **given)


def test_rows_are_what_adapting_one_by_one_gives(folder, tmp_path):
    frame = race(folder, tmp_path / "run")
    assert list(frame["method"]) == ["base", "lora", "full"] and list(frame["seeds"]) == [0, 2, 2]
    assert frame["eval"].iloc[0] == pytest.approx(transect.evaluate(tiny("llama"), HELD_OUT)["loss"], abs=1e-6)
    row = frame.iloc[1]
    own = transect.adaptation.adapter_named("lora").rate
    held_out, target = {}, []
    for rate in (own, 30 * own):
        alone = transect.adapt(
            tiny("llama"), "lora", DATA, eval_data=HELD_OUT, rank=int(row["size"]), lr=rate, batch_size=4, device="cpu"
        )
        held_out[rate] = alone.outcome["loss_after"]
        target.append(alone.outcome["texts"]["eval"]["after"])
    assert row["rate"] == min(held_out, key=lambda rate: held_out[rate])  # chosen by the training text alone
    chosen = target[list(held_out).index(row["rate"])]
    other_seed = transect.adapt(
        tiny("llama"), "lora", DATA, eval_data=HELD_OUT, forgets=OTHER, rank=int(row["size"]), lr=float(row["rate"]),
        batch_size=4, device="cpu", seed=1,
    ).outcome["texts"]  # fmt: skip
    both = [chosen, other_seed["eval"]["after"]]
    assert row["eval"] == pytest.approx(sum(both) / 2, abs=1e-6)
    assert row["eval_seed_error"] == pytest.approx(abs(both[0] - both[1]) / 2, abs=1e-6)
    assert row["eval_change"] == pytest.approx(row["eval"] - frame["eval"].iloc[0]) and row["forgets_error"] > 0
    dense = sum(p.numel() for p in tiny("llama").model.layers.parameters() if p.ndim == 2)
    assert 0.1 * dense < row["trained"] <= 0.2 * dense < frame["trained"].iloc[2]
    assert {"table.csv", "table.md", "contest.png", "run.json", ".transect", "trials"} == {
        path.name for path in (tmp_path / "run").iterdir()
    }


def test_an_interrupted_contest_goes_on_and_can_be_widened(folder, tmp_path, monkeypatch):
    expected = race(folder, tmp_path / "whole", seeds=1)
    ran, run = [], Worker.compute

    def compute(self, trial):
        ran.append(trial)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return run(self, trial)

    monkeypatch.setattr(Worker, "compute", compute)
    with pytest.raises(KeyboardInterrupt):
        race(folder, tmp_path / "run", seeds=1)
    found = race(folder, tmp_path / "run", seeds=1)
    assert len(ran) == 4 + 2 and ran[3] == ran[4]
    timed = ["seconds_a_step"]
    pd.testing.assert_frame_equal(found.drop(columns=timed), expected.drop(columns=timed))
    wider = race(folder, tmp_path / "run", ("lora", "full", "shira"), seeds=2, shares=(0.2, 0.1))
    assert list(wider["method"]) == ["base", "lora", "lora", "full", "shira", "shira"]
    assert wider["rate"].iloc[2] == expected["rate"].iloc[1] and len(ran) == 6 + 2 + 4 + 5
    with pytest.raises(TransectError, match="holds a run with another model, data or settings"):
        race(folder, tmp_path / "run", batch_size=5)


def test_what_diverges_or_cannot_be_so_small_has_a_note(folder, tmp_path):
    frame = race(folder, tmp_path / "run", ("lora", "full"), rates=(1e30,), seeds=1, shares=(0.001, 0.2))
    assert frame["eval"].isna().tolist() == [False, True, True, True]
    notes = frame["note"].tolist()
    assert "cannot train as few as" in notes[1] and "not finite" in notes[2] and "not finite" in notes[3]
    mixed = race(folder, tmp_path / "run", ("lora",), rates=(1.0, 1e30), seeds=1)
    assert mixed["eval"].notna().all()  # the rate that did not diverge


def test_processes_give_the_same_table(folder, tmp_path):
    timed = ["seconds_a_step"]
    expected = race(folder, tmp_path / "one", ("shira",), seeds=1).drop(columns=timed)
    found = race(folder, tmp_path / "two", ("shira",), seeds=1, workers=2).drop(columns=timed)
    pd.testing.assert_frame_equal(found, expected)


def test_what_does_not_go_is_said_before_any_training(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transect.adaptation.adapt.adapt_anatomy", lambda *_, **__: pytest.fail("it trained"))
    for options, said in [
        ({"adapters": ("lorra",)}, "unknown method"),
        ({"settings": {"lora": {"rank": 4}}}, "rank=4 is set by shares in a contest"),
        ({"settings": {"bone": {"block": 4}}}, "there are settings for bone"),
        ({"rates": (0.0,)}, "rates"),
        ({"shares": ()}, "shares"),
        ({"seeds": 0}, "seeds"),
        ({"model": tiny("llama"), "workers": 2}, "only in memory"),
    ]:
        given = {"model": folder, "adapters": ("lora",), **options}
        with pytest.raises(TransectError, match=said):
            race(given.pop("model"), tmp_path / "run", **given)


def test_trials_do_not_share_a_file():
    trials = {Trial(None, None, 0).file}
    for share in (0.1, 0.1 + 1e-16, None):
        for rate in (1e-3, 1.0000000000000002e-3):
            trials |= {Trial(transect.contest.Entrant("lora", share), rate, seed).file for seed in (0, 1)}
    assert len(trials) == 1 + 2 * 2 * 2 + 4 * (0.1 != 0.1 + 1e-16)


def test_the_command(tmp_path):
    words = ["race", "organism", "--adapt", "lora,full", "--data", "organism:calibration", "--sequences", "6",
             "--steps", "1", "--batch-size", "2", "--sequence-length", "16", "--eval", "organism:heldout", "--seeds",
             "1", "--rates", "1", "--shares", "0.05", "--eval-sequences", "2", "--lora.alpha", "8", "--device", "cpu",
             "--out", str(tmp_path / "out")]  # fmt: skip
    result = CliRunner().invoke(main_group, words, catch_exceptions=False)
    assert result.exit_code == 0 and "target, change" in result.output and "contest.png" in result.output
    rows = json.loads(CliRunner().invoke(main_group, [*words, "--json"], catch_exceptions=False).stdout)
    assert [row["method"] for row in rows] == ["base", "lora", "full"]
