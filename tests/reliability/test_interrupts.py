"""Ctrl-C, `kill` and a closed terminal: one word, the exit code that shells know, and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.processes import Job, environment
from tests.reliability.test_every_command import place as place

COMPRESS = ["compress", "model", "--method", "svd", "--keep", "0.7", "--out", "out"]
# When a file beside the output is opened a signal comes, and others while what was written is removed again.
INTERRUPTED = """
waiting, again = [{0}], {1}
def listen(event, arguments):
    if waiting and event == "open" and ".out.partial" in str(arguments[0]) and arguments[2] & os.O_CREAT:
        signal.raise_signal(waiting.pop())
    if event == "shutil.rmtree" and ".out.partial" in str(arguments[0]):
        while again:
            signal.raise_signal(again.pop())
sys.addaudithook(listen)
"""
# The first one is swallowed, as libraries do; the second one must still be heard.
SWALLOWED = """
waiting = [signal.SIGINT, signal.SIGINT]
def listen(event, arguments):
    if waiting and event == "open" and ".out.partial" in str(arguments[0]) and arguments[2] & os.O_CREAT:
        first = len(waiting) == 2
        try:
            signal.raise_signal(waiting.pop())
        except KeyboardInterrupt:
            if not first:
                raise
sys.addaudithook(listen)
"""
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
JOBS = {f"{number.name}, then {len(again)} more": Job(COMPRESS, INTERRUPTED.format(int(number), again))
        for number in NUMBERS for again in ([], [2], [2, 2, 15, 1])}  # fmt: skip
JOBS["swallowed"] = Job(COMPRESS, SWALLOWED)
ANOTHER = "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, sys.excepthook is sys.__excepthook__)"


@pytest.fixture(scope="module")
def ended(place, forks):
    jobs = {**JOBS, "another": Job(["--version"], ANOTHER)}
    return {name: forks.run(job, place) for name, job in jobs.items()}


@pytest.mark.parametrize("name", JOBS)
def test_signals_once_and_several_times(name, ended, place):
    number = 2 if name == "swallowed" else signal.Signals[name.partition(",")[0]]
    assert (ended[name].code, ended[name].err.split(), ended[name].out) == (128 + number, ["stopped"], "")
    assert not [path for path in place.iterdir() if "out" in path.name]


def test_another_program_keeps_its_own_way_of_ending(ended):
    """The package takes signals and errors for itself only where it is the command line; here it was imported."""
    assert ended["another"].out.split()[:2] == ["True", "True"]


# Python imports this before anything else; it sends the signal when a module of that name is imported.
CUSTOMIZE = """
import os, signal, sys

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            sys.meta_path.remove(self)
            signal.raise_signal(int(os.environ["SENT"]))

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Sender())
"""


@pytest.mark.parametrize(
    ("sent", "at", "how"),
    [
        (signal.SIGINT, "torch", "module"), (signal.SIGINT, "transformers", "script"),
        (signal.SIGTERM, "torch.nn", "module"),
    ],
)  # fmt: skip
def test_while_the_package_is_imported(sent, at, how, tmp_path):
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "sitecustomize.py").write_text(CUSTOMIZE)
    script = tmp_path / "transect"
    script.write_text("import sys\nfrom transect.cli import main\nsys.exit(main())\n")
    command = [sys.executable, *(["-m", "transect"] if how == "module" else [str(script)]), "methods"]
    base = environment()
    path = os.pathsep.join([str(tmp_path / "custom"), base["PYTHONPATH"]])
    with_signal = {**base, "PYTHONPATH": path, "AT": at, "SENT": str(int(sent))}
    done = subprocess.run(command, env=with_signal, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr, done.stdout) == (128 + sent, "stopped\n", "")
