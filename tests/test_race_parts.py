"""A contest of parts: equal sizes, resuming, what is compared with what, the command, bad input."""

import json
import statistics
import sys

import click
import pytest
import torch
from click.testing import CliRunner

import transect
from transect.cli import main_group
from transect.cli.commands.race_parts import race_parts as command
from transect.contest.parts import flops_of_model, judging, sizes
from transect.contest.parts.race import paired
from transect.contest.parts.speeds import Tensors, crossover, speed_at
from transect.errors import TransectError
from transect.evaluation import parameters
from transect.parts import build_model
from transect.report.parts_contest import parts_table

FAST = dict(
    hidden=32, blocks=1, heads=2, steps=3, batch_size=4, rates=(1e-3, 1e-2), seeds=2, held_out=8, lengths=(),
    settings={"induction": {"length": 12, "vocabulary": 16}},
)  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch):
    """Without the plot, which takes a second; other tests look at it."""
    monkeypatch.setattr(sys.modules["transect.verbs.race_parts"], "parts_plot", lambda *args: None)


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


@pytest.mark.usefixtures("undrawn")
def test_a_training_goes_on_in_its_middle_with_what_was_seen_of_it(tmp_path, monkeypatch):
    options = {**FAST, "seeds": 1, "rates": (1e-2,)}
    whole = transect.race_parts("llama", "induction", tmp_path / "whole", mixer=["pooling"], **options)
    looked, judged = [], judging.judged

    def stop(*args):
        looked.append(args)
        if len(looked) == 3:
            raise KeyboardInterrupt
        return judged(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(judging, "judged", stop)
        transect.race_parts("llama", "induction", tmp_path / "run", mixer=["pooling"], **options)
    again = transect.race_parts("llama", "induction", tmp_path / "run", mixer=["pooling"], **options)
    (curve,) = again.attrs["curves"].values()
    assert again.attrs["curves"] == whole.attrs["curves"] and [point[0] for point in curve] == [1, 2, 3]
    assert again["loss"].tolist() == whole["loss"].tolist()


@pytest.mark.usefixtures("undrawn")
def test_equal_operations_are_equal_within_one_percent(tmp_path):
    wanted = 400_000
    frame = transect.race_parts(
        "llama", "induction", tmp_path / "run", mixer=["base", "gated-linear", "pooling"], flops=wanted,
        **{**FAST, "seeds": 1, "rates": (1e-3,)},
    )  # fmt: skip
    assert (frame["flops"] / wanted - 1).abs().max() <= 0.01 and frame["parameters"].nunique() > 1


def test_sizes_go_in_steps_that_a_part_can_take():
    """GR-KAN's groups of channels divide both widths."""
    given = dict(hidden=64, blocks=2, heads=2, neurons=96, vocabulary=64, length=32)
    for changed, size in (("neurons", 72), ("hidden", 32)):  # so narrow as no number of neurons makes it
        with torch.device("meta"):
            wanted = parameters(build_model("llama", parts={"mlp": "kat"}, **{**given, changed: size}))
        found = sizes.fitted("llama", {"mlp": "kat"}, {"kat": {}}, given, "parameters", wanted, 32)
        assert found == {**given, changed: size}


def test_speeds_are_measured_once_and_lengths_can_be_added(tmp_path):
    options = {**FAST, "seeds": 1, "rates": (1e-3,)}
    out = tmp_path / "run"
    transect.race_parts("llama", "induction", out, mixer=["gated-linear"], **options | {"lengths": (32,)})
    kept = {file.name: file.read_bytes() for file in (out / "speeds").iterdir()}
    frame = transect.race_parts("llama", "induction", out, mixer=["gated-linear"], **options | {"lengths": (64, 32)})
    assert all((out / "speeds" / name).read_bytes() == text for name, text in kept.items()) and len(kept) == 2
    rows = {(row["entrant"], row["length"]): row for row in frame.attrs["speeds"]}
    assert set(rows) == {(name, length) for name in ("gated-linear", "own attention") for length in (32, 64)}
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in rows.values())
    states = [[rows[name, length]["state"] for length in (32, 64)] for name in ("gated-linear", "own attention")]
    assert states[0][0] == states[0][1] and states[1] == [2 * 4 * 16 * 32, 2 * 4 * 48 * 32]  # keys and values
    assert frame["crossover"].notna().all() and "faster from" in (out / "table.md").read_text()
    assert (out / "speeds.csv").read_text().count("\n") == 5


