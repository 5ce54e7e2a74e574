"""A full disk, no memory, no files left, a bad path or argument: one line, exit code 1, and nothing half-written.

The limits are real ones of the system, in processes of their own. No output goes where a device is.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import tiny
from tests.processes import Job
from tests.reliability.test_every_command import place as place
from tests.suite import SHORT
from transect.ending import LONGEST, line_of, shortened

DATA = ["--data", "text.txt", "--sequences", "4", "--sequence-length", "16"]
WRITERS = {
    "compress": ["compress", "model", "--method", "svd", "--keep", "0.7"],
    "stream": ["compress", "model", "--method", "svd", "--keep", "0.7", "--stream"],
    "edit": ["edit", "model", "--method", "neuron-clamp", "--neuron-clamp.neurons", "0:1=0"],
    "recover": ["recover", "model", *DATA, "--batch-size", "2"],
    "adapt": ["adapt", "model", "--method", "lora", *DATA, "--batch-size", "2"],
    "convert": ["convert", "model", "--method", "liger", *DATA, "--batch-size", "2"],
    "compare": ["compare", "model", "--methods", "svd", "--keep", "0.7", *DATA, "--eval", "text.txt"],
    "inspect": ["inspect", "model", "--probes", "spectra", *DATA],
    "catalogue": ["catalogue"],
    "diff": ["diff", "model", "model", "--what", "weights", *DATA],
    "memorize": ["memorize", "model", *DATA, "--neighbours", "2", "--blocks", "1"],
    "merge": ["merge", "model", "model", "--method", "average"],
    "search": ["search", "model", "--keep", "0.7", *DATA, "--batch-size", "2", "--neurons", "24,48"],
    "prefer": ["prefer", "model", "--data", "preferences.json"],
    "build": ["build", "llama", "--hidden", "32", "--blocks", "2", "--heads", "4", "--vocabulary", "64"],
    "race": ["race", "model", "--adapt", "lora", *DATA, "--eval", "text.txt", "--rates", "1e-3", "--seeds", "1"],
    "contest": [
        "race",
        "llama",
        "--mixer",
        "pooling",
        "--task",
        "induction",
        "--hidden",
        "16",
        "--blocks",
        "1",
        "--heads",
        "2",
        "--steps",
        "2",
        "--rates",
        "1e-3",
        "--seeds",
        "1",
        "--lengths",
        "none",
    ],
}
WRITERS["study"] = ["study", "organism-questions", "--fine-tuned", "1", "--rank", "1", "--seeds", "1", "--steps", "1",
                    "--asked", "4"]  # fmt: skip
CACHED = ["compress", "model", "--method", "svd-llm", "--keep", "0.7", *DATA]
EVAL = ["eval", "model", "--data", "text.txt"]
NO_ROOM = "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
NO_FILES = "resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))"
NO_MEMORY = """
status = open("/proc/self/status").read()
used = int(next(line for line in status.splitlines() if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20,) * 2)
"""  # enough to open a model and read a text, even where the process has nothing left over from its beginning
ELSEWHERE = "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"
LONG = "x" * 300


def limited() -> dict[str, Job]:
    """Limits of the system, for every command that writes."""
    jobs = {"a cache without room": Job([*CACHED, "--cache", "sums", "--out", "room-cache"], NO_ROOM)}
    for name, words in WRITERS.items():
        jobs[f"{name} without room"] = Job([*words, "--out", f"room-{name}"], NO_ROOM)
        jobs[f"{name} without files"] = Job([*words, "--out", f"files-{name}"], NO_FILES)
    much = ["--data", "long.txt", "--batch-size", "4096", "--sequences", "4096"]
    jobs["eval without memory"] = Job(["eval", "wide", *much], NO_MEMORY)
    way_back = ["compress", "wide", "--method", "kfac-svd", "--keep", "0.7"]  # holds what all blocks have put out
    jobs["compress without memory"] = Job([*way_back, *much, "--out", "memory-compress"], NO_MEMORY)
    jobs["claims without memory"] = Job(
        ["claims", "fwsvd/below-svd", "--model", "wide", "--eval", "long.txt", *much], NO_MEMORY
    )
    return jobs


def narrow() -> dict[str, Job]:
    """Every command that writes, with no more memory than it has when it begins, which is enough for some."""
    no_more = NO_MEMORY.replace("64 * 2**20", "0")
    return {
        f"{name} in what it has": Job([*words, "--out", f"narrow-{name}"], no_more) for name, words in WRITERS.items()
    }


def unwritable() -> dict[str, Job]:
    """Outputs that are no folder, and cannot become one."""
    jobs = {}
    for name, words in WRITERS.items():
        for where in ("text.txt", "text.txt/in", "pipe", "socket", LONG, ""):
            jobs[f"{name} into {where[:20]!r}"] = Job([*words, "--out", where])
    for where in ("pipe", "socket", LONG, "model", "text.txt/in", ""):
        jobs[f"a cache in {where[:20]!r}"] = Job([*CACHED, "--out", "cached", "--cache", where])
    return jobs


def unreadable() -> dict[str, Job]:
    """Inputs that are no file, or never end, or are no longer there."""
    jobs = {"eval elsewhere": Job(EVAL, ELSEWHERE), "architecture in a pipe": Job([*EVAL, "--architecture", "pipe"])}
    for name, words in WRITERS.items():
        jobs[f"{name} elsewhere"] = Job([*words, "--out", "out"], ELSEWHERE)
    for where in ("pipe", "pipe.txt", "/dev/zero", LONG, "\udcff", "", "a\nb", "x" * 5000, "[/b]\x1b[31m"):
        name = repr(where[:20])
        jobs[f"model {name}"] = Job(["eval", where, "--data", "text.txt"])
        jobs[f"data {name}"] = Job(["eval", "model", "--data", where])
        for option in ("facts", "choices", "passages"):
            words = ["inspect", "model", "--probes", "causal-trace", f"--{option}", where, "--out", "report"]
            jobs[f"{option} {name}"] = Job(words)
        jobs[f"build {name}"] = Job(["build", where, "--out", "built"])
        jobs[f"undo {name}"] = Job(["edit", where, "--undo"])
        if where:
            jobs[f"check {name}"] = Job(["check-architecture", where])
            jobs[f"claims {name}"] = Job(["claims", where])
            jobs[f"method {name}"] = Job(["methods", where])
    return jobs


def wrong() -> dict[str, Job]:
    """Values of options; what click refuses is wrong usage, with exit code 2."""
    jobs = {}
    digits = "9" * 10_000
    armor = ["compress", "model", "--method", "armor", *DATA, "--out", "wrong"]
    for value in (digits, "-" + digits, "1e400", "nan", "-1", "x" * 5000, "\udcff", "1.5", ""):
        name = repr(value[:9]) + " " * value.startswith("9")
        for option in ("--batch-size", "--sequences", "--sequence-length", "--seed", "--dtype", "--device"):
            jobs[f"{option} {name}"] = Job([*EVAL, option, value])
        jobs[f"--keep {name}"] = Job([*armor, "--keep", value])
        for option in ("--armor.seed", "--armor.rounds", "--armor.learning-rate"):
            jobs[f"{option} {name}"] = Job([*armor, "--keep", "0.7", option, value])
    for name, value in (("MIXED_PRECISION", "fp8"), ("MIXED_PRECISION", "x"), ("GRADIENT_ACCUMULATION_STEPS", "x")):
        told = f"os.environ['ACCELERATE_{name}'] = {value!r}"
        jobs[f"accelerate's {name} {value}"] = Job([*WRITERS["recover"], "--out", "wrong"], told)
    return jobs


def unheard() -> dict[str, Job]:
    """Standard output that takes nothing."""
    jobs = {}
    for name, words in {"eval": [*EVAL, "--json"], "methods": ["methods"], "help": ["--help"]}.items():
        jobs[f"{name} to a full disk"] = Job(words, out="/dev/full")
    jobs["methods to nobody"] = Job(["methods"], "read, write = os.pipe(); os.close(read); os.dup2(write, 1)")
    jobs["methods without an output"] = Job(["methods"], "os.close(1); sys.stdout = None")
    return jobs


NARROW = narrow()
PLACES = {
    name: job
    for name, job in (unwritable() | unreadable()).items()
    if not SHORT or crc32(ascii(name).encode()) % 2  # half of them, whatever the order
}
JOBS = limited() | PLACES | wrong() | unheard()


@pytest.fixture(scope="module")
def ended(place, forks):
    """How each job ended, by its name, and what has come into the folder meanwhile."""
    for name in ("pipe", "pipe.txt"):
        os.mkfifo(place / name)
    with socket.socket(socket.AF_UNIX) as open_socket:
        here = os.getcwd()
        os.chdir(place)  # a socket's name is short
        open_socket.bind("socket")
        os.chdir(here)
    (place / "long.txt").write_text(" ".join(f"w{i % 50 + 3}" for i in range(50_000)))
    # 400 MB for what its neurons say of that text, whatever room the process has left over from its beginning
    wide = LlamaForCausalLM(LlamaConfig(**{**tiny("llama").config.to_diff_dict(), "intermediate_size": 2048}))
    shutil.copytree(place / "model", place / "wide")
    wide.save_pretrained(place / "wide")
    before = set(os.listdir(place))
    made = {name: forks.run(job, place) for name, job in (JOBS | NARROW).items()}
    return made, set(os.listdir(place)) - before


SILENT = ("methods to nobody", "methods without an output")


@pytest.mark.parametrize("name", [name for name in JOBS if name not in SILENT])
def test_one_line_says_what_cannot_be_done(name, ended):
    end = ended[0][name]
    lines = [line for line in end.err.splitlines() if line.strip()]
    assert end.code in (1, 2), end
    assert not end.out and all(len(line) <= 500 for line in lines), end
    if end.code == 1:
        assert len(lines) == 1 and lines[0].startswith("error: "), end
    else:  # wrong usage
        assert lines[0].startswith("Usage: ") and lines[-1].startswith("Error: ") and len(lines) == 3, end


@pytest.mark.parametrize("name", NARROW)
def test_memory_is_enough_or_one_line_says_that_it_is_not(name, ended):
    end = ended[0][name]
    lines = [line for line in end.err.splitlines() if line.strip()]
    if end.code != 0:
        assert end.code == 1 and len(lines) == 1 and lines[0].startswith("error: ") and "memory" in lines[0], end


@pytest.mark.parametrize(
    ("limit", "words"), [("room", "full|written|cannot be kept"), ("files", "open files"), ("memory", "memory")]
)
def test_the_line_says_which_limit_it_was(limit, words, ended):
    said = {name: end.err for name, end in ended[0].items() if name.endswith(f"without {limit}")}
    assert len(said) > 2
    for name, line in said.items():
        assert re.search(words, line), (name, line)


def test_nobody_who_listens_is_no_error(ended):
    assert all(ended[0][name].err == "" and ended[0][name].code in (0, 1) for name in SILENT)


def test_nothing_half_written_is_left(ended, place):
    left = [str(path.relative_to(place)) for path in place.rglob("*") if re.search(r"\.(partial|previous)-", path.name)]
    assert not left
    resumed = {"room-inspect", "room-diff", "room-catalogue", "files-catalogue", ".room-stream.streaming",
               ".room-recover.recovery", ".room-adapt.adaptation", ".room-convert.conversion",
               ".room-memorize.memory", ".room-search.search", ".room-prefer.preference",
               "room-compare", "room-race", "room-contest", "room-study", "files-study"}  # by the next run  # fmt: skip
    narrow = {name.replace("room", "narrow") for name in resumed}
    finished = {f"narrow-{name}" for name in WRITERS if ended[0][f"{name} in what it has"].code == 0}
    assert ended[1] <= resumed | narrow | finished


def test_the_machine_is_told_from_a_fault_of_ours():
    """What libraries raise where there is no memory or room; a fault keeps its traceback, whatever it came from."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert "memory" in str(line_of(raised.value))
    wrapped = KeyError("x")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device", "model.safetensors")
    for error, said in {
        MemoryError(): "there is not enough memory",
        wrapped: "model.safetensors",
        OSError(errno.EDQUOT, "Disk quota exceeded"): "the disk is full",
        SafetensorError("I/O error: No space left on device (os error 28)"): "the disk is full",
        SafetensorError("Error while deserializing header"): "a safetensors file",
        PermissionError(errno.EACCES, "Permission denied", "there"): "Permission denied: there",
        RecursionError("maximum"): "nested too deeply",
        UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"): "'a\\udcff' holds characters",
        ValueError("embedded null byte"): "NUL",
        ImportError("libtorch.so: failed to map segment from shared object"): "not enough memory",
    }.items():
        assert said in str(line_of(error)), error
    for error in (
        KeyError("x"),
        ValueError("bad"),
        RuntimeError("shape"),
        TypeError(),
        AssertionError("no"),
        OverflowError(),
    ):
        assert line_of(error) is None, error


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=1000) | st.text(min_size=900))
def test_any_message_is_one_line_that_can_be_shown(message):
    line = shortened(message)
    assert len(line) <= LONGEST and line.isprintable()
    assert (
        len(message) > LONGEST
        or not message.isascii()
        or not message.isprintable()
        or line == " ".join(message.split())
    )
