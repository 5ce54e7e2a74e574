"""Folders of comparisons, inspections and repairs: what others put there stays, and what is read back is what it was.

Anything else that lies in a file's place (of another run, damaged, cut, not a file) is computed anew, with a note.
"""

import dataclasses
import json
import logging
import os
import shutil
import sys

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import transect
from transect.comparison import Plan, Row
from transect.compression.fingerprint import computation_fingerprint
from transect.data import Specimen
from transect.errors import TransectError
from transect.evaluation import Speed
from transect.probes import KIND, Quantity, Result, probing, run_probes
from transect.probes import registry as registered
from transect.store import Folder, keep, kept, write_text

from ..models import VOCABULARY, tiny
from ..test_checkpoint import tokenizer
from ..test_compare import SAME
from .faults import digest

DATA = torch.randint(3, VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(5))
OTHER = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(6))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Timing each row, and drawing each plot, would be most of these tests' time."""
    monkeypatch.setattr("transect.evaluation.measure_speed", lambda model: Speed(1.0, 1.0))
    verb = sys.modules["transect.verbs.compare"]
    monkeypatch.setattr(verb, "pareto_plot", lambda frame, path, title: write_text(path, title * 20))


def compare(out, methods=("svd", "svd-llm"), keep=(0.7, 0.5), held_out=DATA, **options):
    return transect.compare(tiny("llama"), methods, keep, DATA, held_out, out, roles=("q", "down"), **options)


def inspect(out, model=None, **options):
    return transect.inspect(model or tiny("llama"), ("nuclear-norm", "lazy-neuron"), DATA, out=out, **options)


