import json
import os

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import transect
from transect.checkpoint import open_model
from transect.cli import main_group
from transect.comparison import worker
from transect.data import Fact
from transect.errors import TransectError
from transect.evaluation import Speed
from transect.pool import on_ray

from .facts import WORDS, ranking
from .models import CONFIGS, VOCABULARY, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))
HELD_OUT = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(6))
SAME = ["method", "allocation", "keep", "kept", "loss", "perplexity", "bytes", "matrix_bytes", "parameters", "tokens"]


def compare(out, model=None, methods=("svd", "svd-llm"), keep=(0.7, 0.5), **options):
    return transect.compare(
        model if model is not None else tiny("llama"), methods, keep, DATA, HELD_OUT, out, **options
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Timing each row for a second would be most of these tests' time."""
    monkeypatch.setattr("transect.evaluation.measure_speed", lambda model: Speed(1.0, 1.0))


def test_the_table_is_what_compressing_one_by_one_gives(tmp_path):
    model = tiny("llama")
    before = logits(model, inputs("llama"))
    frame = compare(tmp_path / "run", model, allocations=("uniform", "global"))
    assert torch.equal(logits(model, inputs("llama")), before)  # the model is dense again
    assert list(frame["method"]) == ["dense"] + ["svd"] * 4 + ["svd-llm"] * 4
    row = frame[(frame.method == "svd-llm") & (frame.keep == 0.5) & (frame.allocation == "global")].iloc[0]
    alone = transect.compress(tiny("llama"), "svd-llm", 0.5, DATA, allocation="global")
    result = transect.evaluate(alone, HELD_OUT)
    assert result["loss"] == pytest.approx(row.loss, abs=1e-5) and result["bytes"] == row.bytes
    assert row.kept <= 0.5 and row.compress_seconds > 0 and row.tokens == 4 * 15
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "table.csv", "table.md", "pareto.png", "statistics.safetensors"} <= files
    assert (tmp_path / "run" / "pareto.png").read_bytes()[:4] == b"\x89PNG"


def test_one_statistics_pass_and_one_factorization_of_each_matrix_a_method(tmp_path, monkeypatch):
    passes, factorized = [], []
    from transect.compression import calibrate, frame

    collect, factorize_matrix = calibrate.collect, frame.factorize_matrix
    monkeypatch.setattr(calibrate, "collect", lambda *a, **k: passes.append(1) or collect(*a, **k))
    monkeypatch.setattr(frame, "factorize_matrix", lambda *a: factorized.append(1) or factorize_matrix(*a))
    compare(
        tmp_path / "run", methods=("svd", "fwsvd", "asvd", "svd-llm", "kfac-svd"), allocations=("uniform", "global")
    )
    assert len(passes) == 1 and len(factorized) == 5 * 21


def test_scores_of_an_allocation_are_computed_once_for_all_methods_and_budgets(tmp_path, monkeypatch):
    from transect.compression.allocation import registry

    scored, scores_of = [], registry.scores_of
    monkeypatch.setattr(registry, "scores_of", lambda name, *rest: scored.append(name) or scores_of(name, *rest))
    frame = compare(tmp_path / "run", methods=("svd", "svd-llm", "amp"), keep=(0.8, 0.7), allocations=("farms",))
    assert scored == ["farms"] and frame["loss"].notna().all()
    for method in ("svd", "amp"):  # one from factors, one on a copy
        alone = transect.compress(tiny("llama"), method, 0.8, DATA, allocation="farms")
        row = frame[(frame.method == method) & (frame.keep == 0.8)].iloc[0]
        assert transect.evaluate(alone, HELD_OUT)["loss"] == pytest.approx(row.loss, abs=1e-5)


def test_budgets_that_pay_for_the_same_sizes_are_measured_once(tmp_path, monkeypatch):
    evaluated, real = [], worker.evaluate
    monkeypatch.setattr(worker, "evaluate", lambda *args: evaluated.append(1) or real(*args))
    frame = compare(tmp_path / "run", methods=("rtn",), keep=(0.9, 0.8, 0.15))
    rounded = frame[frame.method == "rtn"].set_index("keep")
    assert rounded.loc[0.9, SAME[3:]].equals(rounded.loc[0.8, SAME[3:]])
    assert rounded.kept[0.15] < rounded.kept[0.8]
    assert len(evaluated) == 1 + 2  # dense, and two widths
    alone = transect.evaluate(transect.compress(tiny("llama"), "rtn", 0.8, DATA), HELD_OUT)
    assert rounded.loss[0.8] == pytest.approx(alone["loss"], abs=1e-5)


