"""Processes of their own, forked from one that has imported everything: a tenth of a second each, not ten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

import transect


@dataclass(frozen=True)
class Job:
    """What a process does: `before`, which is Python, and then a command line, unless there is none.

    words: its arguments. out: where its standard output goes, if not into a file. seconds: after so many it is ended by
    the system's alarm, which is signal 14.
    """

    words: Iterable[str] | None = None
    before: str = ""
    out: str = ""
    seconds: int = 30


@dataclass(frozen=True)
class Ended:
    """How it ended: its exit code, or a signal as a negative number; what it wrote."""

    code: int
    out: str
    err: str


_FORKS = """
import gc, json, os, resource, signal, sys, threading, traceback
import tqdm
gc.disable()  # as in conftest.py
# Bars take turns by a lock that all forks share: one that is killed while it draws would hold up all that follow.
tqdm.tqdm.set_lock(threading.RLock())
exec(sys.argv[1])
gc.collect()
gc.freeze()
gc.enable()
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(job["seconds"])
        os.chdir(job["place"])
        for descriptor, name in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(name, os.O_CREAT | os.O_RDWR), descriptor)
        sys.argv = ["transect", *(job["words"] or [])]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and those under nohup this
        code = 1
        try:
            exec(job["before"], globals())
            if job["words"] is None:
                sys.stdout.flush()
                code = 0
            else:
                main()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)  # Python's own end would look at every object of the libraries
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
WITH_TRANSECT = """
import os, tempfile, torch, types
import pandas, matplotlib.figure, plotly.graph_objects, plotly.offline, sklearn.datasets  # each takes half a second
import transect.claims, transect.verbs, transect.streaming, transect.recovery, peft
import transect.adaptation.adapt, transect.report.conversion
from transect.cli import main
from tests.models import tiny
transect.evaluation.speed.BUDGET = 0.01  # as in conftest.py
os.fsync = os.fstat
torch.cuda.traceback = types.SimpleNamespace(format_stack=list)
with tempfile.TemporaryDirectory() as folder:  # opened once, since much is imported only then
    transect.checkpoint.save(tiny("llama"), folder + "/model")
    transect.checkpoint.open_model(folder + "/model")
"""
# Nothing is computed before the forks, which may have several threads.
WITHOUT_TRANSECT = """
import torch, transformers, tests.models, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
assert "transect" not in sys.modules
"""


class Forks:
    """A process that waits for jobs, and forks itself for each; one at a time.

    first: Python that it runs first, and whose names the jobs have. notes: a folder for its files.
    """

    def __init__(self, first: str, notes: Path, **more: str) -> None:
        self.notes, self.number = notes, 0
        self._said = (notes / "said").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORKS, first], env={**environment(), **more}, cwd=notes, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
        )  # fmt: skip
        assert self._hear() == "ready"

    def start(self, job: Job, place: Path) -> int:
        """Begin the job in the folder `place`; the number of its process. It is to be followed by `ended`."""
        self.number += 1
        out, err = job.out or str(self.notes / f"{self.number}.out"), str(self.notes / f"{self.number}.err")
        words = None if job.words is None else list(job.words)
        asked = {**vars(job), "words": words, "place": str(place), "out": out, "err": err}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._hear())

    def wait_until(self, process: int, happened: Callable[[], bool]) -> None:
        """Wait for something that the job does; it must not end before."""
        while not happened():
            if not psutil.pid_exists(process):
                raise AssertionError(self.ended().err)  # heard, so that the next job is not taken for this one
            time.sleep(0.02)

    def out(self) -> str:
        """What the job has written to its standard output so far."""
        file = self.notes / f"{self.number}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def err(self) -> str:
        """What it has written to its standard error so far."""
        file = self.notes / f"{self.number}.err"
        return file.read_text(errors="replace") if file.exists() else ""

    def ended(self) -> Ended:
        """Wait for the end of the job."""
        return Ended(int(self._hear()), self.out(), self.err())

    def run(self, job: Job, place: Path) -> Ended:
        """A job from its beginning to its end."""
        self.start(job, place)
        return self.ended()

    def python(self, code: str, *arguments: object) -> str:
        """What a program with these arguments prints, which must succeed."""
        before = f"sys.argv[1:] = {list(map(str, arguments))!r}\n{code}"
        done = self.run(Job(before=before, seconds=300), self.notes)
        assert done.code == 0, done.err[-3000:]
        return done.out

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._said.close()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        heard = self._process.stdout.readline().strip()
        assert heard, (self.notes / "said").read_text()
        return heard


def environment() -> Mapping[str, str]:
    """Of a process that imports this package, without network and with one thread, so that it can be forked."""
    alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | alone | {"PYTHONPATH": str(Path(transect.__file__).parent.parent)}
