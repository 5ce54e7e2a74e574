"""The catalogue: a page for everything that is registered, whose links lead somewhere, and which says what is so."""

import html.parser
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import transect
from transect.claims import Verdict, claims
from transect.claims.records import Record, records_in, write_record
from transect.errors import TransectError
from transect.pages import COMMANDS, PURPOSES, entries
from transect.pages.verdicts import table_by_purpose, verdicts_document, with_table
from transect.store import Folder


class Page(html.parser.HTMLParser):
    """Links, the text, and whether every element is closed in its turn."""

    VOID = {"meta", "link", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.said = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name == "href"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site with two records of one claim, of different dates."""
    folder = tmp_path_factory.mktemp("site")
    one = claims(["fwsvd/below-svd"])[0]
    old = Record(one.name, one.method, one.paper, one.statement, "organism", "holds", "It was so.", [{"loss": 1.23456}],
                 {}, "0.1", "2999-01-01T00:00:00+00:00", "a machine")  # fmt: skip
    new = replace(old, verdict="does not hold", explanation="It is <not> so.", date="2999-02-01T00:00:00+00:00")
    recorded = Folder(folder / "records", "recorded claims")
    recorded.take()
    for number, record in enumerate((old, new)):
        write_record(recorded, replace(record, claim=record.claim))
        (folder / "records" / record.file).rename(folder / "records" / f"{number}.json")
    transect.catalogue(folder / "site", records=folder / "records")
    return folder / "site"


def test_every_entry_has_a_page_and_every_link_a_target(site):
    found = {path.name: Page(path.read_text()) for path in site.glob("*.html")}
    wanted = {f"{entry.family}-{entry.name}.html" for entry in entries()} | {"index.html"}
    assert set(found) == wanted
    for name, page in found.items():
        for link in page.links:
            assert link in found or link.startswith(("https://arxiv.org/abs/", "data:")), (name, link)
    assert {entry.family for entry in entries()} <= set(PURPOSES) & set(COMMANDS)
    index = set(found["index.html"].links)
    assert wanted - {"index.html"} <= index


def test_a_page_says_what_is_registered(site):
    for entry in entries():
        page = Page((site / f"{entry.family}-{entry.name}.html").read_text())
        said = " ".join("".join(page.said).split())
        assert entry.summary.replace("`", "") in said and entry.paper in said
        for parameter in entry.parameters:
            assert parameter.name in said and str(parameter.default) in said
        for one in claims():
            assert one.method != entry.name or " ".join(one.statement.split()).replace("`", "") in said
        assert "NAME" not in COMMANDS[entry.family].replace("NAME", entry.name) and entry.name in said


def test_the_newest_verdict_is_shown_and_nothing_else_is_markup(site):
    page = (site / "factorization-fwsvd.html").read_text()
    assert "organism: does not hold" in page and "It is &lt;not&gt; so." in page and "It was so." not in page
    assert "1.235" in page and "2999-02-01" in page
    assert "http" not in re.sub(r"https://arxiv\.org/abs/", "", page)  # nothing is fetched


def test_the_search_knows_every_page(site):
    index = (site / "index.html").read_text()
    searched = json.loads(re.search(r'id="searched">(.*?)</script>', index, re.S)[1])
    assert len(searched) == len(entries()) and all((site / one["file"]).exists() for one in searched)
    assert any("2207.00112" in one["words"] and "fwsvd" in one["words"] for one in searched)


def test_a_folder_of_somebody_else_s_and_damaged_records_are_refused(tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(TransectError, match=r"index\.html"):
        transect.catalogue(tmp_path)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "one.json").write_text('{"claim": 1}')
    with pytest.raises(TransectError, match="is no recorded claim"):
        transect.catalogue(tmp_path / "site", records=tmp_path / "records")


def test_the_shipped_verdicts_are_of_claims_as_they_stand_and_the_document_is_made_from_them():
    shipped, known = records_in(), {one.name: one for one in claims()}
    assert shipped
    for record in shipped:
        claim = known[record.claim]
        assert (record.method, record.paper, record.statement) == (claim.method, claim.paper, claim.statement)
        assert record.result.verdict != Verdict.FAILED and record.settings["seed"] == 0
    here = Path(__file__).parent.parent
    written, readme = ((here / name).read_text(encoding="utf-8") for name in ("docs/claims.md", "README.md"))
    assert written == verdicts_document(shipped)  # else: python -m transect.pages.verdicts docs/claims.md README.md
    assert readme == with_table(readme, shipped)


def test_the_document_has_a_row_a_claim_and_a_column_a_model():
    record = Record("a/b", "a", "arXiv:1", "One | two\nlines.", "organism", "holds", "It | is.", settings={"seed": 0})
    other = replace(record, model="another", verdict="does not hold", explanation="It is not.")
    alone = replace(record, claim="c/d", method="c", model="another")
    lines = verdicts_document([other, alone, record]).splitlines()
    first, second = lines.index("## a"), lines.index("## c")
    assert lines[first + 2] == "| claim | on `organism` | on `another` |"
    assert lines[first + 4] == (
        "| `a/b`: One \\| two lines. (arXiv:1) | **holds**: It \\| is. | **does not hold**: It is not. |"
    )
    assert lines[second + 2] == "| claim | on `another` |" and lines[second + 4].startswith("| `c/d`: ")
    assert "| `organism` | 1 | 0 | 0 |" in lines and "| `another` | 1 | 1 | 0 |" in lines


def test_the_table_counts_what_holds_by_purpose_and_stands_between_its_marks():
    records = [
        Record(claim, claim.partition("/")[0], "arXiv:1", "", model, verdict, "", settings={"seed": 0})
        for claim, model, verdict in [
            ("rome/a", "organism", "holds"), ("rome/b", "organism", "does not hold"), ("rome/c", "organism", "failed"),
            ("lac/a", "organism", "holds"), ("lac/b", "organism", "not applicable"), ("rome/b", "other", "holds"),
            ("rome/a", "other", "does not hold"), ("layer-norm/a", "organism", "does not hold"),
        ]
    ]  # fmt: skip
    lines = table_by_purpose([record for record in records if record.model == "organism"]).splitlines()
    assert lines[0] == "| to | claims that hold | of each |"
    assert lines[2:] == [
        "| Look inside (inspect) | 1 of 1 | `lac` 1 of 1 |",
        "| Change what it knows or does (edit) | 1 of 2 | `rome` 1 of 2 |",
        "| Know what is behind it | 0 of 1 | `layer-norm` 0 of 1 |",
    ]
    lines = table_by_purpose(records).splitlines()
    assert lines[0] == "| to | claims that hold | on `other` | of each |"
    assert lines[2:] == [
        "| Look inside (inspect) | 1 of 1 | - | `lac` 1 of 1 |",
        "| Change what it knows or does (edit) | 1 of 2 | 1 of 2 | `rome` 1 of 2 and 1 of 2 |",
        "| Know what is behind it | 0 of 1 | - | `layer-norm` 0 of 1 |",
        "",
        "Hold on `organism` and not on `other`: `rome/a`.",
        "",
        "Hold on `other` and not on `organism`: `rome/b`.",
    ]
    text = with_table("a\n<!-- verdicts -->\nold\n<!-- end of verdicts -->\nz", records)
    assert text == "\n".join(["a", "<!-- verdicts -->", *lines, "<!-- end of verdicts -->", "z"])
    assert with_table(text, records) == text
    with pytest.raises(TransectError, match="which are not there"):
        with_table("no marks", records)
