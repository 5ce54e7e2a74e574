"""Command lines as processes of their own, forked from one that has imported everything: a tenth of a second each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import transect


@dataclass(frozen=True)
class Job:
    """A command line. before: Python that its process runs first; out: where its standard output goes, if not a file.

    A process that takes longer than half a minute is ended by the system's alarm, which is signal 14.
    """

    words: Sequence[str]
    before: str = ""
    out: str = ""


@dataclass(frozen=True)
class Ended:
    """How it ended: its exit code, or a signal as a negative number; what it wrote."""

    code: int
    out: str
    err: str


_FORKS = """
import gc, json, os, resource, signal, sys, traceback
import transect.claims, transect.verbs, transect.streaming, transect.recovery, peft
from transect.cli import main
transect.evaluation.speed.BUDGET = 0.01
transect.checkpoint.open_model("model")
folder = sys.argv[1]
gc.freeze()
for number, job in enumerate(json.load(open(f"{folder}/jobs.json"))):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        for descriptor, name in ((1, job["out"] or f"{folder}/{number}.out"), (2, f"{folder}/{number}.err")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), descriptor)
        sys.argv = ["transect", *job["words"]]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        code = 1
        try:
            exec(job["before"])
            main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        os._exit(code)  # Python's own end would look at every object of the libraries
    with open(f"{folder}/codes", "a") as file:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=file)
"""


def environment() -> Mapping[str, str]:
    """Of a process that imports this package, without network and with one thread, so that it can be forked."""
    alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | alone | {"PYTHONPATH": str(Path(transect.__file__).parent.parent)}


def run_all(jobs: Sequence[Job], place: Path, notes: Path) -> list[Ended]:
    """Run the jobs one after another in the folder `place`, where a model lies under `model`."""
    notes.mkdir()
    (notes / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    command = [sys.executable, "-c", _FORKS, str(notes)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=place, timeout=600)
    assert done.returncode == 0, done.stderr
    codes = [int(code) for code in (notes / "codes").read_text().split()]
    said = []
    for number, (job, code) in enumerate(zip(jobs, codes, strict=True)):
        out = "" if job.out else (notes / f"{number}.out").read_text(errors="replace")
        said.append(Ended(code, out, (notes / f"{number}.err").read_text(errors="replace")))
    return said
