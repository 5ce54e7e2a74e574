"""The way back from an edit: what it reads is what that edit wrote, of this model, or nothing changes."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from transect.anatomy import Anatomy
from transect.data import Specimen
from transect.editing import edit_specimen, undo_folder
from transect.errors import BadCheckpoint, TransectError
from transect.store import keep

from ..models import assert_same_tensors, tiny
from .damage import JUNK, changed, copied
from .faults import digest


def edited(into, neurons, seed=0):
    one = Specimen(Anatomy(tiny("llama", seed=seed)))
    return edit_specimen(one, "neuron-clamp", {"neurons": neurons}).save(into)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("edited")
    edited(root / "other-edit", "1:3=0,2:7=0")
    edited(root / "other-model", "1:3=0", seed=1)
    return edited(root / "good", "1:3=0")


@pytest.fixture
def folder(good, tmp_path):
    return copied(good, tmp_path / "m")


def refused(folder, match=""):
    before = digest(folder)
    with pytest.raises(BadCheckpoint, match=match):
        undo_folder(folder)
    assert digest(folder) == before and os.listdir(folder.parent) == [folder.name]


def test_an_undamaged_one_goes_back(folder):
    from transect.checkpoint import open_model

    assert_same_tensors(open_model(undo_folder(folder)).model, tiny("llama"))


@pytest.mark.parametrize("other", ["other-edit", "other-model"])
@pytest.mark.parametrize("files", [["undo.safetensors"], ["edit.json"], ["undo.safetensors", "edit.json"]])
def test_what_belongs_to_another_edit_or_model(good, folder, other, files):
    for name in files:
        (folder / name).write_bytes((good.parent / other / name).read_bytes())
    refused(folder)


def test_numbers_that_were_changed(folder):
    content = bytearray((folder / "undo.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "undo.safetensors").write_bytes(content)
    refused(folder, "checksum")


def test_a_file_without_our_marks(folder):
    save_file(load_file(folder / "undo.safetensors"), folder / "undo.safetensors")
    refused(folder, "something else")


@pytest.mark.parametrize("how", ["names", "shapes", "dtypes", "config", "config-type", "added", "added-twice", "note"])
def test_a_file_with_our_marks_that_does_not_fit(folder, how):
    """Somebody who knows the format can make marks; what stands in it is looked at all the same."""
    of = json.loads((folder / "edit.json").read_text())["undo"]["model"]
    before = load_file(folder / "undo.safetensors")
    name = next(iter(before))
    note = {"config": {}, "added": []}
    if how == "names":
        before["model.nowhere.weight"] = before.pop(name)
    elif how == "shapes":
        before[name] = before[name].T.contiguous()
    elif how == "dtypes":
        before[name] = before[name].double()
    else:
        note = {
            "config": {"config": {"vocab_size": 5}, "added": []}, "note": 7,
            "config-type": {"config": {"mlp_bias": "__class__"}, "added": []},
            "added": {"config": {}, "added": ["model.embed_tokens.weight"]},
            "added-twice": {"config": {}, "added": [name, 7]},
        }[how]  # fmt: skip
    keep(folder / "undo.safetensors", before, of, note)
    refused(folder, "does not fit")


@settings(max_examples=40, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_any_card_and_any_file(good, tmp_path_factory, random):
    folder = copied(good, tmp_path_factory.mktemp("undo") / "m")
    if random.random() < 0.5:
        card = json.loads((folder / "edit.json").read_text())
        changed(card, random)
        (folder / "edit.json").write_text(json.dumps(random.choice([card, random.choice(JUNK)])))
    else:
        content = bytearray((folder / "undo.safetensors").read_bytes())
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        (folder / "undo.safetensors").write_bytes(content)
    before = digest(folder)
    try:
        undo_folder(folder)
    except TransectError:
        assert digest(folder) == before
    else:
        state = load_file(folder / "model.safetensors")
        assert all(torch.equal(state[name], tensor) for name, tensor in tiny("llama").state_dict().items())


def test_pipes(folder):
    for name in ("undo.safetensors", "edit.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(BadCheckpoint):
            undo_folder(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(content)
