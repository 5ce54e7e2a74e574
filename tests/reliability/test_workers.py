"""Processes that compute rows: they end with their parent, and one that is lost costs its row a second try."""

import json
import os
import re
import signal
import time

import pandas as pd
import psutil
import pytest
import torch
from click.testing import CliRunner

import transect
from transect.checkpoint import open_model, save
from transect.cli import main_group
from transect.comparison import Row
from transect.data import Batches
from transect.errors import TransectError
from transect.evaluation import Speed
from transect.pool import Losses, processes
from transect.store import Folder

from ..models import VOCABULARY, tiny
from ..processes import Job
from ..suite import EVERY, SHORT
from ..test_checkpoint import tokenizer

DATA = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(5))

# What every process of the run imports. The first piece of work ends its process as the system does where memory runs
# out, but only once; the second never comes to an end. One process at a time shows it, and each takes seconds to start.
SCRIPT = """
import logging, os, signal, sys, time
from pathlib import Path
import torch
import transect
from transect.pool.processes import run_in_processes

HERE = Path(sys.argv[1])

def die_once():
    if not (HERE / "died").exists():
        (HERE / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)

def wait():
    (HERE / "waiting").touch()
    time.sleep(600)
{own}
if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.modules["{runs}"].run_in_processes = lambda load, groups, workers, *rest: run_in_processes(
        load, groups, 1, *rest
    )
    data = (torch.arange(96) % 60 + 3).view(12, 8)
    {call}
"""
METHODS = """
from transect.compression.registry import slicing

def check(block, keep): pass

@slicing("once", paper="ours", check=check)
def once(block, statistics, keep):
    "Die the first time."
    die_once()

@slicing("endless", paper="ours", check=check)
def endless(block, statistics, keep):
    "Wait."
    wait()
"""
TRIALS = """
from transect.contest.{module} import {worker} as Worker
computed = Worker.compute

def compute(self, trial):
    if "{second}" in str(trial):
        wait()
    if "{first}" in str(trial):
        die_once()
    return computed(self, trial)

Worker.compute = compute
"""
# (`make nightly` tries all of them: a contest of parts spreads its trials as one of adapters does.)
# A command with workers -> its own part of the script, the module that spreads the work, the call, the files of what is
# done when the second piece of work begins, and what is said of the first.
SPREAD = {
    "compare": (
        METHODS, "transect.comparison.compare",
        "transect.compare(str(HERE / 'model'), ['once', 'endless'], [0.5], data, data, HERE / 'run', workers=2)",
        {"rows/dense.json", "rows/once_uniform_0.5.json"}, r"once at 0.5 \(uniform\)",
    ),
    "race": (
        TRIALS.format(module="worker", worker="Worker", first="shira", second="lora"), "transect.contest.trials",
        "transect.race(str(HERE / 'model'), ['shira', 'lora'], data, data, HERE / 'run', workers=2, rates=(1.0,), "
        "seeds=1, shares=(0.2,), batch_size=4, device='cpu')",
        {"trials/base.json", "trials/shira_0.2_0.0003_0.json"}, "shira at 0.2, rate 0.0003, seed 0",
    ),
    "race of parts": (
        TRIALS.format(module="parts.worker", worker="PartsWorker", first="pooling", second="base"),
        "transect.contest.trials",
        "transect.race_parts('llama', 'induction', HERE / 'run', mixer=('pooling', 'base'), workers=2, hidden=16, "
        "blocks=1, heads=2, steps=2, batch_size=4, held_out=8, seeds=1, rates=(1e-3,), lengths=())",
        {"trials/mixer_pooling_0.001_0.json"}, "pooling, rate 0.001, seed 0",
    ),
}  # fmt: skip


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kills on this system")
@pytest.mark.parametrize("which", SPREAD if EVERY else ["compare"] if SHORT else ["compare", "race"])
def test_a_killed_worker_costs_a_second_try_and_a_killed_parent_takes_its_workers_along(which, tmp_path, forks):
    own, runs, call, done, said = SPREAD[which]
    save(tiny("llama"), tmp_path / "model")
    script, place = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT.format(own=own, runs=runs, call=call))
    run_it = f"import runpy\nsys.argv[1:] = [{str(tmp_path)!r}]\nrunpy.run_path({str(script)!r}, run_name='__main__')"
    run = forks.start(Job(before=run_it, seconds=300), tmp_path)
    forks.wait_until(run, lambda: (tmp_path / "waiting").exists() and all((place / name).exists() for name in done))
    children = psutil.Process(run).children(recursive=True)
    os.kill(run, signal.SIGKILL)
    assert forks.ended().code == -signal.SIGKILL
    assert children
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert re.search(rf"{said}: its process was ended by SIGKILL \(out of memory\?\); it is tried again", forks.err())
    folder = next(iter(done)).partition("/")[0]
    assert {f"{folder}/{path.name}" for path in (place / folder).iterdir()} == done
    if which == "compare":  # the method has changed nothing
        losses = [json.loads((place / name).read_text())["loss"] for name in done]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_row_is_tried_twice_and_the_rest_of_its_group_goes_on():
    rows = [Row("svd", "ilp", keep) for keep in (0.7, 0.5, 0.3)]
    losses = Losses()
    assert losses.rest(rows, "was lost") == rows and not losses.why
    assert losses.rest(rows, "was lost") == rows[1:] and list(losses.why) == rows[:1]
    assert losses.rest(rows[2:], "was lost") == rows[2:]  # the second one was finished
    assert losses.rest([], "was lost") == []


