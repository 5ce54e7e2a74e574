"""Folders of comparisons, inspections and repairs: only what is listed as ours is replaced or deleted."""

import shutil
import sys

import pytest

from transect.errors import TransectError
from transect.store import Folder

from .faults import digest
from .runs import OTHER, compare, inspect, recover

pytestmark = pytest.mark.usefixtures("quick")


def test_a_repair_does_not_take_another_folder_for_its_own(tmp_path, run, seen):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(seen, tmp_path / "seen")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "run.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    before = digest(tmp_path)
    for name, message in (
        ("run", "holds a comparison"), ("seen", "holds an inspection"), ("theirs", "not an unfinished repair"),
        ("file", "is a file"),
    ):  # fmt: skip
        with pytest.raises(TransectError, match=message):
            recover(checkpoint=tmp_path / name)
    with pytest.raises(TransectError, match="holds an inspection"):
        compare(tmp_path / "seen", overwrite=True)
    with pytest.raises(TransectError, match="holds a comparison"):
        inspect(tmp_path / "run")
    assert digest(tmp_path) == before


def test_a_comparison_overwrites_what_it_has_written_and_nothing_else(tmp_path, run):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name in ("thesis.txt", "rows/mine.json", "deep/er/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    with pytest.raises(TransectError, match="another model, data or settings"):
        compare(folder, held_out=OTHER)
    assert len(compare(folder, methods=("svd",), held_out=OTHER, overwrite=True)) == 3
    assert {path.name for path in (folder / "rows").iterdir()} == {
        "dense.json", "svd_uniform_0.7.json", "svd_uniform_0.5.json", "mine.json"
    }  # fmt: skip
    assert not list((folder / "factors").glob("svd-llm*"))
    assert all((folder / name).read_text() == "mine" for name in ("thesis.txt", "rows/mine.json", "deep/er/notes.txt"))


@pytest.mark.parametrize("name", ["table.csv", "rows/dense.json", "run.json"])
def test_a_file_of_anothers_in_the_place_of_ours_is_refused_before_any_work(tmp_path, name, monkeypatch):
    folder = Folder(tmp_path / "run", "a comparison")
    folder.take()
    (folder.path / "rows").mkdir()
    (folder.path / name).write_text("mine")
    monkeypatch.setattr("transect.comparison.compare.prepare", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(TransectError, match="was not written by Transect"):
        compare(folder.path, overwrite=True)
    assert (folder.path / name).read_text() == "mine"


def test_an_inspection_lies_among_others_and_replaces_only_its_own(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("index.html", "notes.txt", "data/lazy-neuron.csv"):
        (tmp_path / name).write_text("mine")
    with monkeypatch.context() as patch:
        verb = sys.modules["transect.verbs.inspect"]
        patch.setattr(verb, "specimen_of", lambda *a, **k: pytest.fail("work was done"))
        with pytest.raises(TransectError, match=r"index\.html is there and was not written by Transect"):
            inspect(tmp_path)
    (tmp_path / "index.html").rename(tmp_path / "home.html")
    inspect(tmp_path)
    first = (tmp_path / "index.html").read_text()
    inspect(tmp_path, seed=1)
    assert len(first) > 10_000 and (tmp_path / "index.html").is_file()
    assert all((tmp_path / n).read_text() == "mine" for n in ("home.html", "notes.txt", "data/lazy-neuron.csv"))
