"""Comparisons, inspections and repairs, killed at each of their changes of files, and run again: the same result.

A command has 20 to 70 different states; eight of each are tried, evenly spaced, and all by `make nightly`.
"""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import transect
from transect.checkpoint import save
from transect.pages.entries import entries
from transect.store import Folder, write_text

from ..models import apart, tiny
from ..suite import some
from ..test_checkpoint import tokenizer
from ..test_compare import SAME
from .faults import Kills
from .runs import DATA, OTHER

pytestmark = pytest.mark.usefixtures("quick")


def compare(root, methods=("svd", "svd-llm"), held_out=DATA, **options):
    return transect.compare(
        tiny("llama"), methods, (0.7, 0.5), DATA, held_out, root / "run", roles=("q", "down"), **options
    )


def inspect(root):
    return transect.inspect(tiny("llama"), ("nuclear-norm", "lazy-neuron"), DATA, out=root / "run", sequences=4)


def recover(root, how):
    teacher = {"teacher": tiny("llama", seed=1)} if how == "blocks" else {}
    options = dict(epochs=2, steps=2, every=1, batch_size=4, lr=1e-2, device="cpu", overwrite=True, **teacher)
    return transect.recover(tiny("llama"), DATA, how, out=root / "run", **options)


TRAIN = dict(epochs=2, steps=2, every=1, batch_size=4, held_out=0.34, device="cpu", overwrite=True)
PAIRS = [
    {"prompt": f"w{number} w7", "better": "w5 w6", "worse": "w8", "category": "one", **aspect}
    for number in range(4) for aspect in ({}, {"aspect": "length"})
]  # fmt: skip
MATRICES = dict(roles=("q",), seeds=1, rates=(1.0,), batch_size=4, device="cpu")
SMALL = dict(hidden=16, blocks=1, heads=2, steps=2, batch_size=4, held_out=8, seeds=1, rates=(1e-3,), lengths=())
# Commands that leave a folder of their own, in which what is finished lies.
KEPT = {
    "diff": lambda out: transect.diff(tiny("llama"), tiny("llama", seed=1), DATA, what=("weights", "text"), out=out),
    "catalogue": lambda out: transect.catalogue(out),
    "claims": lambda out: transect.check_claims(
        ["fwsvd/below-svd", "fwsvd/weight-error"], tiny("llama"), DATA, DATA, record=out
    ),
    "race": lambda out: transect.race(tiny("llama"), ["lora", "full"], DATA, DATA, out, steps=2, every=1, **MATRICES),
    "study": lambda out: transect.study(
        "one-layer-knowledge",
        out=out,
        subjects=8,
        templates=4,
        multiplicity="1,3",
        fine_tuned="2,5",
        rank="0,1",
        seeds=1,
        width=8,
        neurons=8,
        steps=3,
        full_steps=2,
        low_rank_steps=2,
    ),
    "contest": lambda out: transect.race_parts("llama", "induction", out, mixer=("pooling", "base"), **SMALL),
}
# Every other command that trains: what it is called with, and the folder of its unfinished work.
TRAINED = {
    "adapt": (lambda out: transect.adapt(tiny("llama"), "lora", DATA, out=out, lr=1e-2, rank=2, **TRAIN), "adaptation"),
    "convert": (lambda out: transect.convert(tiny("llama"), "liger", DATA, out=out, window=4, **TRAIN), "conversion"),
    "memorize": (
        lambda out: transect.memorize(
            tiny("llama"), DATA, out=out, blocks=1, neighbours=2, epochs=2, batch=8, held_out=0.34, overwrite=True
        ),
        "memory",
    ),
    "prefer": (
        lambda out: transect.prefer(
            tiny("llama"), PAIRS, out=out, tokenizer=tokenizer(), rank=2, epochs=1, steps=2, every=1, batch_size=2,
            held_out=0.34, device="cpu", overwrite=True,
        ),
        "preference",
    ),
    "search": (
        lambda out: transect.search(tiny("llama"), DATA, out=out, keep=0.7, neurons=(24, 48), lr=1e-3, **TRAIN),
        "search",
    ),
}  # fmt: skip


def files(root):
    """Names of everything that is there, relative to `root`."""
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*"))


OWN = ("notes.txt", "rows/notes.txt", "data/notes.txt")  # files of the user's in a folder of ours


def put_own(root):
    for name in OWN:
        path = root / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")


def has_own(root):
    return all((root / "run" / name).read_text() == "mine" for name in OWN)


def states(command, root, into):
    """What a kill at each change leaves."""
    kills = Kills(root, into)
    with kills.recorded():
        command(root)
    assert len(kills.states) > 15
    return some(kills.states, 8)


