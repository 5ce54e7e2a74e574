"""The frame of studies, tried on one that is registered here."""

import inspect
import json
from typing import Annotated

import pytest
import torch
from click.testing import CliRunner

import transect
from transect.cli import main_group
from transect.errors import TransectError
from transect.parameters import Range
from transect.probes import Listing, Quantity, Result, Table
from transect.studies import Bench, studies, study_named, studying
from transect.studies.registry import _studies

MADE = []


def draw(result: Result) -> list:
    rows = [[number, float(value)] for number, value in enumerate(result["drawn"])]
    return [Table("Drawn", "Numbers.", ["seed", "value"], rows), Listing("Program", "As written.", "if 1 < 2:\n  ...")]


@pytest.fixture
def drawn_numbers():
    """A study that draws a number a seed."""

    @studying("drawn-numbers", title="Drawn numbers", paper="arXiv:0000.00000", draw=draw, files=("said.txt",))
    def drawn_numbers(bench: Bench, *, count: Annotated[int, Range(1, 9)] = 2, fails: bool = False) -> Result:
        """Numbers are drawn.

        count: how many. fails: whether it does not get to its end.
        """
        values = []
        for number in range(count):

            def make(number: int = number) -> dict[str, torch.Tensor]:
                MADE.append(number)
                return {"x": torch.randn(3, generator=torch.Generator().manual_seed(bench.seed + number))}

            values.append(bench.once(f"number-{number}", make)["x"].sum())
        if fails:
            raise TransectError("no more numbers")
        bench.write("said.txt", f"{count} numbers")
        return Result({"drawn": Quantity(torch.stack(values), ("seed",), "", "sums")}, [f"{count} were drawn."])

    MADE.clear()
    yield
    del _studies["drawn-numbers"]


def test_it_goes_on_where_it_stopped_and_is_made_anew_for_anything_else(drawn_numbers, tmp_path):
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(TransectError, match="no more numbers"):
        transect.study("drawn-numbers", out=out, fails=True)
    plain = transect.study("drawn-numbers")
    assert MADE == [0, 1, 0, 1] and not (out / "index.html").exists()
    first = transect.study("drawn-numbers", out=out)  # of other settings
    assert MADE == [0, 1] * 3 and torch.equal(first["drawn"], plain["drawn"])
    assert (out / "said.txt").read_text() == "2 numbers" and (out / "mine.txt").read_text() == "mine"
    again = transect.study("drawn-numbers", out=out)
    assert len(MADE) == 6 and again.findings == first.findings and torch.equal(first["drawn"], again["drawn"])
    (out / "data/drawn-numbers.safetensors").write_bytes(b"damaged")
    made = out / "made/number-1.safetensors"
    made.write_bytes(made.read_bytes()[:-1] + b"x")
    mended = transect.study("drawn-numbers", out=out)
    assert MADE[6:] == [1] and torch.equal(mended["drawn"], first["drawn"])
    transect.study("drawn-numbers", out=out, seed=1)
    assert MADE[7:] == [0, 1]


def test_the_page_shows_settings_text_and_files(drawn_numbers, tmp_path):
    out = tmp_path / "out"
    said = CliRunner().invoke(main_group, ["study", "drawn-numbers", "--count", "3", "--seed", "5", "--out", str(out)])
    assert said.exit_code == 0 and "drawn-numbers: 3 were drawn." in said.output and "said.txt" in said.output
    page = (out / "index.html").read_text()
    for text in ("<h1>Drawn numbers</h1>", "<dt>count</dt><dd>3</dd>", "<dt>seed</dt><dd>5</dd>", "if 1 &lt; 2:\n  ...",
                 'href="said.txt"', "https://arxiv.org/abs/0000.00000", "3 were drawn."):  # fmt: skip
        assert text in page
    as_json = CliRunner().invoke(
        main_group, ["study", "drawn-numbers", "--drawn-numbers.count", "3", "--seed", "5", "--json", "--out", str(out)]
    )
    assert json.loads(as_json.output)["settings"] == {"count": 3, "fails": False} and MADE == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("magic", {}, "unknown study 'magic'; known: .*drawn-numbers"),
        ("drawn-numbers", {"size": 1}, "drawn-numbers has no parameter size"),
        ("drawn-numbers", {"count": 10}, "count=10 must be of type int from 1 to 9"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(drawn_numbers, tmp_path, name, settings, message):
    with pytest.raises(TransectError, match=message):
        transect.study(name, out=tmp_path / "out", **settings)
    assert not MADE and not (tmp_path / "out").exists()


def test_a_folder_of_somebody_elses(drawn_numbers, tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(TransectError, match="was not written by Transect as part of a study"):
        transect.study("drawn-numbers", out=tmp_path)
    assert not MADE and (tmp_path / "index.html").read_text() == "mine"


def test_all_are_listed_with_what_they_need():
    for one in studies():
        assert study_named(one.name) is one and one.summary and one.draw is not None
        assert all(parameter.help for parameter in one.parameters), one.name
        assert not {parameter.name for parameter in one.parameters} & set(inspect.signature(transect.study).parameters)
