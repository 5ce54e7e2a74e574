"""What a comparison reads back is of this very run and whole; anything else is computed anew, with a note."""

import dataclasses
import logging
import os
import shutil

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transect.comparison import Plan, Row
from transect.compression.fingerprint import computation_fingerprint
from transect.errors import TransectError

from ..models import tiny
from ..test_compare import SAME
from .runs import DAMAGE, OTHER, a_folder, compare, cut, emptied, noted

pytestmark = pytest.mark.usefixtures("quick")


def of_a_comparison(folder):
    statistics = [folder / "statistics.json", folder / "statistics.safetensors"]
    names = [*(folder / "rows").iterdir(), *(folder / "factors").iterdir(), *statistics]
    assert len(names) == 9
    return names


@pytest.mark.parametrize("which", ["statistics.json", "statistics.safetensors"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_is_damaged_in_a_comparison_is_computed_anew(tmp_path, run, damage, which, caplog):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    names = of_a_comparison(folder)
    names.remove(folder / which)  # without the time that they took, the statistics are computed anew anyway
    for path in names:
        damage(path)
    with caplog.at_level(logging.INFO, "transect"):
        frame = compare(folder)
    pd.testing.assert_frame_equal(frame[SAME], pd.read_csv(run / "table.csv")[SAME])
    assert [path.name for path in names if not noted(caplog, path)] == []
    caplog.clear()
    compare(folder)
    assert "is not used" not in caplog.text


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_one_file_of_a_comparison_may_be_damaged_anywhere(tmp_path_factory, run, data):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(run, folder)
    path = data.draw(st.sampled_from(sorted(of_a_comparison(folder))))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: None if data.draw(st.booleans()) else at]))
    if path.parent.name != "rows":  # so that it is needed
        for row in (folder / "rows").glob("svd*"):
            row.unlink()
    frame = compare(folder)
    pd.testing.assert_frame_equal(frame[SAME], pd.read_csv(run / "table.csv")[SAME])


def test_files_of_another_comparison_are_not_taken_for_this_ones(tmp_path, run, caplog):
    """Another method's factors, another budget's row, another run's everything: whole files, in the wrong place."""
    folder, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(run, folder)
    compare(other, held_out=OTHER, settings={"svd-llm": {"shrinkage": 0.3}})
    shutil.copy(run / "factors" / "svd.safetensors", folder / "factors" / "svd-llm.safetensors")
    shutil.copy(run / "rows" / "svd_uniform_0.7.json", folder / "rows" / "svd_uniform_0.5.json")
    for name in ("rows/svd-llm_uniform_0.5.json", "rows/dense.json", "factors/svd.safetensors", "statistics.json"):
        shutil.copy(other / name, folder / name)
    with caplog.at_level(logging.INFO, "transect"):
        frame = compare(folder)
    pd.testing.assert_frame_equal(frame[SAME], pd.read_csv(run / "table.csv")[SAME])
    assert caplog.text.count("it is of something else") == 6


@pytest.mark.parametrize("damage", [cut, emptied, a_folder, lambda path: path.write_text("[1]"), os.unlink])
def test_a_run_whose_plan_is_damaged_is_another_run(tmp_path, run, damage):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    damage(folder / "run.json")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(TransectError, match="--overwrite"):
        compare(folder)
    frame = compare(folder, overwrite=True)
    pd.testing.assert_frame_equal(frame[SAME], pd.read_csv(run / "table.csv")[SAME])
    assert (folder / "notes.txt").read_text() == "mine"


def test_budgets_that_are_nearly_equal_have_a_row_each(tmp_path):
    frame = compare(tmp_path / "run", methods=("svd",), keep=(0.5, 0.50000001, 0.9))
    assert list(frame.keep) == [1.0, 0.9, 0.50000001, 0.5]
    again = compare(tmp_path / "run", methods=("svd",), keep=(0.5, 0.50000001, 0.9))
    pd.testing.assert_frame_equal(frame, again)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4) | st.text("a_/.%-", min_size=1)
ROWS = st.builds(Row, NAMES, NAMES, st.floats(0, 1)) | st.just(Row(None, "-", 1.0))


@settings(max_examples=200, deadline=None)
@given(ROWS, ROWS)
def test_no_two_rows_lie_in_one_file(one, other):
    assert (one.file == other.file) == (one == other)
    for row in (one, other):
        folder, name = row.file.split("/")
        assert folder == "rows" and name.isascii() and name not in (".", "..")


PLAN = Plan(
    model="m", dtype="float32", device="cpu", architecture={"name": "x"}, weights="w", computation="c",
    methods=("svd", "svd-llm"), allocations=(), keeps=(0.5,), settings={"svd-llm": {"shrinkage": 0.2}},
    calibration="d", evaluation="e", roles=None, fisher="empirical", accumulate="float64", seed=0, sequential=False,
    refit=False,
)  # fmt: skip


def test_a_plan_is_known_by_all_that_decides_numbers_and_by_nothing_else(monkeypatch):
    def of(**changed):
        return dataclasses.replace(PLAN, **changed).fingerprint

    same = [of(model="n"), of(methods=("svd-llm", "svd", "asvd")), of(keeps=(0.5, 0.4)), of(allocations=("global",)),
            of(settings={"svd-llm": {"shrinkage": "0.2"}}),
            of(settings={"svd-llm": {"shrinkage": 0.2}, "svd": {}}), of(facts="h")]  # fmt: skip
    assert set(same) == {PLAN.fingerprint}
    other = [
        of(dtype="bfloat16"), of(device="cuda:1"), of(architecture={"name": "y"}), of(weights="v"), of(computation="b"),
        of(settings={"svd-llm": {"shrinkage": 0.3}}), of(settings={}), of(calibration="f"), of(evaluation="g"),
        of(roles=("q",)), of(fisher="sampled"), of(accumulate="float32"), of(seed=1), of(sequential=True),
        of(refit=True),
    ]  # fmt: skip
    monkeypatch.setattr("transect.comparison.plan.__version__", "0.0.0")
    other.append(of())
    assert len({PLAN.fingerprint, *other}) == 1 + len(other)
    assert of(device="cuda:1") == of(device="cuda:0")
    rows = {dataclasses.replace(PLAN, facts=asked).of_row(PLAN.rows[0]) for asked in ("", "h", "i")}
    assert len(rows) == 3  # a row is asked, or not


def test_a_model_is_known_by_its_buffers_and_its_structure_too():
    class Two(nn.Module):
        def __init__(self, places, config):
            super().__init__()
            self.values = nn.Parameter(torch.ones(3))
            self.register_buffer("places", torch.tensor(places))
            self.register_buffer("cache", torch.rand(2), persistent=False)
            self.config = config

    config = tiny("llama").config
    one, same, other = Two([0, 1, 2], config), Two([0, 1, 2], config), Two([0, 2, 1], config)
    assert computation_fingerprint(one) == computation_fingerprint(same) != computation_fingerprint(other)