def test_an_interrupted_comparison_goes_on_and_can_be_widened(tmp_path, monkeypatch):
    compute, count = worker.Worker.compute, [0]

    def stop_at_third(self, row):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return compute(self, row)

    monkeypatch.setattr(worker.Worker, "compute", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "run")
    assert len(list((tmp_path / "run" / "rows").iterdir())) == 2
    frame = compare(tmp_path / "run")
    assert count[0] == 3 + 3 and len(frame) == 5
    wider = compare(tmp_path / "run", methods=("svd", "svd-llm", "asvd"), keep=(0.7, 0.5, 0.4))
    assert len(wider) == 10 and count[0] == 6 + 5
    pd.testing.assert_frame_equal(
        frame[SAME], wider[wider.keep.isin([1, 0.7, 0.5]) & (wider.method != "asvd")][SAME].reset_index(drop=True)
    )
    with pytest.raises(TransectError, match="another model, data or settings"):
        compare(tmp_path / "run", model=tiny("llama", seed=3))
    assert len(compare(tmp_path / "run", model=tiny("llama", seed=3), overwrite=True)) == 5


def test_processes_and_ray_give_the_same_table(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    said = [ranking(tiny("llama"), f"w3 w{number} w5")[0] for number in range(8, 40)]
    facts = [Fact("w3 {} w5", f"w{number}", word) for number, word in enumerate(said, 8)]
    asked = {"facts": facts, "tokenizer": WORDS}
    rows = {"methods": ("svd-llm",), "keep": (0.5,), "allocations": ("uniform", "ilp"), **asked}
    rows |= {"settings": {"ilp": {"trials": 2}}}
    half = open_model(folder, dtype="bfloat16")  # other processes open it in the same type
    narrow = compare(tmp_path / "half", half, workers=2, **rows)
    same = [*SAME, "facts"]
    pd.testing.assert_frame_equal(compare(tmp_path / "alone", half, **rows)[same], narrow[same])
    expected = compare(tmp_path / "one", str(folder), **rows)
    assert (narrow["bytes"] <= 0.55 * expected["bytes"]).all()
    assert expected["facts"].between(0.01, 1).all() and expected["facts"].nunique() > 1
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # of a cluster that starts here; beside other tests it would starve
    monkeypatch.setenv("RAY_ADDRESS", "no address")
    with pytest.raises(TransectError, match="ray does not begin, with RAY_ADDRESS='no address'"):
        compare(tmp_path / "nowhere", engine="ray", **rows)
    monkeypatch.setenv("RAY_ADDRESS", "")  # as if it were not set

    class DiesOnce(on_ray._RayWorker):
        def compute(self, rows):
            if rows[0].allocation == "ilp" and not (self.worker.folder / "died").exists():
                (self.worker.folder / "died").touch()
                os._exit(1)
            super().compute(rows)

    monkeypatch.setattr(on_ray, "_RayWorker", DiesOnce)
    spread = compare(tmp_path / "ray", engine="ray", **rows)  # by one actor, and one more; the model comes from memory
    assert (tmp_path / "ray" / "died").exists()  # and the row was tried again, by another actor
    pd.testing.assert_frame_equal(spread[same], expected[same])


def test_everything_is_checked_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("transect.compression.calibrate.collect", lambda *a, **k: pytest.fail("work was done"))
    for options, message in (
        ({"methods": ("svd", "magic")}, "unknown method"), ({"keep": (0.5, 2)}, "at most 1"),
        ({"keep": (0.5, 0.001)}, "leaves no rank"), ({"allocations": ("best",)}, "unknown allocation"),
        ({"settings": {"svd-llm": {"shrinkage": 9}}}, "shrinkage"),
    ):  # fmt: skip
        with pytest.raises(TransectError, match=message):
            compare(tmp_path / "run", **options)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(TransectError, match="not a comparison"):
        compare(other, overwrite=True)
    assert (other / "notes.txt").read_text() == "mine"


def test_encoders_and_vision_models_are_compared(tmp_path):
    images = [inputs("vit", batch=4, seed=seed) for seed in range(2)]
    frame = transect.compare(tiny("vit"), ["svd", "kfac-svd"], [0.6], images, images, tmp_path / "vit")
    assert len(frame) == 3 and frame["accuracy"].between(0, 1).all()
    with pytest.raises(TransectError, match="does not go on with"):
        transect.compare(tiny("vit"), ["svd"], [0.6], images, images, tmp_path / "lengths", lengths=[8])
    labelled = [{"input_ids": DATA, "labels": DATA}]
    frame = transect.compare(tiny("bert"), ["fwsvd"], [0.6], labelled, labelled, tmp_path / "bert")
    assert len(frame) == 2 and json.loads((tmp_path / "bert" / "run.json").read_text())["methods"] == ["fwsvd"]


def test_rows_are_judged_on_further_texts(tmp_path):
    other = torch.randint(3, VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(7))
    plain = compare(tmp_path / "run", methods=("svd",), keep=(0.5,))
    frame = compare(tmp_path / "run", methods=("svd",), keep=(0.5,), also={"novels": other, "held out": HELD_OUT})
    swapped = transect.compare(tiny("llama"), ("svd",), (0.5,), DATA, other, tmp_path / "other")
    for column in ("loss", "standard_error", "over_dense", "over_dense_error"):
        assert frame[column].tolist() == pytest.approx(plain[column].tolist(), nan_ok=True)
        assert frame[f"{column}, novels"].tolist() == pytest.approx(swapped[column].tolist(), nan_ok=True)
        assert frame[f"{column}, held out"].tolist() == pytest.approx(plain[column].tolist(), nan_ok=True)
    assert "| over dense, novels | std. error, novels |" in (tmp_path / "run" / "table.md").read_text()
    both = compare(
        tmp_path / "run", methods=("svd",), keep=(0.5, 0.4), workers=2, also={"novels": other, "held out": HELD_OUT}
    )
    assert both["loss, novels"].iloc[:2].tolist() == frame["loss, novels"].tolist()  # kept, whoever computes the rest
    assert both["loss, novels"].notna().all()


def test_further_texts_from_the_command_line_are_named_by_their_files(tmp_path):
    text = "the cat sat on the mat. " * 400
    for name in ("plays.txt", "letters.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    arguments = ["compare", "organism", "--methods", "svd", "--keep", "0.8", "--data", "organism:calibration",
                 "--sequences", "2", "--eval", "organism:heldout", "--eval-sequences", "2", "--json",
                 "--also", str(tmp_path / "plays.txt"), "--also", str(tmp_path / "letters.txt")]  # fmt: skip
    result = CliRunner().invoke(main_group, [*arguments, "--out", str(tmp_path / "run")], catch_exceptions=False)
    row = json.loads(result.stdout)[1]
    assert row["over_dense, plays"] == row["over_dense, letters"] != row["over_dense"]


def test_finished_models_stand_beside_in_rows_of_their_own(tmp_path, monkeypatch):
    linear, small = tmp_path / "linear", tmp_path / "small"
    transect.convert(tiny("llama"), "liger", DATA, steps=0, window=4).model.save_pretrained(linear)
    transect.compress(tiny("llama"), "svd", 0.5).save_pretrained(small)
    given = dict(methods=("svd",), keep=(0.5,), allocations=("uniform",), beside=[str(linear), small])
    frame = compare(tmp_path / "run", **given)
    assert list(frame["method"]) == ["dense", "linear (liger)", "small (svd)", "svd"]
    dense, converted, finished, made = (row for _, row in frame.iterrows())
    model = open_model(linear).model
    assert converted.loss == pytest.approx(transect.evaluate(model, HELD_OUT)["loss"], abs=1e-5)
    assert converted.over_dense == pytest.approx(converted.loss - dense.loss) and converted.over_dense_error > 0
    assert converted.kept == 1 and pd.isna(converted.keep) and pd.isna(converted.compress_seconds)
    assert finished.kept == pytest.approx(made.kept) and finished.loss == pytest.approx(made.loss, abs=1e-4)
    assert finished.flops == made.flops < dense.flops
    assert converted.cache_bytes < dense.cache_bytes == 2 * 3 * 2 * 8 * 4  # k and v, blocks, heads, their size, float32
    shown = (tmp_path / "run" / "table.md").read_text()
    assert "FLOPs/token" in shown and "perplexity" not in shown
    computed = []
    compute = worker.Worker.compute
    monkeypatch.setattr(worker.Worker, "compute", lambda self, row: computed.append(str(row)) or compute(self, row))
    again = compare(tmp_path / "run", **given)
    pd.testing.assert_frame_equal(again[SAME], frame[SAME])
    assert not computed
    transect.convert(tiny("llama"), "liger", DATA, steps=0, window=8).model.save_pretrained(linear)
    compare(tmp_path / "run", **given)
    assert computed == ["the finished model linear"]
    without = compare(tmp_path / "run", **given | {"beside": ()})
    assert list(without["method"]) == ["dense", "svd"] and len(computed) == 1
    assert "FLOPs/token" not in (tmp_path / "run" / "table.md").read_text()


def test_rows_are_measured_at_lengths_and_earlier_ones_computed_again(tmp_path, monkeypatch):
    linear, computed = tmp_path / "linear", []
    transect.convert(tiny("llama"), "liger", DATA, steps=0, window=4).model.save_pretrained(linear)
    given = dict(methods=("svd-llm", "modegpt"), keep=(0.5, 0.1), allocations=("uniform",), beside=[linear])
    compute = worker.Worker.compute
    monkeypatch.setattr(worker.Worker, "compute", lambda self, row: computed.append(str(row)) or compute(self, row))
    before = compare(tmp_path / "run", **given)
    assert len(computed) == 6
    passes = (tmp_path / "run" / "statistics.safetensors").stat().st_mtime_ns
    frame = compare(tmp_path / "run", lengths=[8, 32, 8], **given)
    assert len(computed) == 12 and passes == (tmp_path / "run" / "statistics.safetensors").stat().st_mtime_ns
    pd.testing.assert_frame_equal(before[SAME], frame[SAME])
    measured = frame[frame.loss.notna()]
    for length in (8, 32):
        assert (measured[[f"{speed} at {length}" for speed in ("prefill", "decode")]] > 0).all(axis=None)
    dense, converted, small = (measured.iloc[at] for at in range(3))
    assert dense["cache_bytes at 32"] == 4 * dense["cache_bytes at 8"] == 32 * dense.cache_bytes
    assert converted["cache_bytes at 32"] == converted["cache_bytes at 8"] < dense["cache_bytes at 32"]
    assert small["decode_flops at 8"] < dense["decode_flops at 8"] < dense["decode_flops at 32"]
    assert small.active_parameters == small["active_parameters at 32"] < dense.active_parameters
    shown = (tmp_path / "run" / "table.md").read_text().split("\n\n")[-1].splitlines()
    assert shown[0].startswith("| prompt | method | keep | read tok/s |") and len(shown) == 2 + 2 * len(measured)
    assert "(x" not in shown[2] and "(x1.00)" in shown[4]
    assert len(compare(tmp_path / "run", lengths=[8, 32], **given)) == 6 and len(computed) == 12
    spread = compare(tmp_path / "spread", workers=2, lengths=[8, 32], **given)
    columns = ["flops at 32", "decode_flops at 32", "cache_bytes at 32", "active_parameters at 32"]
    pd.testing.assert_frame_equal(spread[columns], frame[columns])


def test_lengths_that_cannot_be_measured_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("transect.compression.calibrate.collect", lambda *a, **k: pytest.fail("work was done"))
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    most = tiny("gpt2").config.max_position_embeddings
    for model, options, message in (
        (tiny("gpt2"), {"lengths": [8, most]}, "from 2 to"), (tiny("llama"), {"lengths": [1]}, "lengths"),
        (tiny("llama"), {"lengths": [most], "beside": [tmp_path / "gpt2"]}, "gpt2, which has"),
        (str(tmp_path / "gpt2"), {"lengths": [8], "stream": True}, "lengths cannot be combined with streaming"),
    ):  # fmt: skip
        with pytest.raises(TransectError, match=message):
            compare(tmp_path / "run", model, methods=("svd",), keep=(0.5,), **options)
        assert not (tmp_path / "run").exists()


def test_finished_models_are_found_by_other_processes(tmp_path):
    folder, linear = tmp_path / "model", tmp_path / "linear"
    tiny("llama").save_pretrained(folder)
    transect.convert(tiny("llama"), "liger", DATA, steps=0, window=4).model.save_pretrained(linear)
    given = dict(methods=("svd",), keep=(0.5,), beside=[linear])
    one, two = (compare(tmp_path / f"run{n}", str(folder), workers=n, **given) for n in (1, 2))
    pd.testing.assert_frame_equal(one[SAME], two[SAME])


def test_what_cannot_stand_beside_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("transect.compression.calibrate.collect", lambda *a, **k: pytest.fail("work was done"))
    tiny("bert").save_pretrained(tmp_path / "bert")
    config, auto = CONFIGS["llama"]
    monkeypatch.setitem(CONFIGS, "other", (type(config)(**config.to_dict() | {"vocab_size": 80}), auto))
    tiny("other").save_pretrained(tmp_path / "words")
    for beside, message in (
        (tmp_path / "nothing", "there is no folder"), (tmp_path / "bert", "another task \\(masked\\)"),
        (tmp_path / "words", "80 words in its vocabulary"),
    ):  # fmt: skip
        with pytest.raises(TransectError, match=message):
            compare(tmp_path / "run", beside=[beside])
        assert not (tmp_path / "run").exists()
    with pytest.raises(TransectError, match="cannot be combined with streaming"):
        compare(tmp_path / "run", str(tmp_path / "words"), beside=[tmp_path / "words"], stream=True)
