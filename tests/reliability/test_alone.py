"""Two runs that write to one place: the second is told so, and goes on once the first is no more."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.processes import Job
from tests.reliability.test_every_command import place as place
from tests.reliability.test_one_line import CACHED, WRITERS
from transect.cli import main_group
from transect.errors import TransectError
from transect.store import alone

# The process stops for good where it would open the first file in its place, and says so by a file of its own.
STOPS = """
import time
def listen(event, arguments):
    if event == "open" and "busy" in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        if not str(arguments[0]).endswith("-lock"):
            os.close(os.open("stopped", os.O_CREAT))
            time.sleep(60)
sys.addaudithook(listen)
"""


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def command(words):
    return CliRunner().invoke(main_group, words, standalone_mode=False)


def locks(folder):
    return [path.name for path in Path(folder).rglob("*") if path.name.endswith("-lock")]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kills on this system")
@pytest.mark.parametrize("name", [*WRITERS, "undo"])
def test_a_second_run_is_refused_until_the_first_is_killed(name, forks, place, monkeypatch):
    """And before it has opened the model."""
    words, out = (["edit", "busy", "--undo"], []) if name == "undo" else (WRITERS[name], ["--out", "busy"])
    if name == "undo":
        assert command([*WRITERS["edit"], "--out", "busy"]).exception is None
    first = forks.start(Job([*words, *out], STOPS), place)
    forks.wait_until(first, Path("stopped").exists)
    there = sorted(Path().rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("transect.checkpoint.open_model", lambda *_, **__: pytest.fail("the model was opened"))
        second = command([*words, *out]).exception
    assert isinstance(second, TransectError)
    said = f"another run (process {first}) is writing to {place / 'busy'}; wait for it, or choose another folder"
    assert str(second) == said and sorted(Path().rglob("*")) == there
    os.kill(first, signal.SIGKILL)
    assert forks.ended().code == -signal.SIGKILL and locks(place) == [".busy.transect-lock"]
    assert command([*words, *out]).exception is None
    assert not locks(place) and not list(Path().glob(".busy*"))
    shutil.rmtree("busy")
    Path("stopped").unlink()


def test_statistics_that_another_run_collects_are_waited_for(forks, place, tmp_path):
    """And not collected again."""
    words = [*CACHED, "--cache", str(tmp_path / "sums")]
    never = "import transect.compression.calibrate as room\nroom.collect = None"
    with alone(tmp_path / "sums"):
        waiting = forks.start(Job([*words, "--out", str(tmp_path / "one")], never), place)
        forks.wait_until(waiting, lambda: f"process {os.getpid()}) is writing to" in forks.err())
        assert command([*words, "--out", str(tmp_path / "two")]).exception is None
    assert forks.ended().code == 0
    assert sorted(os.listdir(tmp_path)) == ["one", "sums", "two"]


def in_another_thread(path):
    """What `alone` raises there, or None."""
    found = []

    def ask():
        try:
            with alone(path):
                found.append(None)
        except TransectError as error:
            found.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


def test_what_is_called_inside_may_ask_again_and_nobody_else(tmp_path):
    folder = tmp_path / "a" / "b" / "c"
    with alone(folder):
        with alone(folder), alone(folder / "in it"):
            pass
        assert f"process {os.getpid()}" in in_another_thread(folder)
        assert in_another_thread(folder.with_name("d")) is None and in_another_thread(folder.parent) is None
        (tmp_path / "link").symlink_to(folder.parent)
        assert in_another_thread(tmp_path / "link" / "c") is not None
    assert in_another_thread(folder) is None
    assert os.listdir(tmp_path) == ["link"]  # what was made for the lock alone is gone
    with pytest.raises(KeyboardInterrupt), alone(folder):
        folder.mkdir(parents=True)
        raise KeyboardInterrupt
    assert folder.exists() and not locks(tmp_path)


def test_where_nothing_can_be_written_beside_it_the_folder_itself_is_locked(tmp_path, monkeypatch):
    opened = os.open

    def refusing(path, *more, **options):
        if str(path).endswith("-lock"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **options)

    monkeypatch.setattr(os, "open", refusing)
    (tmp_path / "a").mkdir()
    with alone(tmp_path / "a"), alone(tmp_path / "not there"):
        assert "another run is writing" in in_another_thread(tmp_path / "a")
    assert in_another_thread(tmp_path / "a") is None and os.listdir(tmp_path) == ["a"]


def test_a_system_without_locks_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("transect.store.lock.fcntl", None)
    with caplog.at_level("INFO"), alone(tmp_path / "a"):
        assert in_another_thread(tmp_path / "a") is None
    assert "are not kept apart" in caplog.text and not os.listdir(tmp_path)
