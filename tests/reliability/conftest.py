"""What several files need made: model folders to damage, and finished runs, each to be copied and not to be changed."""

import pytest

from .damage import copied, good_folders
from .runs import compare, inspect, make_quick


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A plain checkpoint and one with a structure record; not to be changed."""
    return good_folders(tmp_path_factory.mktemp("good"))


@pytest.fixture
def plain(good, tmp_path):
    """A plain checkpoint."""
    return copied(good[0], tmp_path / "p")


@pytest.fixture
def folder(good, tmp_path):
    """A checkpoint with a structure record."""
    return copied(good[1], tmp_path / "m")


@pytest.fixture
def quick(monkeypatch):
    """Comparisons without timing and plots."""
    make_quick(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished comparison; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        folder = tmp_path_factory.mktemp("run") / "run"
        compare(folder)
    return folder


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A finished inspection; not to be changed."""
    folder = tmp_path_factory.mktemp("seen") / "seen"
    inspect(folder)
    return folder
