"""Commands that write a model, killed at each of their changes of files, and run again: as if nothing had happened.

A command has 20 to 60 of them; some are tried, evenly spread, and all by `make nightly`.
Comparisons, inspections, repairs and streamed compressions, which go on where they stopped, have files of their own.
"""

import contextlib
import errno
import os
import shutil
import signal
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from transect.checkpoint import check_folder, save
from transect.cli import main_group
from transect.errors import TransectError

from ..models import tiny
from ..processes import Job
from ..suite import some
from ..test_checkpoint import tokenizer
from .faults import Failing, Kills

CLAMP = ["--method", "neuron-clamp", "--neurons", "1:3=0,2:7=0"]

MOST = 10  # changes that are tried
OTHER = ["--method", "neuron-clamp", "--neurons", "2:9=0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    save(tiny("llama"), folder, tokenizer())
    return folder


@pytest.fixture(scope="module")
def edited(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("edited") / "m"
    run("edit", model, *CLAMP, "--out", out)
    return out


@pytest.fixture(scope="module")
def twice(edited, tmp_path_factory):
    out = tmp_path_factory.mktemp("twice") / "m"
    run("edit", edited, *OTHER, "--out", out)
    return out


def run(*words):
    result = CliRunner().invoke(main_group, list(map(str, words)), catch_exceptions=False, standalone_mode=False)
    if result.exception:
        raise result.exception


def tensors(folder):
    files = sorted(Path(folder).glob("*.safetensors"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def same(found, expected):
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


CASES = {
    "compress": (None, lambda model, root: ["compress", model, "--method", "svd", "--keep", 0.6, "--out", root / "m"]),
    "compress over another": (
        "model", lambda model, root: ["compress", model, "--method", "svd", "--keep", 0.6, "--out", root / "m",
                                      "--overwrite"]),
    "edit": (None, lambda model, root: ["edit", model, *CLAMP, "--out", root / "m"]),
    "edit over another": ("edited", lambda model, root: ["edit", model, *OTHER, "--out", root / "m", "--overwrite"]),
    "merge over another": (
        "edited", lambda model, root: ["merge", model, model, "--method", "average", "--out", root / "m",
                                       "--overwrite"]),
    "build": (
        None, lambda model, root: ["build", "llama", "--hidden", 16, "--blocks", 1, "--heads", 2, "--mixer", "pooling",
                                   "--tokenizer", model, "--out", root / "m"]),
    "undo in place": ("edited", lambda model, root: ["edit", root / "m", "--undo"]),
    "undo of an older one": (
        "twice", lambda model, root: ["edit", root / "m", "--undo", "neuron-clamp-1", "--out", root / "back"]),
    "edit in its own place": (
        "edited", lambda model, root: ["edit", root / "m", *OTHER, "--name", "two", "--out", root / "m",
                                       "--overwrite"]),
    "undo": ("edited", lambda model, root: ["edit", root / "m", "--undo", "--out", root / "back"]),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request, model, edited, twice):
    """What is there before, the command, and the folder that it writes."""
    before, words = CASES[request.param]
    start = {"model": model, "edited": edited, "twice": twice, None: None}[before]
    return (
        request.param,
        start,
        lambda root: words(model, root),
        "back" if request.param in ("undo", "undo of an older one") else "m",
    )


def prepared(root, start):
    root.mkdir(parents=True)
    if start is not None:
        shutil.copytree(start, root / "m")
        (root / "m" / "notes.txt").write_text("mine")


def test_killed_at_any_change_and_run_again(case, tmp_path):
    """At no moment is there anything but the old model or the new one, and the rerun gives the new one and no more."""
    name, start, words, out = case
    root = tmp_path / "root"
    prepared(root, start)
    old = tensors(root / out)
    kills = Kills(root, tmp_path / "states")
    with kills.recorded():
        run(*words(root))
    new, names = tensors(root / out), sorted(os.listdir(root / out))
    assert len(kills.states) > 5
    for state in some(kills.states, MOST):
        if (state / out).exists():
            check_folder(state / out)
        found = tensors(state / out)
        assert same(found, old) or same(found, new)
        command = words(state)
        if name in ("undo in place", "edit in its own place") and same(found, new):
            continue  # it is done, and cannot be twice
        if "--out" in command and same(found, new) and "--overwrite" not in command:
            command.append("--overwrite")
        run(*command)
        assert same(tensors(state / out), new) and sorted(os.listdir(state / out)) == names
        assert sorted(os.listdir(state)) == sorted(os.listdir(root))
        assert start is None or (state / "m" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_whichever_change_fails_it_is_one_error_and_the_old_or_the_new(case, tmp_path, error):
    _, start, words, out = case
    prepared(tmp_path / "whole", start)
    with Failing(tmp_path / "whole", 10**9, error) as counting:
        run(*words(tmp_path / "whole"))
    count = 10**9 - counting.left
    assert count > 5
    for n in some([*range(1, count + 2)], MOST):
        root = tmp_path / str(n)
        prepared(root, start)
        old = tensors(root / out)
        expected = click.Abort if isinstance(error, KeyboardInterrupt) else (TransectError, OSError)
        with Failing(root, n, error) as failing, contextlib.suppress(expected):
            run(*words(root))
        assert failing.fired == (n <= count)
        found = tensors(root / out)
        if not same(found, old):
            check_folder(root / out)
        assert start is None or (root / "m" / "notes.txt").read_text() == "mine"
        if failing.fired:
            left = [entry for entry in os.listdir(root) if entry.startswith(".")]
            assert not left or not same(found, old)  # it was stopped while it took away the old one


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kills on this system")
def test_a_real_kill_while_a_model_is_exchanged_again_and_again(tmp_path, forks):
    """A process saves two models over one another until it is killed, some times: what is there is one of the two."""
    code = (
        "from transect.checkpoint import save\n"
        "one, two = tiny('llama', seed=1), tiny('llama', seed=2)\n"
        "while True:\n"
        "    save(one, 'm', overwrite=True); save(two, 'm', overwrite=True); print('.', flush=True)\n"
    )
    folder, models = tmp_path / "m", []
    for seed in (1, 2):
        save(tiny("llama", seed=seed), tmp_path / "one of two", overwrite=True)
        models.append(tensors(tmp_path / "one of two"))
    shutil.rmtree(tmp_path / "one of two")
    for rounds in (1, 2):
        process = forks.start(Job(before=code), tmp_path)
        forks.wait_until(process, lambda rounds=rounds: forks.out().count(".") >= rounds)
        os.kill(process, signal.SIGKILL)
        assert forks.ended().code == -signal.SIGKILL
        check_folder(folder)
        assert any(same(tensors(folder), model) for model in models)
    save(tiny("llama", seed=1), folder, overwrite=True)
    assert os.listdir(tmp_path) == ["m"]
