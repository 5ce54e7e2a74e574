"""The frame of edits (card, undo, all or nothing, on disk), and neuron-clamp, which changes what a model stores."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from transect.anatomy import Anatomy
from transect.checkpoint import open_model, save
from transect.checkpoint.base import note_base, place_of_base
from transect.data import Batches, Fact, Specimen
from transect.editing import Card, Edit, edit, edit_specimen, edits, registry, undo_folder
from transect.errors import BadCheckpoint, NotApplicable, TransectError
from transect.forward import changed
from transect.probes.neurons import held

from .models import CAUSAL, CONFIGS, TOLERANCE, inputs, logits, tiny
from .test_checkpoint import tokenizer

NAME = "neuron-clamp"
BIASED = (
    "gpt2",
    "opt",
    "gpt_neox",
    "llama",
    "gptj",
    "bloom",
    "granite",
)  # whose MLP can have biases in a plain checkpoint
CLAMP = {"neurons": "1:3=1.5, 2:7=-0.25, 2:40=0"}


def specimen(name, dtype=torch.float64, **kwargs):
    return Specimen(Anatomy(tiny(name, dtype=dtype)), data=Batches([inputs(name)]), **kwargs)


def state_of(model):
    config = json.loads(model.config.to_json_string(use_diff=False))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, config


def assert_same(model, before):
    tensors, config = state_of(model)
    assert config == before[1]
    assert list(tensors) == list(before[0])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before[0].items())


def assert_same_on_disk(model, before):
    """Saving writes the model's class and precision into its config."""
    tensors, config = state_of(model)
    assert list(tensors) == list(before[0])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before[0].items())
    assert config.get("mlp_bias") == before[1].get("mlp_bias")


@pytest.fixture
def temporary(monkeypatch):
    """Registers an edit for one test."""
    monkeypatch.setattr(registry, "_edits", dict(registry._edits))

    def register(function, check=None):
        registry._edits["temporary"] = Edit("temporary", "none", function, lambda specimen: {"one": 1.0}, check)

    return register


@pytest.mark.parametrize("name", CAUSAL)
def test_clamping_in_the_weights_is_holding_while_the_model_runs(name):
    one, batch = specimen(name), inputs(name, seed=4)
    before = state_of(one.model)
    values = {(1, 3): 1.5, (2, 7): -0.25, (2, 40): 0.0} if name in BIASED else {(1, 3): 0.0, (2, 7): 0.0, (2, 40): 0.0}
    holds = {("up", 1): held([3], [values[1, 3]]), ("up", 2): held([7, 40], [values[2, 7], 0.0])}
    with changed(one.anatomy, holds):
        expected = logits(one.model, batch)
    text = ",".join(f"{layer}:{neuron}={value}" for (layer, neuron), value in values.items())
    edited = edit_specimen(one, NAME, {"neurons": text})
    torch.testing.assert_close(logits(one.model, batch), expected, rtol=1e-12, atol=1e-12)
    card = edited.card
    assert {row["matrix"] for row in card.changes} == {"blocks.1.mlp.up", "blocks.2.mlp.up"}
    assert [row["rank"] for row in card.changes] == [1, 2]
    assert "2:7" in card.notes and card["loss on the text that the edit was given, nats"][0] > 0
    assert "blocks.1.mlp.up" in card.markdown() and json.loads(card.to_json())["edit"] == NAME
    edited.undo()
    assert_same(one.model, before)


@pytest.mark.parametrize("name", sorted(set(CAUSAL) - set(BIASED)))
def test_a_value_that_a_plain_checkpoint_cannot_hold_is_refused(name):
    one = specimen(name)
    one.model.config.mlp_bias = False  # an entry of the config that the model's class does not read
    before = state_of(one.model)
    with pytest.raises(NotApplicable, match="held at 0 only"):
        edit_specimen(one, NAME, CLAMP)
    assert_same(one.model, before)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(CAUSAL)))
def test_encoders_can_be_clamped_too(name):
    batch = inputs(name)
    batch.setdefault("labels", batch.get("input_ids"))
    one = Specimen(Anatomy(tiny(name, dtype=torch.float32)), data=Batches([batch]))
    before = state_of(one.model)
    with changed(one.anatomy, {("up", 1): held([3], [1.5])}):
        expected = logits(one.model, inputs(name))
    edited = edit_specimen(one, NAME, {"neurons": "1:3=1.5"})
    torch.testing.assert_close(logits(one.model, inputs(name)), expected, rtol=1e-5, atol=1e-5)
    edited.undo()
    assert_same(one.model, before)


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ("", "name the neurons"), ("1:3", "not layer:neuron=value"), ("1=3", "not layer"), ("a:3=1", "not layer"),
        ("1:3=x", "not layer"), ("1:3=nan", "finite"), ("1:3=inf", "finite"), ("3:0=0", "block 3 does not exist"),
        ("-1:0=0", "does not exist"), ("1:48=0", "neurons 0 to 47"), ("1:-1=0", "neurons 0 to 47"),
        ("1:3=0,1:3=1", "named twice"), ("1:3=1e300", "finite number"),
    ],
)  # fmt: skip
def test_bad_neurons_are_refused_before_any_work(neurons, message):
    one = specimen("llama", torch.float32)
    before = state_of(one.model)
    with pytest.raises(TransectError, match=message):
        edit_specimen(one, NAME, {"neurons": neurons})
    assert_same(one.model, before)


