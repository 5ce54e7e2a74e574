"""The command line: what it prints, what it refuses, and how it exits."""

import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path

import click
import pandas as pd
import pytest
from click.testing import CliRunner
from rich.console import Console
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import transect
from transect import cli
from transect.anatomy import Anatomy, architecture
from transect.checkpoint import check_folder, open_model
from transect.cli import main_group
from transect.compression import allocations, methods
from transect.editing import edits
from transect.errors import BadData, TransectError, UnknownArchitecture
from transect.pages import PURPOSES
from transect.parts import parts
from transect.probes import probes
from transect.report.table import cells, markdown_table, rich_table
from transect.studies import studies

from .models import VOCABULARY, tiny
from .processes import Job


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its tokenizer, and two texts."""
    folder = tmp_path_factory.mktemp("cli")
    vocabulary = ["<unk>", "<pad>", *(f"w{i}" for i in range(2, VOCABULARY))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tiny("llama").save_pretrained(folder / "model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    for name, step in (("calibration", 7), ("held_out", 11)):
        text = " ".join(f"w{(i * step + i * i // 5) % 60 + 3}" for i in range(400))
        (folder / f"{name}.txt").write_text(text)
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def run(line, *more):
    """Words of the command line -> the result, which must be a success."""
    result = CliRunner().invoke(main_group, [*line.split(), *map(str, more)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def refused(line, *more, error=TransectError):
    """The message of the error: `error` for one that a user can mend (exit code 1), or click's for usage (2)."""
    with pytest.raises(error) as raised:
        main_group([*line.split(), *map(str, more)], standalone_mode=False)
    return raised.value.format_message() if isinstance(raised.value, click.ClickException) else str(raised.value)


SVD_LLM = "compress model --method svd-llm --data calibration.txt --keep 0.6"


def history(folder):
    return Anatomy(open_model(folder).model).record.history[-1]


def test_compress_writes_a_checkpoint_that_eval_measures(place, tmp_path):
    said = run(SVD_LLM, "--out", tmp_path / "small")
    assert "kept 5" in said.stdout and said.stderr == ""
    check_folder(tmp_path / "small")
    assert open_model(tmp_path / "small").tokenizer("w5 w7")["input_ids"] == [5, 7]
    measured = json.loads(run("eval --data held_out.txt --json", tmp_path / "small").stdout)
    model = transect.compress(open_model(place / "model").model, "svd-llm", 0.6, place / "calibration.txt")
    expected = transect.evaluate(model, place / "held_out.txt")
    for name in ("loss", "perplexity", "accuracy", "tokens", "parameters", "bytes"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-5), name
    table = run("eval --data held_out.txt", tmp_path / "small").stdout
    assert f"{measured['loss']:.4f}" in table and f"{measured['perplexity']:.2f}" in table and "…" not in table
    fewer = json.loads(run("eval model --data held_out.txt --json --sequences 2 --sequence-length 16").stdout)
    assert fewer["tokens"] == 2 * 15


@pytest.mark.parametrize(
    "spelled",
    ["--svd-llm.shrinkage 1e-4", "--svd-llm.shrinkage=1e-4", "--shrinkage 1e-4", "--shrinkage=0.0001"],
)  # fmt: skip
def test_parameters_of_the_method_may_stand_anywhere(spelled, tmp_path):
    words = SVD_LLM.replace("compress model", f"compress {spelled} model")
    outcome = json.loads(run(words, "--json", "--out", tmp_path / "a").stdout)
    assert outcome["out"] == str(tmp_path / "a") and outcome["matrix_bytes"] <= 0.6 * outcome["dense_matrix_bytes"]
    assert outcome["kept"] == outcome["matrix_bytes"] / outcome["dense_matrix_bytes"]
    assert history(tmp_path / "a")["compress"]["settings"] == {"shrinkage": 1e-4}


