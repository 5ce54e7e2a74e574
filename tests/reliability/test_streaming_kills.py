"""A streamed compression, killed at each of its changes and run again: the tensors that it would have given."""

import contextlib
import errno
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import transect
from transect.checkpoint import check_folder, save
from transect.errors import TransectError
from transect.streaming.workspace import Workspace

from ..models import VOCABULARY, tiny
from ..suite import SHORT, some
from .faults import Failing, Kills, digest

DATA = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(5))
KINDS = {
    "plain": ("svd", {}),
    "statistics": ("svd-llm", {}),
    "sequential": ("svd-llm", {"sequential": True}),
    "sequential, of no data": ("modegpt", {"sequential": True, "allocation": "uniform"}),
    "gradients": ("kfac-svd", {}),
    "gradients, sequential": ("kfac-svd", {"sequential": True, "allocation": "uniform"}),
    "drawn labels": ("kfac-svd", {"fisher": "sampled", "seed": 4}),
    "a ranking": ("svd-llm", {"allocation": "global"}),
    "scores": ("svd-llm", {"allocation": "similarity"}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    save(tiny("llama"), folder)
    return folder


def compress(model, out, kind, **more):
    method, options = KINDS[kind]
    return transect.compress(
        model, method, 0.6, DATA, batch_size=3, stream_to=out, overwrite=True, **options, **more
    )  # fmt: skip


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module", params=KINDS)
def killed(request, model, tmp_path_factory):
    """A kind of run, what a kill at each change leaves, and what the whole run gives."""
    place = tmp_path_factory.mktemp("killed")
    save(tiny("llama", seed=1), place / "root" / "out")  # another model, which the run is to replace
    kills = Kills(place / "root", place / "states")
    with kills.recorded():
        outcome = compress(model, place / "root" / "out", request.param)
    assert os.listdir(place / "root") == ["out"]
    return request.param, kills.states, outcome, tensors(place / "root" / "out"), tensors(kills.states[0] / "out")


def test_killed_at_any_change_and_run_again(killed, model):
    kind, states, outcome, expected, before = killed
    assert len(states) > 50
    for state in some(states, 15 if kind == "gradients, sequential" else 6):
        check_folder(state / "out")
        now = tensors(state / "out")
        assert_same(now, before if set(now) == set(before) else expected)
        assert compress(model, state / "out", kind) == outcome
        assert_same(tensors(state / "out"), expected)
        assert os.listdir(state) == ["out"]


def test_killed_when_the_result_is_in_place_and_run_again_without_overwrite(tmp_path, model):
    """The run is seen to be done, and what it has left goes. Once all has gone, it is refused as any finished run."""
    method, options = KINDS["sequential"]

    def run(out):
        return transect.compress(model, method, 0.6, DATA, batch_size=3, stream_to=out, **options)

    (tmp_path / "root").mkdir()
    kills = Kills(tmp_path / "root", tmp_path / "states")
    with kills.recorded():
        outcome = run(tmp_path / "root" / "out")
    expected = tensors(tmp_path / "root" / "out")
    in_place = [state for state in kills.states if (state / "out").exists()]
    assert len(in_place) > 10
    chosen, refused = some(in_place, 8), 0
    for state in chosen:
        try:
            assert run(state / "out") == outcome
        except TransectError as error:
            assert "exists and is not empty" in str(error)
            refused += 1
        assert_same(tensors(state / "out"), expected)
        assert os.listdir(state) == ["out"]
    assert refused <= len(chosen) / 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("kind", ["sequential", "gradients"])
def test_whichever_change_fails_the_next_run_goes_on(tmp_path, model, kind, error):
    """Every eleventh change, or third eleventh, each in the run that goes on from where the one before had failed."""
    expected_out = tmp_path / "whole"
    expected = compress(model, expected_out, kind)
    n, fired, out = 1, True, tmp_path / "root" / "out"
    save(tiny("llama", seed=1), out)
    before = tensors(out)
    while fired:
        wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else (TransectError, OSError)
        with Failing(tmp_path / "root", n, error) as failing, contextlib.suppress(wanted):
            outcome = compress(model, out, kind)
            assert outcome == expected
        fired = failing.fired
        n += 33 if SHORT else 11
        if fired and set(tensors(out)) == set(before):
            assert_same(tensors(out), before)
    assert_same(tensors(out), tensors(expected_out))
    assert os.listdir(tmp_path / "root") == ["out"] and n > 20


HOWS = ["a bit", "cut", "empty", "another run's", "gone"]


@pytest.mark.parametrize(
    ("kind", "phase"),
    [("gradients, sequential", "backward"), ("sequential", "compressed"), ("a ranking", "compressed")],
)
def test_a_file_that_was_changed_meanwhile_is_not_used(tmp_path, model, kind, phase, caplog):
    """The run starts over, says so, and gives what it would have given. Each file in one of the ways, in turn."""
    expected = compress(model, tmp_path / "whole", kind)
    out, work = tmp_path / "out", tmp_path / ".out.streaming"

    def interrupted(**options):
        with pytest.MonkeyPatch.context() as patch:
            advance = Workspace.advance

            def stopping(self, name, count, **more):
                advance(self, name, count, **more)
                if (name, count) == (phase, 1):
                    raise KeyboardInterrupt

            patch.setattr(Workspace, "advance", stopping)
            with pytest.raises(KeyboardInterrupt):
                compress(model, out, kind, **options)

    interrupted(accumulate=torch.float32)
    others, start = tmp_path / "others", tmp_path / "start"
    shutil.copytree(work, others)
    interrupted()
    shutil.copytree(work, start)
    names = [name for name in sorted(os.listdir(work)) if name != ".transect"]
    assert len(names) > 3
    for number, name in enumerate(names):
        how, file = HOWS[number % len(HOWS)], work / name
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(start, work)
        content = file.read_bytes()
        file.unlink()
        if how == "another run's":
            shutil.copy(others / name, file)
        elif how != "gone":
            middle = len(content) // 2
            changed = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
            file.write_bytes({"a bit": changed, "cut": content[:middle], "empty": b""}[how])
        caplog.clear()
        with caplog.at_level(logging.INFO, "transect"):
            assert compress(model, out, kind) == expected
        assert "starts over" in caplog.text or (name, how) == ("state.json", "gone"), (name, how)
        assert_same(tensors(out), tensors(tmp_path / "whole"))
        shutil.rmtree(out)


def stop(*_):
    raise KeyboardInterrupt


def test_a_folder_of_the_user_s_under_the_name_is_refused_and_stays(tmp_path, model):
    work = tmp_path / ".out.streaming"
    work.mkdir()
    (work / "inputs-00000.safetensors").write_text("mine")
    before = digest(tmp_path)
    with pytest.raises(TransectError, match="something that is not an unfinished compression"):
        compress(model, tmp_path / "out", "plain")
    assert digest(tmp_path) == before


def test_an_unfinished_run_of_another_model_or_recipe_is_not_gone_on_from(tmp_path, model, caplog):
    other = tmp_path / "other"
    save(tiny("llama", seed=3), other)
    expected = compress(model, tmp_path / "whole", "statistics")
    for first in ({"model": other}, {"kind": "plain"}, {"kind": "sequential"}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transect.streaming.compress._finish", stop)
            with pytest.raises(KeyboardInterrupt):
                compress(first.get("model", model), tmp_path / "out", first.get("kind", "statistics"))
        with caplog.at_level(logging.INFO, "transect"):
            assert compress(model, tmp_path / "out", "statistics") == expected
        assert "starts over" in caplog.text
        caplog.clear()
        assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
        shutil.rmtree(tmp_path / "out")
