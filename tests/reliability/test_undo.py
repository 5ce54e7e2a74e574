"""The way back from an edit: what it reads is what that edit wrote, of this model, or nothing changes."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from transect.anatomy import Anatomy
from transect.checkpoint import open_model
from transect.data import Specimen
from transect.editing import edit_specimen, read_stack, undo_folder
from transect.errors import BadCheckpoint, TransectError
from transect.store import keep, keep_json

from ..models import assert_same_tensors, tiny
from .damage import JUNK, changed, copied
from .faults import digest

LIST, PATCH = "transect-edits/stack.json", "transect-edits/one.safetensors"


def edited(into, neurons, seed=0):
    one = Specimen(Anatomy(tiny("llama", seed=seed)))
    return edit_specimen(one, "neuron-clamp", {"neurons": neurons}, called="one").save(into)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("edited")
    edited(root / "other-edit", "1:3=0,2:7=0")
    edited(root / "other-model", "1:3=0", seed=1)
    return edited(root / "good", "1:3=0")


@pytest.fixture
def folder(good, tmp_path):
    return copied(good, tmp_path / "m")


def refused(folder, match=None):
    before = digest(folder)
    with pytest.raises(BadCheckpoint, match=match):
        undo_folder(folder)
    assert digest(folder) == before and os.listdir(folder.parent) == [folder.name]


def test_an_undamaged_one_goes_back(folder):
    assert_same_tensors(open_model(undo_folder(folder)).model, tiny("llama"))


@pytest.mark.parametrize("other", ["other-edit", "other-model"])
@pytest.mark.parametrize("files", [[PATCH], [LIST], [PATCH, LIST]])
def test_what_belongs_to_another_edit_or_model(good, folder, other, files):
    for name in files:
        (folder / name).write_bytes((good.parent / other / name).read_bytes())
    refused(folder)


def test_numbers_that_were_changed(folder):
    content = bytearray((folder / PATCH).read_bytes())
    content[-3] ^= 1
    (folder / PATCH).write_bytes(content)
    refused(folder, "checksum")


def test_a_file_without_our_marks(folder):
    save_file(load_file(folder / PATCH), folder / PATCH)
    refused(folder, "something else")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for wrong in (undo_folder, read_stack):
        with pytest.raises(BadCheckpoint, match=f"there is no folder {tmp_path / 'none'}"):
            wrong(tmp_path / "none")


def test_an_edit_of_an_early_version_is_refused_and_said_so(folder):
    shutil.rmtree(folder / "transect-edits")
    (folder / "undo.safetensors").write_bytes(b"")
    refused(folder, "early version")


@pytest.mark.parametrize(
    "how",
    ["names", "shapes", "kinds", "rows", "code", "bomb", "config", "config-type", "added", "added-twice", "biases",
     "note"],
)  # fmt: skip
def test_a_file_with_our_marks_that_does_not_fit(folder, how):
    """Somebody who knows the format can make marks; what stands in it is looked at all the same."""
    (entry,) = read_stack(folder)
    held = load_file(folder / PATCH)
    place = "matrices/blocks.1.mlp.up"
    note = {"matrices": {"blocks.1.mlp.up": "rows"}, "tensors": {}, "added": [], "biases": [], "config": {}}
    if how == "names":
        note["matrices"] = {"blocks.7.mlp.up": "rows"}
        held = {name.replace("blocks.1", "blocks.7"): tensor for name, tensor in held.items()}
    elif how == "shapes":
        held[f"{place}/values"] = held[f"{place}/values"].T.contiguous()
    elif how == "kinds":
        note["matrices"] = {"blocks.1.mlp.up": "factors"}
    elif how == "rows":
        held[f"{place}/rows"] = held[f"{place}/rows"] + 48
    elif how == "code":
        held[f"{place}/code"] = held[f"{place}/code"].float()
    elif how == "bomb":
        import zlib

        code = zlib.compress(bytes(2**24))
        held[f"{place}/code"] = torch.frombuffer(bytearray(code), dtype=torch.uint8)
    else:
        note |= {
            "config": {"config": {"vocab_size": [5, 6]}}, "note": {"matrices": 7},
            "config-type": {"config": {"mlp_bias": ["__class__", True]}},
            "added": {"added": ["model.embed_tokens.weight"]}, "added-twice": {"added": [7]},
            "biases": {"biases": ["model.embed_tokens"]},
        }[how]  # fmt: skip
    keep(folder / PATCH, held, entry.of, note)
    refused(folder, "another size" if how == "bomb" else "does not fit")


@pytest.mark.parametrize("how", ["nothing", "chain", "names", "paths", "types", "weights"])
def test_a_list_with_our_marks_that_is_none(folder, how):
    content = json.loads((folder / LIST).read_text())
    edits = content["edits"]
    edits[0] |= {
        "chain": {"before": "x"}, "paths": {"name": "../one"}, "types": {"writes": 7}, "weights": {"after": "0" * 32}
    }.get(how, {})  # fmt: skip
    keep_json(folder / LIST, {"edits": [] if how == "nothing" else edits * (1 + (how == "names"))}, "edits of a model")
    refused(folder)


@settings(max_examples=40, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_any_list_and_any_file(good, tmp_path_factory, random):
    folder = copied(good, tmp_path_factory.mktemp("undo") / "m")
    if random.random() < 0.5:
        held = json.loads((folder / LIST).read_text())
        changed(held, random)
        held = random.choice([held, random.choice(JUNK)])
        if isinstance(held, dict) and random.random() < 0.7:
            keep_json(folder / LIST, held, "edits of a model")
        else:
            (folder / LIST).write_text(json.dumps(held))
    else:
        content = bytearray((folder / PATCH).read_bytes())
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        (folder / PATCH).write_bytes(content)
    before = digest(folder)
    try:
        undo_folder(folder)
    except TransectError:
        assert digest(folder) == before
    else:
        state = load_file(folder / "model.safetensors")
        assert all(torch.equal(state[name], tensor) for name, tensor in tiny("llama").state_dict().items())


def test_pipes(folder):
    for name in (PATCH, LIST):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(BadCheckpoint):
            undo_folder(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(content)