def test_every_choice_reaches_the_recipe(tmp_path):
    chosen = "--allocation ilp --ilp.trials 2 --ilp.rank-multiple=4 --roles q,up --dtype bfloat16 --device cpu"
    run("compress model --method svd --data calibration.txt --keep 0.5 --sequences 4", *chosen.split(),
        "--out", tmp_path / "a")  # fmt: skip
    noted = history(tmp_path / "a")["compress"]
    assert (
        noted["allocation_settings"] == {"trials": 2, "rank_multiple": 4, "predictions": 500}
        and noted["allocation"] == "ilp"
    )
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert {name.split(".")[-3] for name in names if ".left." in name} <= {"q_proj", "up_proj"}
    run("compress model --method svd-llm --data calibration.txt --keep 0.5 --sequential --refit",
        "--cache", tmp_path / "statistics.safetensors", "--out", tmp_path / "b")  # fmt: skip
    noted = history(tmp_path / "b")["compress"]
    assert noted["sequential"] and noted["refit"]


def test_streaming_gives_the_same_model(tmp_path):
    run(SVD_LLM, "--out", tmp_path / "whole")
    run(SVD_LLM, "--stream", "--out", tmp_path / "streamed")
    losses = [json.loads(run("eval --data held_out.txt --json", tmp_path / name).stdout)["loss"]
              for name in ("whole", "streamed")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for option in ("--refit", "--roles=q", "--cache=x"):
        message = refused(SVD_LLM, "--stream", option, "--out", tmp_path / "other", error=click.UsageError)
        assert f"{option.partition('=')[0]} cannot be combined with --stream" in message


def test_compare_prints_a_table_and_continues(tmp_path, monkeypatch):
    line = "compare --kfac-svd.input-shrinkage 0.2 model --data calibration.txt --eval held_out.txt"
    line += f" --out {tmp_path / 'run'}"
    line += " --methods svd,kfac-svd --keep 0.8,0.5 --allocation uniform,global"
    table = run(line).stdout
    assert "…" not in table and str(tmp_path / "run" / "pareto.png") in table
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["settings"] == {"kfac-svd": {"input_shrinkage": 0.2}}
    monkeypatch.setattr("transect.comparison.worker.Worker.compute", lambda *_: pytest.fail("computed again"))
    rows = json.loads(run(f"{line} --json").stdout)
    assert [(row["method"], row["allocation"], row["keep"]) for row in rows] == [
        ("dense", "-", 1.0),
        *((m, a, k) for m in ("svd", "kfac-svd") for a in ("uniform", "global") for k in (0.8, 0.5)),
    ]
    lines = table.splitlines()
    for written_row in cells(pd.DataFrame(rows))[1]:  # every cell is there in full, whatever the width
        assert any(all(cell in text for cell in written_row) for text in lines), written_row


def test_another_run_in_the_folder_is_refused(tmp_path):
    line = f"compare model --methods svd --keep 0.5 --data calibration.txt --out {tmp_path / 'run'}"
    run(line, "--eval", "held_out.txt")
    assert "another model, data or settings" in refused(line, "--eval", "calibration.txt")
    assert len(json.loads(run(line, "--eval", "calibration.txt", "--overwrite", "--json").stdout)) == 2


def test_methods_are_listed_with_all_that_there_is_to_know():
    every = [*methods(), *allocations(), *probes(), *edits(), *transect.adapters(), *transect.optimizers()]
    every += [*transect.parametrizations(), *transect.penalties(), *transect.layer_rates(), *transect.searchers()]
    every += [*transect.objectives(), *transect.conversions(), *transect.mergings(), *parts(), *studies()]
    listed = run("methods").stdout
    told = json.loads(run("methods --json").stdout)
    described = {entry["name"]: entry for entry in told}
    assert sorted((one["name"], one["family"]) for one in told) == sorted((one.name, one.family) for one in every)
    lines = [line.split()[0] for line in listed.splitlines() if line.startswith("  ")]
    assert sorted(lines) == sorted(entry.name for entry in every)  # a line each, under a heading that says what for
    families = {entry.family for entry in every}
    assert families <= set(PURPOSES) and all(PURPOSES[family] in listed for family in families)
    for entry in every:
        assert f"{entry.summary} [{entry.paper}]" in listed and described[entry.name]["paper"] == entry.paper
        page = run("methods", entry.name).stdout
        assert entry.paper in page and entry.summary in page and "…" not in page
        for parameter in entry.parameters:
            assert parameter.name in page and str(parameter.default) in page and parameter.help.split()[0] in page
    assert "trim=0.125, clip=(0.1, 10.0)" in run("methods kfac-svd").stdout
    assert "out, in" in run("methods fwsvd").stdout and "0 to 1" in run("methods svd-llm").stdout
    assert described["fwsvd"]["parameters"] == [
        {"name": "axis", "default": "out", "type": "str", "choices": ["out", "in"], "range": None,
         "help": described["fwsvd"]["parameters"][0]["help"]}
    ]  # fmt: skip
    assert described["asvd"]["needs"] == ["FeatureNorm(power=1)"] and described["asvd"]["parameters"][0]["range"] == [
        0,
        2,
    ]


@pytest.mark.parametrize("command", ["compress", "compare"])
def test_help_shows_every_method_with_its_paper_parameters_and_defaults(command):
    text = " ".join(run(f"{command} --help").stdout.split())
    for entry in methods():
        assert f"{entry.name} [{entry.paper}]" in text
        for parameter in entry.parameters:
            assert f"--{entry.name}.{parameter.name.replace('_', '-')}" in text
            assert f"[default: {parameter.default}]" in text
    assert "--ilp.rank-multiple" in text
    assert "ilp [openreview:IjIgNPFuCt]" in text


def test_help_and_version():
    assert set(main_group.commands) == {
        "adapt", "build", "compress", "compare", "eval", "race", "methods", "claims", "recover", "inspect", "edit",
        "check-architecture", "search", "prefer", "memorize", "convert", "diff", "catalogue", "merge",
        "study",
    }  # fmt: skip
    for command in main_group.commands:
        assert command in run("--help").stdout and "Usage:" in run(f"{command} -h").stdout
    assert transect.__version__ in run("--version").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method magic", "unknown method 'magic'; known: amp"), ("--allocation best", "unknown allocation 'best'"),
        ("--keep 0", "above 0 and at most 1, got 0"), ("--keep 1.5", "above 0 and at most 1, got 1.5"),
        ("--keep -0.5", "above 0"), ("--keep nan", "above 0"), ("--keep 0.001", "leaves no rank"),
        ("--data empty.txt", "empty.txt is empty"), ("--data binary.txt", "binary.txt is not text"),
        ("--data none.txt", "no file or folder 'none.txt'"), ("--data .", "empty.txt is empty|binary.txt is not text"),
        ("--shrinkage 3", "svd-llm: shrinkage='3' must be of type float from 0 to 1"),
        ("--shrinkage x", "shrinkage='x' must be of type float"), ("--shrinkage nan", "shrinkage='nan'"),
        ("--svd-llm.colour red", "svd-llm has no parameter colour; it has: shrinkage"),
        ("--svd-llm.keep 0.5", "no parameter keep"), ("--tokenizer x", "no parameter tokenizer"),
        ("--uniform.trials 3", "uniform has no parameter trials"), ("--roles x", "roles must be a list.*gate.*got"),
        ("--sequence-length 1000", "context of 64"), ("--batch-size 0", "batch_size must be a whole number from 1"),
        ("--method svd --sequential", "uses no calibration"), ("--method svd --refit", "no refit"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(options, message, tmp_path):
    with pytest.raises(TransectError, match=message):
        main_group([*SVD_LLM.split(), *options.split(), "--out", str(tmp_path / "a")], standalone_mode=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{SVD_LLM} --ilp.trials 3", "parameters for ilp, but only svd-llm, uniform"),
        (f"{SVD_LLM} --shrinkage", "without a value: --shrinkage"), (f"{SVD_LLM} extra", "unexpected extra argument"),
        (f"{SVD_LLM} --dtype float99", "'float99' is not a type"), (f"{SVD_LLM} --dtype int8", "'int8' is not a type"),
        (f"{SVD_LLM} --device warp", "'warp' cannot be used"), (f"{SVD_LLM} --keep much", "not a valid float"),
        (f"{SVD_LLM} --architecture none.json", "does not exist"), (f"{SVD_LLM} -x 3", "No such option"),
        (f"{SVD_LLM} --architecture binary.txt", "not JSON"), (f"{SVD_LLM} --fisher exact", "is not one of"),
        ("compress model --method svd", "--keep"), ("compare model", "--methods"), ("transmute model", "transmute"),
        ("eval model", "--data"), ("eval model --data held_out.txt --keep 0.5", "--keep"),
    ],
)  # fmt: skip
def test_wrong_usage_is_said(line, message, tmp_path):
    out = [] if line.startswith("eval") else ["--out", tmp_path / "a"]
    assert message.lower() in refused(line, *out, error=click.UsageError).lower()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("--methods svd,magic --keep 0.5", TransectError, "unknown method 'magic'"),
        ("--methods svd --keep 0.5 --allocation best", TransectError, "unknown allocation 'best'"),
        ("--methods svd --keep 0.5,2", TransectError, "at most 1"),
        ("--methods svd-llm --keep 0.5 --svd-llm.shrinkage 9", TransectError, "shrinkage='9'"),
        ("--methods svd --keep 0.5 --svd-llm.shrinkage 0.1", click.UsageError, "parameters for svd-llm, but only svd"),
        ("--methods svd-llm --keep 0.5 --shrinkage 0.1", click.UsageError, "--METHOD.PARAMETER"),
        ("--methods svd --keep half", click.UsageError, "'half' is not a comma-separated list of numbers"),
        ("--methods , --keep 0.5", click.UsageError, "at least one"),
        ("--methods svd --keep ,", click.UsageError, "at least one"),
    ],
)  # fmt: skip
def test_compare_checks_everything_first(options, error, message, tmp_path):
    line = f"compare model --data calibration.txt --eval held_out.txt {options}"
    assert message in refused(line, "--out", tmp_path / "run", error=error)
    assert not list(tmp_path.iterdir())