def test_memory_is_what_is_there_at_once():
    model = torch.nn.Linear(8, 8, bias=False)
    with torch.no_grad(), Tensors(model) as seen:
        x = torch.zeros(100, 8)  # 3,200 bytes
        y = model(x).relu_()  # and as many again, in the same place
        view = y[:10].T
        del x
        last = view * 2  # 320 bytes
        assert (seen.now, seen.most) == (3520, 6400)
        del y, view, last
    assert seen.now == 0
    reading = {name: speed_at(lambda length, name=name: build_model(
        "llama", parts={"mixer": name}, hidden=16, blocks=1, heads=2, vocabulary=8, length=length
    ), 1040, "cpu")["memory"] for name in ("softmax", "gated-linear")}  # fmt: skip
    fused = torch.backends.cuda.flash_sdp_enabled()  # not where conftest.py turns it off: then attention has whole maps
    for name in ("softmax", "gated-linear") if fused else ("gated-linear",):
        assert reading[name] < 4 * 1024**2  # not one matrix of 1,024 x 1,024 numbers


def test_the_nearest_size_is_found_in_few_steps():
    for grows in (lambda size: 1000 + 7 * size, lambda size: 5 * size**2 + 100 * size, lambda size: size // 9):
        tried = []

        def count(size, grows=grows, tried=tried):
            tried.append(size)
            return grows(size)

        for wanted in (0, 1777, 20_000, 10**9):
            tried.clear()
            found = sizes._nearest(count, wanted, 1, 4096)
            assert abs(grows(found) - wanted) == min(abs(grows(size) - wanted) for size in range(1, 4097))
            assert len(tried) <= (24 if grows(2) - grows(1) > 100 else 5)


def test_what_would_not_fit_is_left_out_with_a_note(monkeypatch):
    def make(length):
        return build_model("llama", hidden=16, blocks=1, heads=2, vocabulary=8, length=length)

    monkeypatch.setattr("transect.contest.parts.speeds.PROBED", 64)
    monkeypatch.setattr("transect.contest.parts.speeds.MOST_SECONDS", 0.0)
    assert "left out at 128 positions: at 32 a pass takes" in speed_at(make, 128, "cpu")["note"]
    monkeypatch.setattr("transect.contest.parts.speeds.MOST_MEMORY", 0.0)
    assert "too many for the free memory" in speed_at(make, 128, "cpu")["note"]


def test_the_crossover_lies_where_the_lines_cross():
    assert crossover([256, 1024], [1.0, 1.0], [2.0, 3.0]) == 256
    assert crossover([256, 1024], [1.0, 4.0], [0.5, 3.0]) == float("inf")
    assert crossover([256, 1024, 4096], [2.0, 2.0, 2.0], [1.0, 4.0, 64.0]) == pytest.approx(512)
    assert crossover([256, 1024, 4096], [1.0, 8.0, 1.0], [2.0, 4.0, 2.0]) == pytest.approx(2048)  # not for good before


def test_numbers_are_learned_too_and_rules_stand_beside_the_models(tmp_path):
    given = {"icl-regression": {"dimensions": 2, "points": 5}}
    frame = transect.race_parts(
        "llama", "icl-regression", tmp_path / "run", mixer=["base", "pooling"], **{**FAST, "settings": given}
    )
    assert frame["entrant"].tolist()[2:] == ["nothing", "averaging", "least squares", "ridge"]
    assert frame["loss"].notna().all() and "accuracy" not in frame.columns and frame["p"].notna().sum() == 1
    assert set(frame.attrs["by"]) == set(frame["entrant"])
    assert all(list(values) == ["1", "2", "3", "4", "5"] for values in frame.attrs["by"].values())
    losses = frame.set_index("entrant")["loss"]
    styles = [row.style for row in parts_table(frame).rows]
    assert styles.index("bold") == losses[:2].argmin() and styles.count("bold") == 1  # a rule is no winner
    assert losses["ridge"] == pytest.approx(sum(frame.attrs["by"]["ridge"].values()) / 5, rel=1e-5)
    assert "no models, but rules" in (tmp_path / "run" / "table.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_accuracy_by_number_of_keys_and_facts_that_are_known(tmp_path):
    options = {**FAST, "seeds": 1, "rates": (1e-2,)}
    recall = {"settings": {"recall": {"keys": "1,3", "length": 12, "vocabulary": 16}}}
    frame = transect.race_parts("llama", "recall", tmp_path / "recall", mixer=["base"], **options | recall)
    by = frame.attrs["by"]["base"]
    assert set(by) == {"1", "3"} and frame["accuracy"][0] == pytest.approx((by["1"] + 3 * by["3"]) / 4)
    assert f"| base | {by['1']:.4f} | {by['3']:.4f} |" in (tmp_path / "recall" / "table.md").read_text()
    assert (tmp_path / "recall" / "by.csv").read_text().startswith("entrant,1,3\nbase,")
    world = {"settings": {"world": {"entities": 2, "length": 32}}}
    frame = transect.race_parts("llama", "world", tmp_path / "world", mixer=["base"], **options | world)
    assert 0 <= frame["facts"][0] <= 0.1 and "facts" in (tmp_path / "world" / "table.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_text_that_is_written_anew_is_another_contest(tmp_path):
    """With every option of the command but --json, --overwrite and --flops, which goes without --parameters."""
    path, held_out = tmp_path / "text.txt", tmp_path / "held_out.txt"
    path.write_text("one two three four. " * 20)
    held_out.write_text("two one four three. " * 20)
    options = {
        "mixer": "pooling", "mlp": "base", "activation": "base", "matrix": "base", "norm": "base", "block": "base",
        "task": "text", "data": path, "eval": held_out, "out": tmp_path / "run", "parameters": 20_000, "hidden": 32,
        "blocks": 1, "heads": 2, "neurons": 40, "steps": 2, "rates": 0.001, "seeds": 1, "lengths": 32, "held-out": 8,
        "optimizer": "adamw", "workers": 1, "engine": "local", "batch-size": 4, "device": "cpu", "seed": 1,
    }  # fmt: skip
    known = {option.opts[0].removeprefix("--") for option in command.params if isinstance(option, click.Option)}
    assert known - set(options) == {"json", "overwrite", "flops"}
    words = ["race", "llama", "--text.length", "16"]
    words += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(main_group, words)
    assert result.exit_code == 0, result.output[-400:]
    assert "ms to" in result.output and "pooling" in result.output
    path.write_text("five six seven eight. " * 20)
    result = CliRunner().invoke(main_group, words)
    assert result.exit_code == 1 and "holds a run with another" in str(result.exception)


@pytest.mark.usefixtures("undrawn")
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
        ({"mixer": ["base"], "base": "bert"}, "a bert sees the answers"),
        ({"mixer": ["pooling"], "data": "text.txt"}, "makes its own examples, and takes no data"),
        (
            {"mixer": ["pooling"], "task": "text", "data": "a.txt", "settings": {"text": {"data": "b.txt"}}},
            "given twice",
        ),
        ({"mixer": ["pooling"], "lengths": (8,)}, "lengths must be a list.*from 32"),
        ({"mixer": ["gated-linear"], "base": "vit", "task": "digits", "settings": None}, "cannot be bidirectional"),
    ],
)
def test_what_does_not_go_is_said_before_any_training(given, said, tmp_path):
    given = {"base": "llama", "task": "induction", **FAST, **given}
    with pytest.raises(TransectError, match=said):
        transect.race_parts(given.pop("base"), given.pop("task"), tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
