"""A contest of parts: equal sizes, resuming, what is compared with what, the command, bad input."""

import json
import statistics

import pytest
import torch
from click.testing import CliRunner

import transect
from transect.cli import main_group
from transect.contest.parts import flops_of_model
from transect.contest.parts.race import paired
from transect.errors import TransectError
from transect.parts import build_model

FAST = dict(
    hidden=32, blocks=1, heads=2, steps=3, batch_size=4, rates=(1e-3, 1e-2), seeds=2, held_out=8,
    settings={"induction": {"length": 12, "vocabulary": 16}},
)  # fmt: skip


def test_models_are_equal_in_size_and_a_contest_goes_on_where_it_stopped(tmp_path):
    out, done = tmp_path / "run", []

    def stop(trial):
        done.append(trial)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transect.race_parts("llama", "induction", out, mixer=["base", "pooling"], on_trial=stop, **FAST)
    kept = {file.name: file.read_bytes() for file in (out / "trials").iterdir()}
    frame = transect.race_parts("llama", "induction", out, mixer=["base", "pooling"], **FAST)
    assert all((out / "trials" / name).read_bytes() == text for name, text in kept.items()) and len(kept) == 3
    assert frame["entrant"].tolist() == ["base", "pooling"] and frame["seeds"].tolist() == [2, 2]
    assert abs(frame["parameters"][1] / frame["parameters"][0] - 1) <= 0.01
    assert (out / "contest.png").stat().st_size > 5000 and "against base" in (out / "table.md").read_text()
    assert frame["p"].notna().tolist() == [False, True]
    fresh = transect.race_parts("llama", "induction", tmp_path / "whole", mixer=["base", "pooling"], **FAST)
    assert fresh["loss"].tolist() == frame["loss"].tolist()


def test_what_no_width_makes_equal_has_a_note(tmp_path):
    frame = transect.race_parts(
        "llama", "induction", tmp_path / "run", mixer=["base"], parameters=50, **{**FAST, "seeds": 1, "rates": (1e-3,)}
    )
    assert "no width gives 50 parameters within 1 %" in frame["note"][0]


def test_operations_are_counted_as_a_reader_would():
    model = build_model("llama", hidden=32, blocks=1, heads=2, neurons=48, vocabulary=16, length=12)
    matrices = 4 * 32 * 32 + 3 * 32 * 48 + 32 * 16
    assert flops_of_model(model, 12) == 12 * 2 * matrices + 4 * 12 * 12 * 32
    softmax = build_model("llama", hidden=32, blocks=1, heads=2, neurons=48, vocabulary=16, length=12,
                          parts={"mixer": "softmax"}, key_value_heads=2)  # fmt: skip
    assert flops_of_model(softmax, 12) == flops_of_model(model, 12)


def test_pairs_are_tested_by_their_differences():
    found = paired([1.0, 1.2, 1.1, 1.3], [0.9, 1.0, 1.05, 1.1])
    differences = [0.1, 0.2, 0.05, 0.2]
    assert found["difference"] == pytest.approx(statistics.fmean(differences))
    from scipy import stats

    assert found["p"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    error = statistics.stdev(differences) / 2
    draws = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0)).numpy() * 2 * error + found["detectable"]
    assert (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.02)
    assert paired([1.0], [2.0]) == {"difference": -1.0, "p": None, "detectable": None}
    assert paired([1.0, 1.0], [1.0, 1.0])["p"] == 1.0


def test_by_command_with_options_of_parts_and_task(tmp_path):
    words = ["race", "vit", "--mixer", "identity,pooling", "--pooling.size", "5", "--task", "digits", "--hidden", "32",
             "--blocks", "1", "--steps", "2", "--batch-size", "4", "--rates", "0.001", "--seeds", "1", 
             "--held-out", "8", "--digits.held-out", "200", "--out", str(tmp_path / "run"), "--json"]  # fmt: skip
    result = CliRunner().invoke(main_group, words)
    assert result.exit_code == 0, result.output[-400:]
    rows = json.loads(result.output)
    assert [row["entrant"] for row in rows] == ["identity", "pooling"] and rows[0]["accuracy"] <= 1
    assert "--recall.keys" in CliRunner().invoke(main_group, ["race", "llama", "--mixer", "softmax", "--help"]).output


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mixer": ["magic"]}, "unknown mixer"),
        ({}, "at least one slot"),
        ({"mixer": ["pooling"], "parameters": 5, "flops": 5}, "not in both"),
        ({"mixer": ["pooling"], "task": "magic"}, "unknown task"),
        ({"mixer": ["pooling"], "settings": {"softmax": {}}}, "settings for softmax"),
        ({"mixer": ["gated-linear"], "base": "vit", "task": "digits", "settings": None}, "cannot be bidirectional"),
    ],
)
def test_what_does_not_go_is_said_before_any_training(given, said, tmp_path):
    given = {"base": "llama", "task": "induction", **FAST, **given}
    with pytest.raises(TransectError, match=said):
        transect.race_parts(given.pop("base"), given.pop("task"), tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