def test_what_the_output_folder_holds_is_kept(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for line in (SVD_LLM, f"{SVD_LLM} --stream"):
        assert "exists and is not empty" in refused(line, "--out", folder)
        assert [path.name for path in tmp_path.rglob("*")] == ["small", "notes.txt"]
    compare = "compare model --methods svd --keep 0.5 --data calibration.txt --eval held_out.txt --overwrite"
    assert "not a comparison" in refused(compare, "--out", folder)
    assert "is a file" in refused(SVD_LLM, "--out", folder / "notes.txt")
    # A run that fails under way leaves what was there, also with --overwrite.
    refused(f"{SVD_LLM} --overwrite --data empty.txt", "--out", folder, error=BadData)
    assert [path.name for path in tmp_path.rglob("*")] == ["small", "notes.txt"]
    run(f"{SVD_LLM} --overwrite", "--out", folder)
    assert (folder / "notes.txt").read_text() == "mine" and open_model(folder)


def test_models_that_are_none(tmp_path):
    assert "held_out.txt is a file" in refused("eval held_out.txt --data held_out.txt")
    assert "no folder" in refused("eval ./nowhere --data held_out.txt")
    (tmp_path / "hollow").mkdir()
    assert "config.json" in refused("eval --data held_out.txt", tmp_path / "hollow")


def test_an_architecture_comes_from_a_file(place, tmp_path, monkeypatch):
    """A model whose type is known to transformers but not to Transect, until a file describes it."""
    monkeypatch.setattr(architecture, "_registered", {})
    known = {name: found for name, found in architecture._built_in().items() if name != "llama"}
    monkeypatch.setattr(architecture, "_built_in", lambda: known)
    with pytest.raises(UnknownArchitecture, match="--architecture FILE"):
        main_group([*SVD_LLM.split(), "--out", str(tmp_path / "a")], standalone_mode=False)
    source = Path(architecture.__file__).parent / "architectures" / "llama.json"
    for number, extra in enumerate(("", "--stream")):
        monkeypatch.setattr(architecture, "_registered", {})
        run(f"{SVD_LLM} {extra}", "--architecture", source, "--out", tmp_path / f"small{number}")
        check_folder(tmp_path / f"small{number}")
    description = {key: value for key, value in json.loads(source.read_text()).items() if key != "blocks"}
    (tmp_path / "partial.json").write_text(json.dumps(description))
    assert "lacks ['blocks']" in refused(SVD_LLM, "--architecture", tmp_path / "partial.json", "--out", tmp_path / "b")
    (tmp_path / "list.json").write_text("[]")
    said = refused(SVD_LLM, "--architecture", tmp_path / "list.json", "--out", tmp_path / "b", error=click.UsageError)
    assert "holds a list" in said


# A comparison that comes to no end after its second row, so that it is stopped under way on any machine.
WAITS = """
import time
from transect.comparison.worker import Worker
computed, seen = Worker.compute, []

def compute(self, row):
    seen.append(row)
    if len(seen) > 2:
        time.sleep(600)
    return computed(self, row)

Worker.compute = compute
"""


def test_exit_codes_and_standard_error(place, tmp_path, forks):
    """0; 1 and one line for what a user can mend; 2 for wrong usage; 130 for Ctrl-C, after which a run continues."""
    compare = f"compare model --methods svd --data calibration.txt --eval held_out.txt --out {tmp_path / 'run'}"
    lines = {
        "eval model --data held_out.txt --json": 0,
        "methods kfac-svd": 0,
        "eval model --data [empty].txt": 1,
        "eval ./no/such/[/model] --data held_out.txt": 1,
        f"{SVD_LLM} --data binary.txt --out {tmp_path / 'a'}": 1,
        f"{SVD_LLM} --data held_out.txt --out /dev/null/a": 1,
        "methods magic": 1,
        "claims magic": 1,
        f"{SVD_LLM} --shrinkage": 2,
        "eval model": 2,
        f"{compare} --keep 0.9,0.8,0.7": 130,
    }  # fmt: skip
    ended = {}
    for line, code in lines.items():
        process = forks.start(Job(line.split(), WAITS if code == 130 else ""), place)
        if code == 130:
            forks.wait_until(process, (tmp_path / "run" / "rows" / "svd_uniform_0.9.json").exists)
            os.kill(process, signal.SIGINT)
        ended[line] = forks.ended()
    assert {line: end.code for line, end in ended.items()} == lines
    for line, code in lines.items():
        out, err = ended[line].out, ended[line].err
        assert "Traceback" not in err, line
        if code == 0:
            assert out and not err, line
        elif code == 1:
            assert err.startswith("error: ") and err.count("\n") == 1 and not out, (line, err)
        elif code == 2:
            assert "Usage:" in err and not out, line
        else:
            assert err.splitlines()[-1] == "stopped" and "error" not in err, line
    first, _, bracket, slash, *_ = ended.values()
    assert "'[empty].txt'" in bracket.err and "[/model]" in slash.err
    assert json.loads(first.out)["tokens"] == 400 - 7  # seven sequences of at most 64
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "rows").iterdir()}
    assert set(finished) == {"dense.json", "svd_uniform_0.9.json"}
    rows = json.loads(run(f"{compare} --keep 0.9,0.8 --json").stdout)
    assert {row["keep"] for row in rows} == {1.0, 0.9, 0.8}
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "rows").iterdir()}
    assert finished.items() <= after.items()