def recover(how="full", **options):
    options = dict(steps=2, every=1, batch_size=4, lr=1e-2, epochs=2, device="cpu") | options
    return transect.recover(tiny("llama"), DATA, how, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished comparison; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        quick.__wrapped__(patch)
        folder = tmp_path_factory.mktemp("run") / "run"
        compare(folder)
    return folder


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A finished inspection; not to be changed."""
    folder = tmp_path_factory.mktemp("seen") / "seen"
    inspect(folder)
    return folder


# what is not ours


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


# what is read back


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # the last number, or the last character of JSON
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_link_to_nothing(path):
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = [flipped, cut, emptied, a_folder, a_link_to_nothing, a_pipe]


def of_a_comparison(folder):
    statistics = [folder / "statistics.json", folder / "statistics.safetensors"]
    names = [*(folder / "rows").iterdir(), *(folder / "factors").iterdir(), *statistics]
    assert len(names) == 9
    return names


def noted(caplog, path):
    return f"{path} is not used, since" in caplog.text


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
            of(settings={"svd-llm": {"shrinkage": 0.2}, "svd": {}})]  # fmt: skip
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


# inspections


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_is_damaged_in_an_inspection_is_computed_anew(tmp_path, seen, damage, caplog):
    folder = tmp_path / "seen"
    shutil.copytree(seen, folder)
    arrays = sorted((folder / "data").glob("*.safetensors"))
    for path in [*arrays, *(folder / "data").glob("*.json"), folder / "index.html"]:
        damage(path)
    with caplog.at_level(logging.INFO, "transect"):
        found = inspect(folder)
    assert len(arrays) == 2 and all(noted(caplog, path) for path in arrays)
    for path in (seen / "data").glob("*.json"):
        assert (folder / "data" / path.name).read_text() == path.read_text()
        for name, values in load_file(path.with_suffix(".safetensors")).items():
            torch.testing.assert_close(found[path.stem][name], values, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (folder / "index.html").read_bytes() == (seen / "index.html").read_bytes()


@pytest.fixture
def counting():
    """A probe that says how often it was computed, with a setting that may be a file."""
    before, runs = dict(registered._probes), []

    @probing("counting", title="", paper="ours")
    def count(specimen, *, words: str = ""):
        """Count.

        words: a file.
        """
        runs.append(words)
        return Result({"runs": Quantity(torch.tensor(len(runs)), (), "", "runs")})

    yield runs
    registered._probes.clear()
    registered._probes.update(before)


def test_a_result_is_of_its_model_text_tokenizer_and_the_files_that_its_settings_name(tmp_path, counting):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    out, words = tmp_path / "out", tmp_path / "words.json"
    words.write_text("[1]")
    tokens = tokenizer()
    vocabulary = {token: (number + 1) % len(tokens) for token, number in tokens.get_vocab().items()}
    turned = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")))

    def look(model=None, tokenizer=tokens, **given):
        given = {"words": str(words)} | given
        transect.inspect(model or tiny("llama"), ["counting"], out=out, tokenizer=tokenizer,
                         settings={"counting": given})  # fmt: skip
        return len(counting)

    assert [look(), look()] == [1, 1]
    turns = tiny("llama")
    turns.config.rope_parameters = {**turns.config.rope_parameters, "rope_theta": 77.0}
    assert look(model=turns) == 2
    assert look(tokenizer=turned) == 3
    words.write_text("[2]")
    assert [look(tokenizer=turned), look(tokenizer=turned)] == [4, 4]
    assert look(tokenizer=turned, words="x" * 5000) == 5  # no name that a file can have


def test_a_result_that_was_kept_as_something_else_is_computed_anew(tmp_path, counting, caplog):
    """Arrays without our marks, as an earlier version wrote them, and whole results under another probe's name."""
    folder = Folder(tmp_path, KIND)
    folder.take()
    specimen = Specimen(transect.Anatomy(tiny("llama")))
    save_file({"runs": torch.tensor(9)}, folder.file("data/counting.safetensors"))
    assert run_probes(specimen, {"counting": {}}, folder, "k")["counting"]["runs"] == 1
    keep(folder.file("data/counting.safetensors"), {"runs": torch.tensor(9)}, "another", {})
    assert run_probes(specimen, {"counting": {}}, folder, "k")["counting"]["runs"] == 2
    assert run_probes(specimen, {"counting": {}}, folder, "k")["counting"]["runs"] == 2


# repairs


@pytest.fixture
def unfinished(tmp_path):
    """A repair that was interrupted after its first step."""

    def stop(check):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(checkpoint=tmp_path / "state", on_check=stop)
    return tmp_path / "state"


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_not_gone_on_from(unfinished, damage, caplog):
    damage(unfinished / "state.safetensors")
    checks = []
    with caplog.at_level(logging.INFO, "transect"):
        found = recover(checkpoint=unfinished, on_check=checks.append)
    assert noted(caplog, unfinished / "state.safetensors") and [check.step for check in checks] == [1, 2]
    assert equal(tensors(found), tensors(recover())) and not unfinished.exists()


def test_a_state_is_of_the_whole_repair(unfinished, tmp_path, caplog):
    """One of other settings, data or model is not gone on from, and the same one is."""
    steps = []
    options = {"on_check": lambda check: steps.append(check.step)}
    for number, changed in enumerate(({"lr": 2e-2}, {"seed": 1}, {"accumulate": 2}, {})):
        shutil.copytree(unfinished, tmp_path / str(number))
        recover(checkpoint=tmp_path / str(number), **options, **changed)
    turns = tiny("llama")
    turns.config.rope_parameters = {**turns.config.rope_parameters, "rope_theta": 77.0}  # the weights are the same
    shutil.copytree(unfinished, tmp_path / "turned")
    transect.recover(turns, DATA, "full", steps=2, every=1, batch_size=4, lr=1e-2, epochs=2, device="cpu",
                     checkpoint=tmp_path / "turned", **options)  # fmt: skip
    assert steps == [1, 2] * 3 + [2] + [1, 2]


def test_what_others_put_beside_a_state_stays(unfinished):
    (unfinished / "notes.txt").write_text("mine")
    recover(checkpoint=unfinished)
    assert os.listdir(unfinished) == ["notes.txt"] and (unfinished / "notes.txt").read_text() == "mine"


# a folder of ours


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