@pytest.fixture
def lost(monkeypatch):
    """Rows whose process is lost, twice; the others are computed here."""
    chosen = []

    def run(load, groups, workers, on_row, finished):
        worker, losses = load(), Losses()
        for row in [row for rows in groups for row in rows]:
            if row.keep in chosen:
                assert [losses.rest([row], "was lost") for _ in range(2)] == [[row], []]
            else:
                worker.run([row], on_row)
        return losses.why

    monkeypatch.setattr("transect.comparison.compare.run_in_processes", run)
    monkeypatch.setattr("transect.evaluation.measure_speed", lambda model: Speed(1.0, 1.0))
    return chosen


def compare(out, model=None, **options):
    return transect.compare(model or tiny("llama"), ["svd"], [0.7, 0.5], DATA, DATA, out, roles=("q",), **options)


def test_a_row_that_is_lost_twice_has_a_note_and_is_tried_by_the_next_call(tmp_path, lost):
    lost.append(0.5)
    frame = compare(tmp_path / "run", workers=2)
    assert frame.attrs["lost"] == ["svd at 0.5 (uniform)"] and list(frame["loss"].isna()) == [False, False, True]
    table = pd.read_csv(tmp_path / "run" / "table.csv")
    assert table["note"][2] == "not computed: its process was lost, twice"
    assert "svd at 0.5: not computed" in (tmp_path / "run" / "table.md").read_text()
    written = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert written - {".transect"} <= Folder(tmp_path / "run", "a comparison").listed()  # the model's among them
    assert "dense/model.safetensors" in written
    lost.clear()
    frame = compare(tmp_path / "run", workers=2)
    assert not frame.attrs["lost"] and frame["loss"].notna().all() and "note" not in frame
    lost.append(1.0)
    with pytest.raises(TransectError, match=r"the dense model: not computed: its process was lost, twice\. The rows"):
        compare(tmp_path / "another", workers=2)


def test_the_command_shows_the_table_and_ends_with_an_error(tmp_path, lost):
    save(tiny("llama"), tmp_path / "model", tokenizer())
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 40}" for number in range(400)))
    line = f"compare {tmp_path / 'model'} --methods svd --keep 0.7,0.5 --roles q --workers 2 --sequence-length 8 " \
           f"--data {tmp_path / 'text.txt'} --eval {tmp_path / 'text.txt'} --out {tmp_path / 'run'}"  # fmt: skip
    lost.append(0.5)
    result = CliRunner().invoke(main_group, line.split(), standalone_mode=False)
    assert isinstance(result.exception, TransectError) and "not computed: svd at 0.5" in str(result.exception)
    assert "pareto.png" in result.output and "its process was lost, twice" in result.output
    lost.clear()
    assert CliRunner().invoke(main_group, line.split(), standalone_mode=False).exception is None


def test_processes_that_cannot_load_the_model_are_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_serve", time.sleep)  # which is not given a time, and fails
    # What loads is of this package, which the process that all are forked from imports once.
    with pytest.raises(TransectError, match="ended with exit code 1 while it loaded the model"):
        processes.run_in_processes(Losses, [["a"], ["b"], ["c"]], 2, print, lambda item: False)


def test_other_processes_refuse_another_model_than_the_one_that_is_compared(tmp_path, lost):
    tiny("llama").save_pretrained(tmp_path / "model")
    opened = open_model(tmp_path / "model")
    with torch.no_grad():
        opened.model.model.norm.weight.mul_(2)  # what the folder holds is not compared any more
    with pytest.raises(TransectError, match="holds other weights than the model that is compared"):
        compare(tmp_path / "run", opened, workers=2)


@pytest.mark.parametrize("of", ["calibration", "evaluation"])
def test_other_processes_refuse_other_data_than_the_plans(tmp_path, lost, of, monkeypatch):
    save_of = Batches.save

    def another(self, path):
        save_of(Batches([{"input_ids": DATA.flip(1)}]) if of in path.name else self, path)

    monkeypatch.setattr(Batches, "save", another)
    with pytest.raises(TransectError, match=f"{of}.safetensors does not hold the batches"):
        compare(tmp_path / "run", workers=2)
