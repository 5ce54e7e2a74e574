"""The benchmarks run, print their tables, and compute equal factors. Their times are asserted nowhere."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """name -> that benchmark's `main`."""
    monkeypatch.syspath_prepend(FOLDER)
    return lambda name: importlib.import_module(name).main


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("calibration", "Statistics against a plain pass"),
        ("compare", "2 methods at 2 budgets"),
        ("conversion", "Conversions of a Llama of 4 blocks"),
        ("low_rank", "svd at keep 0.5"),
        ("structured", "keep 0.7"),
        ("nuclear_norm", "Spread of 64 states"),
        ("parts", "Mixers of width 32"),
    ],
)
def test_prints_its_table(name: str, heading: str, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(name)(["--quick", *(["--only", "liger,uoe,first"] if name == "conversion" else [])])
    printed = capsys.readouterr().out
    assert printed.startswith(heading)
    assert "met" in printed and "torch" in printed.splitlines()[-1]


@pytest.fixture
def forked(forks: Any) -> Any:
    """Instead of a benchmark's `apart`: in forked processes; fresh ones are tried below."""
    code = "import runpy\nsys.path.insert(0, sys.argv.pop(1))\nrunpy.run_path(sys.argv.pop(1), run_name='__main__')"
    return lambda script, option, arguments: json.loads(
        forks.python(code, FOLDER, script, option, json.dumps(arguments)).splitlines()[-1]
    )


def test_training_beside_trainer(
    benchmark: Any, forked: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = benchmark("training")
    monkeypatch.setattr("training.apart", forked)
    main(["--quick"])
    printed = capsys.readouterr().out
    assert printed.startswith("Training a Llama of hidden 64") and "bit for bit" in printed
    assert "│ met │" in printed  # every tensor of the resumed run equals the other's


def test_peaks_by_depth_are_of_processes_of_their_own(
    benchmark: Any, forked: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = benchmark("streaming")
    monkeypatch.setattr("streaming.apart", forked)
    peaks = main(["--quick"])
    printed = capsys.readouterr().out
    assert printed.startswith("Peak resident memory") and "met" in printed
    assert list(peaks) == ["kfac-svd"] and 1 <= peaks["kfac-svd"] < 2


def test_blocks_of_a_shape_are_compared_in_a_process_of_their_own(benchmark: Any, capsys: Any) -> None:
    peaks = benchmark("memory")(["--quick", "--only", "llama-3-8b"])
    printed = capsys.readouterr().out
    assert printed.startswith("1 blocks of hidden size 64") and "seconds a block" in printed
    assert list(peaks) == ["svd-llm"] and 0.05 < peaks["svd-llm"] < 12


def test_every_operator_is_timed(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = benchmark("operators")(["--quick"])
    assert capsys.readouterr().out.startswith("Time over that of a dense matrix")
    assert len(rows) == 13 and all(value > 0 for row in rows for value in row[2:5])


@pytest.mark.nightly
def test_edits_are_judged_by_what_is_written(
    benchmark: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = benchmark("edits")(["--quick", "--out", str(tmp_path)])
    assert capsys.readouterr().out.startswith("organism: it says ")
    assert [(row["method"], row["facts"], row["edits"]) for row in rows] == [
        ("rome", 1, 1), ("rome", 2, 1), ("memit", 1, 1), ("memit", 2, 1)
    ]  # fmt: skip
    assert all(0 <= row[share] <= 1 for row in rows for share in ("efficacy", "written", "neighbours", "other facts"))
    assert rows[0]["written"] == 1
    (tmp_path / "memit-2.json").unlink()
    again = benchmark("edits")(["--quick", "--out", str(tmp_path)])
    assert again[:3] == rows[:3] and again[3]["written"] == rows[3]["written"]
    with pytest.raises(SystemExit, match="other settings"):
        benchmark("edits")(["--quick", "--seed", "1", "--out", str(tmp_path)])


def test_kfac_factors_equal_those_of_curvlinops(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("curvlinops", reason="curvlinops is absent; the Makefile says how it is installed")
    differences = benchmark("kfac")(["--quick"])
    assert capsys.readouterr().out.startswith("K-FAC factors of a Llama")
    assert len(differences) == 2 and all(difference <= 1e-4 for difference in differences.values())


def test_gptq_equals_that_of_llm_compressor(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llmcompressor", reason="llm-compressor is absent; see benchmarks/gptq_agreement.py")
    differences = benchmark("gptq_agreement")(["--quick"])
    assert "gptq against llm-compressor" in capsys.readouterr().out  # which has warned of the processor before
    assert len(differences) == 16 and all(difference <= 1e-4 for difference in differences)


@pytest.mark.nightly
def test_training_aware_compression_beside_repairs(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = benchmark("training_aware")(["--quick", "--bits", "4", "--keep", ""])
    assert "organism: 2 steps of 8 sequences" in capsys.readouterr().out
    assert {row["row"] for row in rows} == {"ofq", "maestro", "pst", "kfac-svd", "kfac-svd, repaired"}
    assert len(rows) == 5
    (size,) = {row["size"] for row in rows}
    assert all(row["kept"] <= 1.01 * size for row in rows), [(row["row"], row["kept"], size) for row in rows]
    assert [row["loss"] for row in rows] == sorted(row["loss"] for row in rows)
    best = next(row for row in rows if row["row"].endswith("repaired"))
    assert best["over the best repaired"] == 0 == best["±"]


@pytest.mark.nightly
def test_converted_models_beside_compressed_ones_of_their_cost(
    benchmark: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--quick", "--sequence-length", "32", "--out", str(tmp_path)]
    rows = benchmark("same_cost")(words)
    assert "organism: 1 steps of 8 sequences" in capsys.readouterr().out
    names = [row[1] for row in rows]
    loops = "relaxed-recursive, own norms"
    assert names == ["dense", "uoe", "dense2moe", "amp", "modegpt", loops, "llm-drop", "fusegpt"]
    of = dict(zip(names, rows, strict=True))
    assert of["uoe"][3] < 0.8 and of["modegpt"][3] == pytest.approx(of["uoe"][3], abs=0.05)
    assert of["fusegpt"][2] <= of[loops][2] < 1
    assert all("±" in row[5] and "±" in row[6] for row in rows[1:])
    again = benchmark("same_cost")(words)
    assert again == rows
    with pytest.raises(SystemExit, match="other settings"):
        benchmark("same_cost")([*words, "--steps", "2"])


@pytest.mark.nightly
def test_what_diff_predicts(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = benchmark("diff_prediction")(
        ["--quick", "--methods", "svd,modegpt", "--keep", "0.7", "--edits", "kfac-edit"]
    )
    said = capsys.readouterr().out
    assert "organism: what the blocks' changes cost alone" in said and "modegpt at 0.7: fewer than three blocks" in said
    assert [row[:2] for row in rows] == [["svd", 0.7], ["kfac-edit", "-"]]
    for _, _, predicted, measured, divergence, with_divergence, with_loss, _ in rows:
        assert 0 < predicted < 10 and divergence > 0 and measured > 0
        assert -1 <= with_loss <= 1 and with_divergence > 0


def test_multiply_adds_of_a_gram_matrix(benchmark: Any) -> None:
    upper = importlib.import_module("flops").upper
    assert upper(100) == 100 * 100  # one block
    assert upper(256) == 128 * 256 + 128 * 128
    assert upper(1024) == sum(128 * n for n in range(128, 1025, 128))  # 8 blocks


@pytest.mark.nightly
def test_facts_edited_one_after_another(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--after-another", "2", "--methods", "memit", "--heldout-sequences", "2", "--sequences", "16"]
    rows = benchmark("edits")(words)
    assert [row["edits"] for row in rows] == [0, 1, 2] and rows[0]["other facts"] == 1
    assert all(0 <= row["all written"] <= 1 for row in rows[1:])
    assert "memit one after another" in capsys.readouterr().out


def test_tables_of_the_real_model_follow_from_its_file(benchmark: Any, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/smollm2.csv"):
        (tmp_path / name).write_bytes((FOLDER.parent / name).read_bytes())
    benchmark("real_model")([], root=tmp_path)
    for name in ("README.md", "docs/smollm2.csv"):
        assert (tmp_path / name).read_bytes() == (FOLDER.parent / name).read_bytes(), "python benchmarks/real_model.py"
    assert (tmp_path / "docs" / "smollm2.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_takes_the_place_of_older_rows(benchmark: Any, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "rows").mkdir()
    (tmp_path / "README.md").write_bytes((FOLDER.parent / "README.md").read_bytes())
    old = "method,allocation,keep,kept,over_dense,over_dense_error,facts,also_over_dense,prefill_tokens_per_second\n"
    old += "svd,uniform,0.8,0.8,14.0,0.3,0.0,12.0,\nfwsvd,global,0.8,0.7,0.8,0.02,0.24,1.2,\n"
    (tmp_path / "docs" / "smollm2.csv").write_text(old, encoding="utf-8")
    for method, allocation, keep, loss in (("dense", "-", 1.0, 2.6), ("svd", "uniform", 0.8, 3.6)):
        examples = [[10 * loss, 10], [10 * loss, 10]]
        row = {"method": method, "allocation": allocation, "keep": keep, "kept": keep, "loss": loss, "facts": keep,
               "examples": examples, "prefill_tokens_per_second": 900, "decode_tokens_per_second": 30,
               "compress_seconds": 28, "also": {"emma": {"loss": 1 + 2 * loss, "examples": examples}}}  # fmt: skip
        (tmp_path / "rows" / f"{method}.json").write_text(json.dumps(row), encoding="utf-8")
    benchmark("real_model")([str(tmp_path)], root=tmp_path)
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| `svd` | uniform |  | +1.000 ± 0.000, 80 %, +2.00 |  |\n" in readme
    assert "| `fwsvd` | global |  | +0.800 ± 0.020, 24 %, +1.20 (0.700) |  |\n" in readme
    measured = (
        "| `dense` | - | 0 | 100 % | 900 | 30 | 28 |\n| `svd` | uniform | +1.000 ± 0.000 | 80 % | 900 | 30 | 28 |\n"
    )
    assert measured in readme
