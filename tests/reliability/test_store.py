"""The room that writes and reads back: whole or not at all, ours or nobody's, the right thing or nothing."""

import contextlib
import errno
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import transect.store.exchange as exchange
from transect.errors import BadCheckpoint, TransectError
from transect.store import (
    Folder,
    finish_exchange,
    keep,
    keep_json,
    kept,
    kept_json,
    place_folder,
    read_json,
    replacing,
    temporary,
    write_text,
)

from .faults import Failing, Kills, digest


def dead_process():
    """The number of a process that is no more."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


# files


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_file_is_the_old_or_the_new_whichever_change_fails(tmp_path, error):
    n, fired = 0, True
    while fired:
        n += 1
        path = tmp_path / str(n) / "note.txt"
        path.parent.mkdir()
        path.write_text("old")
        with Failing(tmp_path, n, error) as failing, contextlib.suppress(type(error)):
            write_text(path, "new")
        fired = failing.fired
        assert path.read_text() in (("old", "new") if fired else ("new",))
        write_text(path, "newer")  # and whatever was left is gone with the next writing
        assert os.listdir(path.parent) == ["note.txt"] and path.read_text() == "newer"
    assert n > 2


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path):
    path = tmp_path / "a.txt"
    dead = tmp_path / f".a.txt.partial-{dead_process()}"
    living, others = tmp_path / f".a.txt.partial-{os.getppid()}", tmp_path / f".ba.txt.partial-{dead_process()}"
    mine = tmp_path / ".a.txt.partial-file"
    dead.mkdir()
    (dead / "half").write_text("half")
    for file in (living, others, mine):
        file.write_text("half")
    write_text(path, "whole")
    assert {file.name for file in tmp_path.iterdir()} == {path.name, living.name, others.name, mine.name}


# folders in their place


def whole(folder, text, **others):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("weights", "last"):
        (folder / name).write_text(text)
    for name, other in others.items():
        (folder / name).write_text(other)
    return folder


def ours(name):
    return name in ("weights", "last", "card")


def put(target, text):
    """As a run does it that may have been killed before."""
    if target.is_dir():
        finish_exchange(target, "last")
    new = whole(temporary(target), text)
    place_folder(new, target, ours, "last")
    for entry in target.parent.iterdir():
        if entry == new:
            for file in new.iterdir():
                file.unlink() if not file.is_dir() else None


def state_of(target):
    """What a reader takes it for: None where the last file is not there."""
    if not (target / "last").exists():
        return None
    return (target / "last").read_text() + (target / "weights").read_text() + str((target / "card").exists())


@pytest.fixture(params=["one step", "file by file", "from inside"])
def way(request, tmp_path, monkeypatch):
    """How folders are exchanged: by the system, or by a journal where it cannot or one stands in the folder."""
    if request.param == "file by file":

        def refused(first, second):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(exchange, "_swap", refused)
    return request.param


def test_a_kill_at_any_change_leaves_the_old_or_the_new_folder_and_the_next_run_the_new(tmp_path, way, monkeypatch):
    """Only file by file is there a moment with neither, and then the next run finishes it."""
    root, target = tmp_path / "root", tmp_path / "root" / "m"
    whole(target, "old", card="c", mine="mine")
    (target / "folder").mkdir()
    (target / "folder" / "deep").write_text("mine too")
    if way == "from inside":
        monkeypatch.chdir(target)
    new = whole(temporary(target), "new")
    kills = Kills(root, tmp_path / "states")
    with kills.recorded():
        place_folder(new, target, ours, "last")
    assert state_of(target) == "newnewFalse" and len(kills.states) > 2
    monkeypatch.chdir(tmp_path)
    for state in kills.states:
        seen = state_of(state / "m")
        assert seen in (("oldoldTrue", "newnewFalse") if way == "one step" else ("oldoldTrue", "newnewFalse", None))
        finish_exchange(state / "m", "last")
        assert state_of(state / "m") in (("newnewFalse",) if seen == "newnewFalse" else ("oldoldTrue", "newnewFalse"))
        assert (state / "m" / "mine").read_text() == "mine" and (state / "m/folder/deep").read_text() == "mine too"
        place_folder(whole(state / "next", "more"), state / "m", ours, "last")
        assert state_of(state / "m") == "moremoreFalse" and (state / "m/folder/deep").read_text() == "mine too"
        assert not list((state / "m").glob(".*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_change_that_fails_leaves_the_old_or_the_new_folder(tmp_path, way, error, monkeypatch):
    n, fired = 0, True
    while fired:
        n += 1
        target = whole(tmp_path / str(n) / "m", "old", card="c", mine="mine")
        monkeypatch.chdir(target if way == "from inside" else tmp_path)
        new = whole(temporary(target), "new")
        with Failing(target.parent, n, error) as failing, contextlib.suppress(type(error)):
            place_folder(new, target, ours, "last")
        fired = failing.fired
        monkeypatch.chdir(tmp_path)
        assert state_of(target) in (("oldoldTrue", "newnewFalse") if fired else ("newnewFalse",))
        assert (target / "mine").read_text() == "mine"
    assert n > 2


def test_a_folder_that_is_being_written_is_waited_for(tmp_path):
    target = whole(tmp_path / "m", "old")
    journal = {"process": os.getppid(), "new": ".m.partial-1", "previous": ".m.previous-1", "gone": [], "names": []}
    (target / exchange.JOURNAL).write_text(json.dumps(journal))
    with pytest.raises(TransectError, match="is being written by the process"):
        finish_exchange(target, "last")


@pytest.mark.parametrize(
    "change",
    [{"new": "../m"}, {"new": "/etc"}, {"gone": ["../x"]}, {"names": [".."]}, {"process": ""}, {"gone": 5}, {"new": 1}],
)  # fmt: skip
def test_a_journal_that_leads_out_of_the_folder_is_refused(tmp_path, change):
    target = whole(tmp_path / "m", "old")
    written = {"process": dead_process(), "new": "a", "previous": "b", "gone": [], "names": []} | change
    (target / exchange.JOURNAL).write_text(json.dumps(written))
    before = digest(tmp_path)
    with pytest.raises(TransectError, match="damaged"):
        finish_exchange(target, "last")
    assert digest(tmp_path) == before


# what is read back


def tensors():
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.empty(0, 2)}


def test_kept_tensors_come_back_bit_for_bit_with_their_note(tmp_path):
    path = tmp_path / "x.safetensors"
    keep(path, tensors(), "model 1", {"seconds": 0.1, "what": ["x", None]})
    found = kept(path, "model 1")
    assert found is not None and found.note == {"seconds": 0.1, "what": ["x", None]} and set(found) == set("abc")
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    assert kept(tmp_path / "none", "model 1") is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_byte_of_a_kept_file_can_change_unnoticed(tmp_path_factory, data):
    """A flipped bit, a cut, an added byte: the same numbers, or none."""
    path = tmp_path_factory.mktemp("kept") / "x.safetensors"
    keep(path, tensors(), "model 1", {"n": 1})
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "add", "zero"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[at:]
    elif kind == "zero":
        content[at:] = bytes(len(content) - at)
    else:
        content.insert(at, 32)
    path.write_bytes(bytes(content))
    found = kept(path, "model 1")
    if found is not None:  # a space in the header, say
        assert found.note == {"n": 1}
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items()) and set(found) == set("abc")


@pytest.mark.parametrize("how", ["of another", "no mark", "folder", "empty", "not safetensors"])
def test_what_is_not_it_is_said_and_not_used(tmp_path, how, caplog):
    path = tmp_path / "x.safetensors"
    if how == "of another":
        keep(path, tensors(), "model 2")
    elif how == "no mark":
        save_file(tensors(), path)
    elif how == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "not safetensors": b"\x80\x02}q."}[how])
    with caplog.at_level(logging.INFO, "transect"):
        assert kept(path, "model 1") is None
    assert "is not used, since" in caplog.text and "computed anew" in caplog.text


def test_kept_tensors_are_an_ordinary_file(tmp_path):
    keep(tmp_path / "x.safetensors", tensors(), "model 1")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], tensors()["a"])


@pytest.mark.parametrize(
    "change",
    [lambda v: v | {"loss": 2.0}, lambda v: v | {"more": 1}, lambda v: {k: v[k] for k in v if k != "loss"},
     lambda v: v | {"transect.of": "y"}, lambda v: [v], lambda v: None],
)  # fmt: skip
def test_kept_json_says_what_was_kept_or_nothing(tmp_path, change):
    path = tmp_path / "row.json"
    keep_json(path, {"loss": float("inf"), "name": "é", "list": (1, 2)}, "x")
    assert kept_json(path, "x") == {"loss": float("inf"), "name": "é", "list": [1, 2]}
    assert kept_json(path, "z") is None
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert kept_json(path, "x") is None


# folders of ours


def test_only_what_is_listed_is_deleted(tmp_path):
    folder = Folder(tmp_path / "run", "a run")
    folder.take()
    write_text(folder.file("rows/a.json"), "1")
    write_text(folder.file("table.csv"), "1")
    (folder.path / "rows" / "mine.json").write_text("mine")
    (folder.path / "notes").mkdir()
    assert Folder(folder.path, "a run").is_ours and not Folder(folder.path, "another").is_ours
    folder.clear()
    assert sorted(os.listdir(folder.path)) == ["notes", "rows"] and os.listdir(folder.path / "rows") == ["mine.json"]
    assert not folder.is_ours


def test_a_folder_of_ours_alone_is_gone_when_it_is_cleared(tmp_path):
    folder = Folder(tmp_path / "run", "a run")
    folder.take()
    write_text(folder.file("rows/deep/a.json"), "1")
    folder.clear()
    assert os.listdir(tmp_path) == []


def test_a_folder_of_others_is_not_taken_and_a_file_of_others_not_replaced(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "index.html").write_text("mine")
    folder = Folder(tmp_path / "theirs", "a run")
    with pytest.raises(TransectError, match="something that is not a run"):
        folder.take()
    folder.take(among_others=True)
    with pytest.raises(TransectError, match="was not written by Transect"):
        folder.file("index.html")
    folder.file("data/x")
    with pytest.raises(TransectError, match="holds a run"):
        Folder(folder.path, "another").take(among_others=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(TransectError, match="is a file"):
        Folder(tmp_path / "file", "a run").take()
    assert (folder.path / "index.html").read_text() == "mine"


def test_a_kill_at_any_change_leaves_a_folder_that_is_ours_or_free(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    kills = Kills(root, tmp_path / "states")
    with kills.recorded():
        folder = Folder(root / "run", "a run")
        folder.take()
        write_text(folder.file("rows/a.json"), "1" * 50)
        write_text(folder.file("table.csv"), "2" * 50)
        (folder.path / "mine").write_text("mine")
        folder.clear()
    assert len(kills.states) > 10
    for state in kills.states:
        left = Folder(state / "run", "a run")
        mine = (left.path / "mine").exists()
        assert left.is_ours or left.is_free or mine
        if left.is_ours or left.is_free:
            left.take()
            write_text(left.file("rows/a.json"), "3")
            left.clear()
        assert os.listdir(state / "run") == ["mine"] if mine else not (state / "run").exists()


@pytest.mark.parametrize("name", ["../victim", "/victim", "a/../../victim", "link/victim", "", ".", "\0", 5, None])
def test_a_list_that_leads_out_of_the_folder_deletes_nothing_there(tmp_path, name):
    folder = Folder(tmp_path / "run", "a run")
    folder.take()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder.path / "link").symlink_to(tmp_path)
    if name == "/victim":
        name = str(victim)
    with (folder.path / ".transect").open("a") as stream:
        stream.write("\n" + json.dumps(name))
    folder.clear()
    assert victim.read_text() == "mine"


def test_a_folder_in_a_files_place_is_replaced_only_if_nothing_is_in_it(tmp_path):
    folder = Folder(tmp_path / "run", "a run")
    folder.take()
    for name in ("a/x", "b"):
        write_text(folder.file(name), "1")
        (folder.path / name).unlink()
        (folder.path / name).mkdir()
    write_text(folder.file("a/x"), "2")
    (folder.path / "b" / "mine").write_text("mine")
    with pytest.raises(TransectError, match="a folder with something in it"):
        folder.file("b")
    folder.clear()
    assert os.listdir(folder.path) == ["b"] and (folder.path / "b" / "mine").read_text() == "mine"


def test_nothing_is_written_through_a_link_or_below_a_file(tmp_path):
    folder = Folder(tmp_path / "run", "a run")
    folder.take()
    (tmp_path / "elsewhere").mkdir()
    (folder.path / "rows").symlink_to(tmp_path / "elsewhere")
    (folder.path / "factors").write_text("mine")
    with pytest.raises(TransectError, match="reached through a link"):
        folder.file("rows/a.json")
    with pytest.raises(TransectError, match="is not a folder"):
        folder.file("factors/a")
    assert json.loads((folder.path / ".transect").read_text().split("\n")[0])["kind"] == "a run"
    assert kept(folder.path / "factors" / "a", "x") is None


def test_an_emptied_folder_is_still_ours_and_lists_nothing(tmp_path):
    folder = Folder(tmp_path / "run", "a run")
    folder.take()
    write_text(folder.file("rows/a.json"), "1")
    (folder.path / "mine").write_text("mine")
    assert not folder.is_empty
    folder.empty()
    assert folder.is_ours and folder.is_empty and folder.listed() == set()
    assert sorted(os.listdir(folder.path)) == [".transect", "mine"]


# JSON of others


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}", b"null", b'"x"'],
    ids=["empty", "half", "list", "number", "no utf-8", "deep", "many digits", "null", "text"],
)  # fmt: skip
def test_json_that_is_no_object_is_one_error(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BadCheckpoint) as caught:
        read_json(tmp_path / "x.json")
    assert "x.json" in str(caught.value) and len(str(caught.value)) < 500


def test_a_pipe_or_a_folder_is_no_json(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "nothing"):
        with pytest.raises(BadCheckpoint, match="has no file"):
            read_json(tmp_path / name)


def test_replacing_a_link_replaces_the_link(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with replacing(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "link").read_text() == "new"
