"""Recorded verdicts: what was changed, or is of something else, is measured again; what is none is one error."""

import dataclasses
import json
import logging

import pytest
import torch

import transect
from transect.checkpoint import save
from transect.claims import Verdict, claims, registry
from transect.claims.records import Record, records_in
from transect.errors import BadData, TransectError

from ..models import VOCABULARY, tiny
from .damage import JUNK
from .runs import DAMAGE, noted

NAME = "fwsvd/below-svd"
DATA = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(5))
FIELDS = [field.name for field in dataclasses.fields(Record)]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Counts how often the claim is measured; (record its verdict, the file, how often)."""
    runs, one = [], claims([NAME])[0]

    def function(context):
        runs.append(context)
        return registry.Result(Verdict.HOLDS, "It does.", [{"loss": 1.5, "keep": 0.5}])

    monkeypatch.setitem(registry._claims, NAME, dataclasses.replace(one, function=function))
    model = tiny("llama")

    def check():
        return transect.check_claims([NAME], model, DATA, DATA, record=tmp_path / "recorded")[0].result

    check()
    (file,) = (tmp_path / "recorded").rglob("*.json")
    return check, file, runs


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_verdict_is_measured_again_and_a_line_says_so(measured, damage, caplog):
    check, file, runs = measured
    before = file.read_bytes()
    damage(file)
    with caplog.at_level(logging.INFO, "transect"):
        check()
    assert len(runs) == 2 and noted(caplog, file)
    assert json.loads(file.read_text())["verdict"] == json.loads(before)["verdict"] == "holds"
    check()
    assert len(runs) == 2


@pytest.mark.parametrize("name", FIELDS)
def test_a_verdict_with_anything_changed_is_measured_again_and_read_or_refused(measured, name):
    check, file, runs = measured
    good, count = file.read_text(), 1
    for junk in (*JUNK[::4], "does not hold", [5], [{"a": [1]}], {"a": float("nan")}):
        entry = {**json.loads(good), name: junk}
        if entry == json.loads(good):
            continue
        file.write_text(json.dumps(entry))
        try:
            (record,) = records_in(file.parent)
            assert isinstance(getattr(record, name), str | list | dict)
        except BadData as error:
            assert str(file) in str(error)
        check()
        count += 1
        assert len(runs) == count, junk


def test_a_model_named_by_the_folder_that_one_is_in(measured, tmp_path, monkeypatch):
    """Of `--model .` a record had no name."""
    save(tiny("llama"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    transect.check_claims([NAME], ".", DATA, DATA, record=tmp_path / "here")
    assert [record.model for record in records_in(tmp_path / "here")] == ["mine"]


def test_a_folder_of_verdicts_that_is_not_there(tmp_path):
    with pytest.raises(TransectError, match="with recorded claims"):
        transect.catalogue(tmp_path / "site", records=tmp_path / "nothing")
    assert not (tmp_path / "site").exists()