def test_an_interrupt_that_a_library_swallows_is_still_one(monkeypatch, capsys):
    """Ctrl-C inside of torch or safetensors may come out as an error of theirs."""

    def swallow(**options):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape")

    monkeypatch.setattr(cli, "main_group", swallow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and "stopped" in capsys.readouterr().err


def test_a_row_out_of_reach_is_a_dash_with_a_note():
    numbers = {"loss": 3.0, "perplexity": 20.0, "decode_tokens_per_second": 5.0, "bytes": 100}
    frame = pd.DataFrame([
        {"method": "dense", "allocation": "-", "keep": 1.0, "kept": 1.0, **numbers},
        {"method": "wanda", "allocation": "uniform", "keep": 0.7, "kept": 0.6, **numbers},
        {"method": "wanda", "allocation": "uniform", "keep": 0.5, "note": "2:4 needs 0.53"},
    ])  # fmt: skip
    headings, rows = cells(frame)
    assert rows[2][headings.index("loss")] == "-" and rows[1][headings.index("kept")] == "0.600"
    assert markdown_table(frame).endswith("\nwanda at 0.5: 2:4 needs 0.53\n")
    assert "kept" not in cells(frame[:1])[0]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(rich_table(frame))
    assert "wanda at 0.5: 2:4 needs 0.53" in captured.get()


def test_a_failing_probe_is_named_with_exit_code_1_and_the_others_are_there(tmp_path, monkeypatch):
    from transect.probes import registry

    broken = dataclasses.replace(
        registry._probes["nuclear-norm"], function=lambda specimen, **settings: 1 / 0, watches=()
    )
    monkeypatch.setitem(registry._probes, "nuclear-norm", broken)
    line = f"inspect model --probes spectra,nuclear-norm --data held_out.txt --out {tmp_path / 'report'}"
    assert "nuclear-norm failed" in refused(line)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "division by zero" in page and (tmp_path / "report" / "data" / "spectra.json").exists()