@pytest.mark.parametrize("over", ["nothing", "another run"])
def test_a_comparison(tmp_path, over):
    root = tmp_path / "root"
    root.mkdir()
    options = {}
    if over == "another run":
        compare(root, methods=("asvd",), held_out=OTHER)
        put_own(root)
        options = {"overwrite": True}
    seen = states(lambda place: compare(place, **options), root, tmp_path / "states")
    expected, names = compare(root), files(root)
    for state in seen:
        pd.testing.assert_frame_equal(compare(state, **options)[SAME], expected[SAME])
        assert files(state) == names
        table = pd.read_csv(state / "run" / "table.csv")
        pd.testing.assert_frame_equal(table[SAME], expected[SAME])
        found, wanted = (load_file(place / "run/factors/svd-llm.safetensors") for place in (state, root))
        assert found.keys() == wanted.keys() and all(apart(found[k], wanted[k]) < 1e-4 for k in wanted if "values" in k)
        assert not options or has_own(state)
    if options:
        Folder(root / "run", "a comparison").clear()
        assert [name for name in files(root) if (root / name).is_file()] == sorted(f"run/{name}" for name in OWN)


def test_an_inspection(tmp_path):
    root = tmp_path / "root"
    put_own(root)
    seen = states(inspect, root, tmp_path / "states")
    expected, names = inspect(root), files(root)
    for state in seen:
        found = inspect(state)
        assert list(found) == list(expected) and files(state) == names
        for name, result in expected.items():
            assert found[name].findings == result.findings
            stored = load_file(state / "run" / "data" / f"{name}.safetensors")
            for quantity, one in result.quantities.items():
                for values in (found[name][quantity], stored[quantity]):
                    torch.testing.assert_close(values, one.values, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert (state / "run" / "index.html").read_bytes() == (root / "run" / "index.html").read_bytes()
        assert has_own(state)


@pytest.mark.parametrize("how", ["full", "blocks"])
def test_a_repair(tmp_path, how):
    root = tmp_path / "root"
    root.mkdir()
    old = None
    if how == "full":  # over another model
        save(tiny("llama", seed=3), root / "run")
        (root / "run" / "notes.txt").write_text("mine")
        old = load_file(root / "run" / "model.safetensors")
    seen = states(lambda place: recover(place, how), root, tmp_path / "states")
    new, names = load_file(root / "run" / "model.safetensors"), files(root)
    assert any((state / ".run.recovery" / "state.safetensors").exists() for state in seen)
    for state in seen:
        model = state / "run" / "model.safetensors"
        if old is not None or model.exists():
            found = load_file(model)
            assert any(one and all(torch.equal(found[name], one[name]) for name in one) for one in (old, new))
        recover(state, how)
        found = load_file(model)
        assert found.keys() == new.keys() and all(torch.equal(found[name], new[name]) for name in new)
        assert files(state) == names


@pytest.mark.parametrize("name", TRAINED)
def test_a_training(tmp_path, name):
    """Resumed wherever it was killed, it ends with the same tensors, and leaves nothing beside them."""
    command, unfinished = TRAINED[name]
    root = tmp_path / "root"
    root.mkdir()
    seen = states(lambda place: command(place / "run"), root, tmp_path / "states")
    new, names = tensors_of(root / "run"), files(root)
    assert any((state / f".run.{unfinished}").is_dir() for state in seen)
    for state in seen:
        found = tensors_of(state / "run")
        assert not found or same_tensors(found, new)
        command(state / "run")
        assert same_tensors(tensors_of(state / "run"), new) and files(state) == names


def tensors_of(folder):
    found = sorted(Path(folder).glob("*.safetensors"))
    return {f"{path.name} {name}": tensor for path in found for name, tensor in load_file(path).items()}


def same_tensors(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", KEPT)
def test_a_folder_of_results(tmp_path, name, monkeypatch):
    """Each state is gone on from, whatever of it was finished, to the same files and nothing beside them."""
    for verb, plot in (("race", "contest_plot"), ("race_parts", "parts_plot")):
        quick_plot = lambda frame, path, title: write_text(path, title * 20)  # noqa: E731
        monkeypatch.setattr(sys.modules[f"transect.verbs.{verb}"], plot, quick_plot)
    monkeypatch.setattr("transect.pages.site.entries", lambda: entries()[::60])
    root, alone = tmp_path / "root", name in ("race", "contest")  # whose folder has nothing else in it
    root.mkdir()
    if not alone:
        put_own(root)
    seen = states(lambda place: KEPT[name](place / "run"), root, tmp_path / "states")
    names = files(root)
    for state in seen:
        KEPT[name](state / "run")
        assert files(state) == names and (alone or has_own(state))
        for file in names:
            written = (root / file).is_file() and file.endswith((".html", ".csv", ".json"))
            assert not written or read(state / file) == read(root / file), file


def read(path):
    """What a file says but for seconds, dates and checksums of these."""
    text = path.read_text()
    if path.suffix == ".csv":
        table = pd.read_csv(path)
        return table[[name for name in table if "seconds" not in name]].to_csv()
    if path.suffix == ".html":
        return text
    gone = ("seconds", "forward", "date", "transect.checksum")
    return {key: value for key, value in json.loads(text).items() if key not in gone}