def test_dropped_and_compressed_mlps_are_refused():
    import transect

    one = specimen("llama", torch.float32)
    one.anatomy.blocks[1].mlp.drop()
    with pytest.raises(TransectError, match="was dropped"):
        edit_specimen(one, NAME, CLAMP)
    one = specimen("llama", torch.float32)
    transect.compress(one.model, "svd", keep=0.5)
    with pytest.raises(TransectError, match="stored as LowRank"):
        edit_specimen(one, NAME, CLAMP)


CHILD = """
import sys
sys.modules["transect"] = None  # not importable
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.arange(3, 15)[None]).logits
    expected = torch.load(folder + ".pt", weights_only=True)
    print(type(model).__module__.split(".")[0], float((logits - expected).abs().max() / expected.abs().max()))
"""
FOLDERS = ("llama", "llama-narrow", "gpt2", "opt", "gpt_neox", "phi3", "mistral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Edited models on disk, with what they were."""
    root, originals = tmp_path_factory.mktemp("edited"), {}
    for case in FOLDERS:
        name = case.split("-")[0]
        one = specimen(name, torch.float32, tokenizer=tokenizer())
        if case == "llama-narrow":  # its structure record names the matrices that get biases
            for block in one.anatomy.blocks:
                block.mlp.keep(range(4, 46))
        originals[case] = state_of(one.model)
        neurons = CLAMP["neurons"] if name in BIASED else "1:3=0,2:7=0"
        edited = edit_specimen(one, NAME, {"neurons": neurons})
        edited.save(root / case, one.tokenizer)
        with torch.no_grad():
            torch.save(one.model(torch.arange(3, 15)[None]).logits, f"{root / case}.pt")
        edited.undo()
        assert_same_on_disk(one.model, originals[case])
    return root, originals


def test_edited_models_load_in_plain_transformers_in_a_fresh_process(folders, elsewhere):
    root, _ = folders
    said = elsewhere.python(CHILD, *(root / case for case in FOLDERS))
    found = [line.split() for line in said.splitlines()]
    assert [module for module, _ in found] == ["transformers"] * len(FOLDERS)
    assert all(float(apart) <= TOLERANCE[torch.float32] for _, apart in found)


@pytest.mark.parametrize("case", FOLDERS)
def test_an_edit_on_disk_is_taken_back_bit_for_bit(folders, case, tmp_path):
    root, originals = folders
    stored = load_file(root / case / "transect-edits" / "neuron-clamp-1.safetensors")
    changed = {name.split("/")[1] for name in stored if name.startswith("matrices/")}
    assert changed == {"blocks.1.mlp.up", "blocks.2.mlp.up"}  # and not every matrix
    out = undo_folder(root / case, tmp_path / "back")
    assert_same_on_disk(open_model(out).model, originals[case])
    assert (root / case / "transect-edits").exists() and not (out / "transect-edits").exists()
    with pytest.raises(BadCheckpoint, match="holds no edit"):
        undo_folder(out)


def test_an_edit_is_in_the_models_history_so_that_an_adapter_does_not_name_the_unedited_one(tmp_path):
    one = specimen("llama", torch.float32, tokenizer=tokenizer())
    note_base(one.model, "somebody/llama")
    edited = edit_specimen(one, NAME, CLAMP)
    assert one.anatomy.record.history[-1]["edit"] == NAME and place_of_base(one.model) is None
    folder = edited.save(tmp_path / "edited", one.tokenizer)
    assert json.loads((folder / "config.json").read_text())["transect"]["history"][-1]["edit"] == NAME
    assert place_of_base(one.model) == str(folder)
    undo_folder(folder)
    assert "transect" not in json.loads((folder / "config.json").read_text())
    edited.undo()
    assert not one.anatomy.record.history


def test_undo_in_place_and_of_a_folder_that_was_changed_since(folders, tmp_path):
    one = specimen("llama", torch.float32, tokenizer=tokenizer())
    before = state_of(one.model)
    edited = edit_specimen(one, NAME, CLAMP)
    folder = edited.save(tmp_path / "edited", one.tokenizer)
    assert "neuron-clamp" in (folder / "transect-edits" / "neuron-clamp-1.md").read_text()
    undo_folder(folder)
    assert_same_on_disk(open_model(folder).model, before)
    assert not (folder / "transect-edits").exists()
    folder = edited.save(tmp_path / "again", one.tokenizer)
    whole = load_file(folder / "model.safetensors")
    save_file({**whole, "model.norm.weight": whole["model.norm.weight"] + 1e-3}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(BadCheckpoint, match="changed since"):
        undo_folder(folder)
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "transect-edits" / "neuron-clamp-1.safetensors").write_bytes(b"damaged")
    with pytest.raises(BadCheckpoint, match="damaged"):
        undo_folder(folder)


def test_an_interrupted_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    one = specimen("llama", torch.float32, tokenizer=tokenizer())
    folder = save(one.model, tmp_path / "model", one.tokenizer)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted(card):
        raise KeyboardInterrupt

    monkeypatch.setattr(Card, "markdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit_specimen(one, NAME, CLAMP).save(folder, one.tokenizer, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_model_in_its_place_takes_no_edit_along(tmp_path):
    one = specimen("llama", torch.float32, tokenizer=tokenizer())
    edited = edit_specimen(one, NAME, CLAMP)
    folder = edited.save(tmp_path / "edited", one.tokenizer)
    save(edited.undo(), folder, one.tokenizer, overwrite=True)
    with pytest.raises(BadCheckpoint, match="holds no edit"):
        undo_folder(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "llama"])
def test_a_failed_edit_leaves_no_trace(temporary, name, error):
    """Fused matrices, biases that were added, config entries, in-place changes: whatever came before the error."""

    def failing(specimen, journal):
        first, second = specimen.anatomy.blocks[:2]
        for role in ("q", "v", "up"):  # two parts of one stored matrix
            journal.write(first.matrix(role), torch.randn(first.matrix(role).shape))
        journal.keep(second.matrix("down"))
        second.matrix("down").module.weight.requires_grad_(True).data.mul_(3)
        journal.add_bias(second.matrix("up"))
        journal.add_bias(second.matrix("o"))
        journal.write(second.matrix("o"), torch.randn(second.matrix("o").shape))
        journal.set_config("initializer_range", 0.5)
        raise error("here")

    temporary(failing)
    one = specimen(name, torch.float32)
    one.model.train()
    one.model.get_input_embeddings().weight.requires_grad_(False)
    flags = [p.requires_grad for p in one.model.parameters()]
    before = state_of(one.model)
    with pytest.raises(error, match="here"):
        edit_specimen(one, "temporary", {})
    assert_same(one.model, before)
    assert one.model.training and [p.requires_grad for p in one.model.parameters()] == flags


def test_an_edit_that_makes_nan_is_taken_back(temporary):
    def spoiling(specimen, journal):
        matrix = specimen.anatomy.blocks[0].matrix("up")
        journal.write(matrix, matrix.weight * float("nan"))

    temporary(spoiling)
    one = specimen("gpt2")
    before = state_of(one.model)
    with pytest.raises(TransectError, match="NaN"):
        edit_specimen(one, "temporary", {})
    assert_same(one.model, before)


def test_parts_of_a_fused_matrix_are_changed_alone_and_tied_weights_stay_tied(temporary):
    def doubling(specimen, journal):
        matrix = specimen.anatomy.blocks[1].matrix("k")
        journal.write(matrix, 2 * matrix.weight)
        journal.write(matrix, 2 * matrix.weight)
        return {"done": True}

    temporary(doubling)
    for name in ("gpt2", "phi3", "gpt_neox"):
        one = specimen(name)
        q, k = (one.anatomy.blocks[1].matrix(role).weight.clone() for role in "qk")
        before = state_of(one.model)
        edited = edit_specimen(one, "temporary", {})
        assert torch.equal(one.anatomy.blocks[1].matrix("k").weight, 4 * k)
        assert torch.equal(one.anatomy.blocks[1].matrix("q").weight, q)
        (row,) = edited.card.changes
        assert row["relative"] == pytest.approx(3) and row["entries"] == 1
        assert edited.card["one"] == (1.0, 1.0) and edited.card.notes == {"done": True}
        assert one.anatomy.embeddings_tied == (name == "gpt2")
        edited.undo()
        assert_same(one.model, before)


def test_facts_are_measured():
    words = tokenizer()
    facts = [Fact("w5 {} w6", "w7", "w8")]
    one = specimen("llama", torch.float32, tokenizer=words, known_facts=facts)
    card = edit_specimen(one, NAME, {"neurons": "1:3=9"}).card
    before, after = card["log-probability of the answer, 1 facts, nats"]
    assert before != after
    ids = words("w5 w7 w6")["input_ids"]
    expected = logits(one.model, {"input_ids": torch.tensor([ids])})[0, -1].log_softmax(-1)[8]
    assert after == pytest.approx(float(expected), rel=1e-5)


def test_unknown_edits_settings_and_what_check_refuses(temporary):
    one = specimen("gpt2")
    with pytest.raises(TransectError, match=r"unknown edit 'nothing'; known: .*neuron-clamp"):
        edit_specimen(one, "nothing", {})
    with pytest.raises(TransectError, match="has no parameter wrong"):
        edit_specimen(one, NAME, {"wrong": 1})

    def refuse(specimen):
        raise TransectError("not today")

    temporary(lambda specimen, journal: pytest.fail("it must not run"), check=refuse)
    with pytest.raises(TransectError, match="not today"):
        edit_specimen(one, "temporary", {})


@pytest.mark.parametrize("one", edits(), ids=lambda one: one.name)
def test_every_edit_explains_itself(one):
    assert one.summary.endswith(".") and one.paper and edit(one.name) is one
    assert all(parameter.help for parameter in one.parameters), one.name
