"""Edits on top of one another: patches that are small and exact, and any edit taken out as if never made."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import transect
from tests.facts import QUICK, specimen_of
from tests.models import assert_same_tensors, tiny
from transect.anatomy import Anatomy
from transect.checkpoint import open_model, save
from transect.cli import main_group
from transect.data import Specimen
from transect.editing import Edit, edit_specimen, read_stack, registry, undo_folder
from transect.editing.journal import Journal, step_back
from transect.editing.lossless import packed, unpacked
from transect.editing.patch import Patch, product
from transect.editing.stack import dependents
from transect.errors import BadCheckpoint, TransectError
from transect.merging.signature import FILE, write_signature

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.element_size()])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 5), st.integers(0, 7), st.integers(0, 2**32))
def test_any_numbers_come_back_bit_for_bit_from_any_prediction(dtype, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    one, other = (
        torch.randint(0, 256, (rows * columns * size,), dtype=torch.uint8, generator=generator).view(dtype)
        for _ in range(2)
    )
    one, other = one.view(rows, columns), other.view(rows, columns)
    assert torch.equal(bits(unpacked(packed(one, other), other)), bits(one))


def test_what_is_predicted_takes_no_room_and_what_is_damaged_is_refused():
    weight = torch.randn(64, 64)
    code = packed(weight, weight)
    assert len(code) < 64
    for damaged in (code[:-1], torch.cat([code, code]), torch.zeros(0, dtype=torch.uint8), code[4:]):
        with pytest.raises(BadCheckpoint):
            unpacked(damaged, weight)
    with pytest.raises(BadCheckpoint, match="another size"):
        unpacked(code, weight[:32])


def test_a_rank_one_change_of_a_matrix_as_large_as_SmolLM2s_takes_a_tenth_of_what_the_matrix_does():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(576, 1536, generator=generator) * 0.05
    left, right = torch.randn(576, 1, generator=generator), torch.randn(1, 1536, generator=generator)
    change = product(left, right) * 0.1 * weight.norm() / product(left, right).norm()
    for dtype in (torch.float32, torch.bfloat16):
        before = weight.to(dtype)
        after = (before.double() + change).to(dtype)
        assert len(packed(before, (after.double() - change).to(dtype))) < 0.1 * before.numel() * before.element_size()


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_a_patch_steps_back_bit_for_bit_and_forward_again_to_the_same(name, dtype):
    """Factors, rows with biases that are added, differences, and matrices that are parts of one or transposed."""
    model = tiny(name, dtype=dtype)
    anatomy, before = Anatomy(model), copy.deepcopy(model)
    first, second = anatomy.blocks[:2]
    generator, journal = torch.Generator().manual_seed(0), Journal(model)
    for matrix in (first.matrix("v"), first.matrix("down"), first.matrix("down"), second.matrix("q")):
        shape = matrix.shape
        journal.add(
            matrix, torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator)
        )
    up = second.matrix("up")
    journal.add_bias(up)
    journal.set_rows(up, torch.tensor([3, 5]), torch.zeros(2, up.shape[1]), torch.tensor([1.5, -2.0]))
    norm = next(name for name, parameter in model.named_parameters() if "norm" in name or "ln" in name)
    journal.shift(norm, torch.randn(model.get_parameter(norm).shape, generator=generator))
    patch = journal.patch()
    assert patch.can_be_repeated
    tensors, note = patch.stored()
    read = Patch.read(tensors, json.loads(json.dumps(note)), anatomy)
    after = copy.deepcopy(model)
    step_back(anatomy, read)
    assert_same_tensors(model, before)
    Journal(model).repeat(read)
    assert_same_tensors(model, after)
    journal.undo()
    assert_same_tensors(model, before)


def test_what_was_added_is_rounded_once_and_what_was_mixed_has_only_a_way_back():
    model = tiny("llama")
    anatomy, before = Anatomy(model), copy.deepcopy(model)
    down = anatomy.blocks[0].matrix("down")
    start, journal = down.weight.clone(), Journal(model)
    ones = torch.ones(32, 1), torch.full((1, 48), 1e-9)
    for _ in range(100):
        journal.add(down, *ones)
    torch.testing.assert_close(down.weight.double(), start.double() + 1e-7, rtol=0, atol=1e-7)
    assert len(journal.patch().matrices["blocks.0.mlp.down"].numbers["left"].T) == 100
    journal.set_rows(down, torch.tensor([0]), torch.zeros(1, 48))
    journal.add(down, *ones)
    patch = journal.patch()
    assert not patch.can_be_repeated
    step_back(anatomy, patch)
    assert_same_tensors(model, before)


# Edits that read nothing: they can be taken out in any order.
def clamp(model, neurons, called=""):
    return edit_specimen(Specimen(Anatomy(model)), "neuron-clamp", {"neurons": neurons}, called=called)


def add(model, folder, strength=1.0, called=""):
    settings = {"signature": str(folder / FILE), "strength": strength}
    return edit_specimen(Specimen(Anatomy(model)), "rws", settings, called=called)


@pytest.fixture
def signature(tmp_path):
    model = tiny("llama")
    generator = torch.Generator().manual_seed(1)
    named = {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in model.named_parameters()}
    (tmp_path / "signature").mkdir()
    write_signature(tmp_path / "signature" / FILE, named, 16)
    return tmp_path / "signature"


STEPS = {
    "zero": lambda model, folder: clamp(model, "1:3=0,2:7=0", "zero"),
    "more": lambda model, folder: add(model, folder, 0.5, "more"),
    "bias": lambda model, folder: clamp(model, "1:3=1.5,0:2=-1", "bias"),
    "less": lambda model, folder: add(model, folder, -0.25, "less"),
}


def made(steps, signature, dtype=torch.float32):
    model = tiny("llama", dtype=dtype)
    for name in steps:
        STEPS[name](model, signature)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gone", list(STEPS))
def test_any_of_independent_edits_comes_out_as_if_it_had_never_been_made(gone, dtype, signature, tmp_path):
    """Bit for bit: they touch the same rows, one sets what another adds to, and one brings the biases."""
    folder = STEPS["less"](made(list(STEPS)[:-1], signature, dtype), signature).save(tmp_path / "m")
    assert [entry.name for entry in read_stack(folder)] == list(STEPS)
    left = [name for name in STEPS if name != gone]
    undo_folder(folder, tmp_path / "out", name=gone)
    assert_same_tensors(open_model(tmp_path / "out").model, made(left, signature, dtype))
    assert [entry.name for entry in read_stack(tmp_path / "out")] == left
    assert [entry.name for entry in read_stack(folder)] == list(STEPS)
    for name in ("less", "zero", "more", "bias"):  # and one after the other, in place, to the first model
        undo_folder(folder, name=name)
    again = open_model(folder).model
    assert_same_tensors(again, tiny("llama", dtype=dtype))
    assert not (folder / "transect-edits").exists() and not Anatomy(again).record.history
    with pytest.raises(BadCheckpoint, match="holds no edit"):
        read_stack(folder)


def test_in_memory_too(signature):
    model = tiny("llama")
    edits = [STEPS[name](model, signature) for name in STEPS]
    edits[1].undo()
    assert_same_tensors(model, made(["zero", "bias", "less"], signature))
    edits[3].undo()
    edits[0].undo()
    assert_same_tensors(model, made(["bias"], signature))
    edits[2].undo()
    assert_same_tensors(model, tiny("llama"))


def test_edits_that_were_computed_from_others_are_named_and_come_out_with_them(tmp_path):
    specimen = specimen_of(count=2)
    specimen.model.lm_head.bias = None  # which no checkpoint would hold
    before = copy.deepcopy(specimen.model)
    rome = [edit_specimen(specimen, "rome", QUICK["rome"], called=name) for name in ("first", "second")]
    clamp(specimen.model, "2:5=0", "clamp")
    folder = edit_specimen(specimen, "constrained-ft", QUICK["constrained-ft"], called="last").save(tmp_path / "m")
    stack = read_stack(folder)
    assert dependents(stack, "first") == ["second", "last"] and dependents(stack, "clamp") == ["last"]
    assert stack[0].facts[0].startswith("w3 w10 w11 w5 ") and stack[2].facts == []
    with pytest.raises(
        TransectError, match=r"second, last were computed from weights that first had changed.*--depend"
    ):
        undo_folder(folder, name="first")
    with pytest.raises(TransectError, match="were computed"):
        rome[0].undo()
    with pytest.raises(TransectError, match="no edit 'third'; there are first, second, clamp, last"):
        undo_folder(folder, name="third")
    undo_folder(folder, name="second", dependents=True)
    assert [entry.name for entry in read_stack(folder)] == ["first", "clamp"]
    undo_folder(folder, name="first")
    expected = copy.deepcopy(before)
    clamp(expected, "2:5=0")
    left = open_model(folder).model
    assert all(
        torch.equal(p, left.get_parameter(name)) for name, p in expected.named_parameters() if "lm_head" not in name
    )
    undo_folder(folder)
    left = open_model(folder).model
    assert all(
        torch.equal(p, left.get_parameter(name)) for name, p in before.named_parameters() if "lm_head" not in name
    )


def test_what_an_edit_read_decides_what_depends_on_it(monkeypatch, tmp_path):
    """An edit of block 1 that says that it read block 0 depends on those of block 0, and on nothing else."""

    def shifting(specimen, journal, *, layer: int = 0):
        down = specimen.anatomy.blocks[layer].matrix("down")
        journal.add(down, torch.ones(32, 1), torch.ones(1, 48))

    def reads(specimen, layer):
        return [name for name, _ in specimen.model.named_parameters() if f"layers.{layer - 1}.mlp" in name]

    monkeypatch.setattr(registry, "_edits", dict(registry._edits))
    registry._edits["shift"] = Edit("shift", "none", shifting, lambda specimen: {}, reads=reads)
    model = tiny("llama")
    for layer in (0, 2, 1, 2):
        edit_specimen(Specimen(Anatomy(model)), "shift", {"layer": layer})
    stack = model._transect_edits
    assert [entry.name for entry in stack] == ["shift-1", "shift-2", "shift-3", "shift-4"]
    assert dependents(stack, "shift-1") == ["shift-3", "shift-4"]  # and what depends on what depends on it
    assert dependents(stack, "shift-2") == [] and dependents(stack, "shift-3") == ["shift-4"]


def test_names():
    model = tiny("llama")
    clamp(model, "1:3=0", "mine")
    assert clamp(model, "1:4=0").entry.name == "neuron-clamp-1"
    for name, message in [
        ("mine", "already"),
        ("../x", "letters"),
        ("a b", "letters"),
        ("-x", "letters"),
        ("x" * 65, "64"),
    ]:
        with pytest.raises(TransectError, match=message):
            clamp(model, "1:5=0", name)
    assert clamp(model, "1:5=0").entry.name == "neuron-clamp-2"


def test_edits_go_along_while_the_weights_are_theirs(tmp_path, caplog):
    caplog.set_level("INFO", "transect")
    folder = clamp(tiny("llama"), "1:3=0", "one").save(tmp_path / "m")
    model = open_model(folder).model
    clamp(model, "2:3=0", "two").save(folder, overwrite=True)  # in its own place
    assert [entry.name for entry in read_stack(folder)] == ["one", "two"]
    model = open_model(folder).model
    model.get_parameter("model.norm.weight").data += 1
    third = clamp(model, "0:3=0", "three")
    assert "one, two cannot be taken back from here on" in caplog.text
    third.save(tmp_path / "other")
    assert [entry.name for entry in read_stack(tmp_path / "other")] == ["three"]
    third.model.get_parameter("model.norm.weight").data += 1
    assert not (third.save(tmp_path / "third") / "transect-edits").exists()
    assert "three cannot be taken back" in caplog.text
    save(open_model(folder).model, tmp_path / "plain")
    assert not (tmp_path / "plain" / "transect-edits").exists()


def test_from_the_command_line(tmp_path):
    folder = tmp_path / "m"
    save(tiny("llama"), folder)

    def run(*words):
        result = CliRunner().invoke(main_group, ["edit", *map(str, words)], standalone_mode=False)
        if result.exception:
            raise result.exception
        return result.output

    for number in (1, 2):
        words = ["--method", "neuron-clamp", "--neurons", f"{number}:3=0", "--out", folder, "--overwrite"]
        run(folder, *words, *(["--name", "second"] if number == 2 else []))
    shown = run(folder, "--list")
    assert "neuron-clamp-1" in shown and "second" in shown and "blocks.2.mlp.up" in shown
    first, second = json.loads(run(folder, "--list", "--json"))
    assert first["after"] == second["before"] and second["card"]["settings"] == {"neurons": "2:3=0"}
    assert 0 < second["bytes"] < 20_000 and second["reads"] == []
    assert "neuron-clamp-1 is taken out" in run(folder, "--undo", "neuron-clamp-1")
    assert [one["name"] for one in json.loads(run(folder, "--list", "--json"))] == ["second"]
    assert "the newest edit is taken out" in run(folder, "--undo", "--out", tmp_path / "back")
    assert_same_tensors(open_model(tmp_path / "back").model, tiny("llama"))
    for words in (
        ["--list", "--undo"],
        ["--list", "--method", "rome"],
        ["--dependents"],
        ["--undo", "--method", "rome"],
    ):
        with pytest.raises(Exception, match="go"):
            run(folder, *words)


def test_the_verb_takes_a_name(tmp_path):
    edited = transect.edit(tiny("llama"), "neuron-clamp", name="mine", neurons="1:3=0", out=tmp_path / "m")
    assert edited.entry.name == "mine" and read_stack(tmp_path / "m")[0].name == "mine"
