"""Everything that is registered, run once through the command line as it stands, and once with every option given.

In the short suite every other of one registry as it stands, and the rest with every option.

The cases come from the registries and from the commands themselves: a new method, probe, edit, claim, command or option
is tried without being named here. An option without a default needs a value that makes sense in `VALUES`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from dataclasses import asdict

import click
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import transect
import transect.anatomy.architecture as architecture
from tests import suite
from tests.models import VOCABULARY, tiny
from tests.test_adaptation import SMALL as ADAPTED
from tests.test_conversions import SMALL
from tests.test_every_method import KEEPS, QUICK
from transect.adaptation import adapters
from transect.anatomy import architecture_of
from transect.cli import main, main_group
from transect.compression import allocations, methods
from transect.compression.recipe import goes_with
from transect.conversion import conversions
from transect.difference import comparisons
from transect.editing import edits
from transect.errors import TransectError
from transect.merging import mergings
from transect.probes import probes
from transect.sizing import searchers
from transect.studies import studies, study_named
from transect.training import layer_rates, optimizers, parametrizations, penalties

SEED = 3  # of the run; of a method that has a `seed` of its own, another
# What takes long at its defaults, made short where every option is given.
SHORT = {
    **SMALL, **QUICK, **ADAPTED, "shira": {"rank": 4},
    "depth-efficiency": {"prompts": 2, "length": 16, "steps": 2, "cuts": 1},
    "fusegpt": {"epochs": 1, "rank": 4}, "causal-trace": {"samples": 2, "facts": 2},
    "rome": {"steps": 2, "rounds": 1, "contexts": 1}, "memit": {"steps": 2, "contexts": 1},
    "ilp": {"trials": 2}, "monarch": {"blocks": 3}, "constrained-ft": {"steps": 2},
    "neuron-clamp": {"neurons": "0:1=0,2:5=1.5"}, "cola": {"simulations": 4, "inputs": 2},
    "bigram-subnetworks": {"steps": 5}, "dense2moe-blocks": {"blocks": 3, "prompt": 4},
    "attention-sae": {"tokens": 2000, "layers": "all"},
    "hftp": {"sentences": "sentences.txt", "skip": 0, "shuffles": 10, "permutations": 100},
    "brain-alignment": {"recording": "recording.csv", "candidates": 1, "permutations": 100},
    "one-layer-knowledge": {
        "subjects": 8, "templates": 4, "multiplicity": "1,3", "fine_tuned": "2,5", "rank": "0,1", "seeds": 1,
        "width": 8, "neurons": 8, "steps": 3, "full_steps": 2, "low_rank_steps": 2,
    },
    "model-zoo-phases": {
        "widths": "4,8", "temperatures": "512,1024", "epochs": 1, "products": 2, "curve_epochs": 1, "seeds": 2,
        "batch_size": 512,
    },
    "organism-questions": {"fine_tuned": "1,2", "rank": "0,1", "seeds": 1, "steps": 1, "asked": 4},
    "transformer-programs": {
        "task": "hist", "samples": 60, "layers": 1, "heads": 1, "numerical_heads": 1, "mlps": 1, "numerical_mlps": 1,
        "hidden": 4, "epochs": 2, "seeds": 2,
    },
}  # fmt: skip
# What `adapt` can be made of, by its option and the name.
TRAINED = {
    f"{option} {entry.name}": entry
    for option, entries in {
        "--method": [*adapters(), *parametrizations()], "--optimizer": optimizers(), "--penalties": penalties(),
        "--layer-rates": layer_rates(),
    }.items() for entry in entries
}  # fmt: skip
# The values of options that have no default.
VALUES = {
    "data": "text.txt", "eval_data": "text.txt", "facts": "facts.json", "choices": "choices.json",
    "passages": "passages.json", "sequence_length": "16", "eval_sequences": "2", "sequences": "4", "dtype": "float32",
    "device": "cpu", "roles": "q,k,v,o,gate,up,down", "allocation": "uniform",
    "allocations": "uniform", "keep": "0.8", "methods": "svd", "probes": "spectra", "method": None, "out": "out",
    "cache": "statistics.safetensors", "architecture": "architecture.json", "teacher": "model", "train": "full",
    "behind": "4,8", "lengths": "8,16", "record": "recorded", "lr": "1e-4", "steps": "2", "every": "1",
    "model": "model",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its tokenizer, a text and questions of each kind."""
    folder = tmp_path_factory.mktemp("every")
    names = ["<unk>", "<pad>", *(f"w{i}" for i in range(2, VOCABULARY - 4)), *"ABCD"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name in ("llama", "mixtral"):
        where = folder / ("model" if name == "llama" else name)
        tiny(name).save_pretrained(where)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
        tokenizer.save_pretrained(where)
    said = int(tiny("llama")(input_ids=torch.tensor([tokenizer("w3 w5 w4")["input_ids"]])).logits[0, -1].argmax())
    known = [{"prompt": "w3 {} w4", "subject": "w5", "answer": tokenizer.decode([said])}]
    (folder / "text.txt").write_text(" ".join(f"w{(i * 7 + i * i // 5) % 55 + 3}" for i in range(600)))
    facts = [
        {"prompt": "w3 {} w4", "subject": f"w{5 + i} w{8 + i}", "answer": f"w{20 + i}", "new_answer": f"w{40 + i}",
         "paraphrases": [f"w6 w7 w{5 + i} w{8 + i} w4"],
         "neighbours": [{"prompt": f"w3 w{30 + i} w4", "answer": f"w{21 + i}"}]}
        for i in range(8)
    ]  # fmt: skip
    choices = [
        {"question": f"w{3 + i} w{4 + i}", "options": [f"w{10 + i + j}" for j in range(4)], "answer": i % 4,
         "template": "{question} {options} w9"}
        for i in range(8)
    ]  # fmt: skip
    passages = [{"prompt": f"w{3 + i} w{9 + i} w{4 + i}", "answer": f"w{12 + i} w{13 + i}"} for i in range(4)]
    lines = [" ".join(f"w{3 + (i * 5 + j * 11) % 50}" for j in range(4)) for i in range(12)]
    (folder / "sentences.txt").write_text("\n".join(lines))
    samples = [f"w{3 + i % 40} w{4 + i * i % 50},{(i * 37 % 101) / 10},{(i * i * 53 % 97) / 10}" for i in range(60)]
    (folder / "recording.csv").write_text("\n".join(["words,left,right", *samples]))
    (folder / "verdicts").mkdir()
    (folder / "architecture.json").write_text(json.dumps(asdict(architecture_of("llama"))))
    preferences = [
        {"prompt": f"w{3 + i} ", "better": "w9 w4", "worse": f"w{12 + i}", **aspect}
        for i in range(4) for aspect in ({}, {"aspect": "length"})
    ]  # fmt: skip
    for name, entries in (
        ("facts", facts), ("said", known), ("choices", choices), ("passages", passages), ("preferences", preferences)
    ):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setattr(architecture, "_registered", {})  # what `--architecture` adds to


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line as a user does; gives what it prints, or the one line that refuses it."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["transect", *map(str, words)])
        code = 0
        with contextlib.suppress(SystemExit):
            try:
                main()
            except SystemExit as stop:
                code = stop.code
                raise
        said = capsys.readouterr()
        assert code in (0, 1), said.err
        lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == code, said.err
        return lines[0] if lines else said.out

    return run


def chosen(entry):
    """A value for each parameter of an entry: its default, a short one, or for a name of a common option another."""
    common = {option.name for one in main_group.commands.values() for option in one.params}
    short = SHORT.get(entry.name, {})
    values = {}
    for parameter in entry.parameters:
        value = parameter.default
        if parameter.name in common and parameter.kind is int:
            value = value + 5
        values[parameter.name] = short.get(parameter.name, value)
    return values


def spelled(entry, values):
    return [f"--{entry.name}.{name.replace('_', '-')}={value}" for name, value in values.items()]


def given(entry, complete):
    """Words for the parameters: all of them, or where the defaults take long those that make it short."""
    values = chosen(entry) if complete else {
        name: value for name, value in SHORT.get(entry.name, {}).items() if name in {p.name for p in entry.parameters}
    }  # fmt: skip
    return values, spelled(entry, values)


def history(folder):
    """What was done last to the model in a folder, by its config.json."""
    config = json.loads((folder / "config.json").read_text())
    return (config.get("transect") or config["quantization_config"]["record"])["history"][-1]


def ids(entries):
    return [entry.name for entry in entries]


def in_turn(entries):
    """Cases of an entry, or the name of one, and whether all its options are given."""
    return [
        pytest.param(entry, complete, id=f"{getattr(entry, 'name', entry)}-{'options' if complete else 'plain'}")
        for number, entry in enumerate(entries)
        for complete in ([number % 2 == 1] if suite.SHORT else [False, True])
    ]


def test_names_are_of_one_thing():
    """Settings go by the name of what they are for, and options too."""
    every = [*methods(), *allocations()], probes(), edits(), conversions(), mergings(), [*TRAINED.values()]
    for together in every:
        assert len({entry.name for entry in together}) == len(together)
    for entry in itertools.chain(*every):
        assert "." not in entry.name and "=" not in entry.name


@pytest.mark.parametrize(("entry", "complete"), in_turn(methods()))
def test_methods(entry, complete, command, tmp_path):
    model = "mixtral" if entry.name == "expert-count" else "model"
    values, words = given(entry, complete)
    keep = KEEPS.get(entry.name, 0.7)
    line = ["compress", model, "--method", entry.name, "--keep", keep, "--data", "text.txt", "--out", tmp_path / "out"]
    said = command(*line, "--seed", SEED, "--sequences", 4, "--sequence-length", 16, *words)
    assert f"{tmp_path / 'out'}: kept" in said
    noted = history(tmp_path / "out")["compress"]
    assert noted["method"] == entry.name and values.items() <= noted["settings"].items()


@pytest.mark.parametrize(("entry", "complete"), in_turn(allocations()))
def test_allocations(entry, complete, command, tmp_path):
    values, words = given(entry, complete)
    assert goes_with(next(one for one in methods() if one.name == "svd"), entry.name)
    line = ["compress", "model", "--method", "svd", "--allocation", entry.name, "--keep", 0.7, "--data", "text.txt"]
    said = command(*line, "--sequences", 4, "--sequence-length", 16, "--out", tmp_path / "out", *words)
    assert f"{tmp_path / 'out'}: kept" in said
    noted = history(tmp_path / "out")["compress"]
    assert noted["allocation"] == entry.name and values.items() <= noted["allocation_settings"].items()


@pytest.mark.parametrize("complete", [False, True], ids=["plain", "options"])
def test_probes(complete, command, tmp_path):
    """All of them in one inspection; each says something or why it does not, and none fails."""
    words = [word for entry in probes() for word in given(entry, complete)[1]]
    asked = ["--facts", "facts.json", "--choices", "choices.json", "--passages", "passages.json", "--json"]
    line = ["inspect", "model", "--data", "text.txt", "--sequences", 4, "--sequence-length", 16, *asked]
    found = json.loads(command(*line, "--out", tmp_path / "out", *words))
    assert not found["failed"]
    assert {*found["findings"], *found["refused"]} == {entry.name for entry in probes()}


@pytest.mark.parametrize(("entry", "complete"), in_turn(edits()))
def test_edits(entry, complete, command, tmp_path):
    """It is written, or refused in a line for a reason of its own; it does not fail."""
    values, words = given(entry, complete)
    asked = ["--edits", "facts.json", "--choices", "choices.json", "--passages", "passages.json", "--json"]
    line = ["edit", "model", "--method", entry.name, "--data", "text.txt", *asked, "--out", tmp_path / "out"]
    said = command(*line, "--sequences", 4, "--sequence-length", 16, *words)
    if said.startswith("error: "):
        assert entry.name in said and not (tmp_path / "out").exists()
    else:
        card = json.loads(said)
        assert card["edit"] == entry.name and values.items() <= card["settings"].items()
        assert history(tmp_path / "out")["edit"] == entry.name


@pytest.mark.parametrize(("entry", "complete"), in_turn(conversions()))
def test_conversions(entry, complete, command, tmp_path):
    """It is written, trained by its stages where it has any, or refused in a line for a reason of its own."""
    values, words = given(entry, complete)
    line = ["convert", "model", "--method", entry.name, "--data", "text.txt", "--out", tmp_path / "out", "--json"]
    steps = ["--steps", "2"] if entry.training(entry.settings(values)) else []
    said = command(*line, "--sequences", 4, "--sequence-length", 16, "--batch-size", "2", *steps, *words)
    if said.startswith("error: "):
        assert entry.name in CONVERTED_FROM_OTHERS and not (tmp_path / "out").exists(), said
    else:
        outcome = json.loads(said)
        noted = history(tmp_path / "out")["convert"]
        assert outcome["method"] == noted["method"] == entry.name and values.items() <= noted["settings"].items()


@pytest.mark.parametrize(("which", "complete"), in_turn(TRAINED))
def test_trainings(which, complete, command, tmp_path):
    """Whatever it can be made of: what is trained, by which steps, with what beside the loss, at which rates."""
    option, entry = which.partition(" ")[0], TRAINED[which]
    values, words = given(entry, complete)
    method = [] if option == "--method" else ["--method", "full" if option == "--penalties" else "lora"]
    line = ["adapt", "model", *method, option, entry.name, "--data", "text.txt", "--out", tmp_path / "out", "--json"]
    line += ["--sequences", 6, "--sequence-length", 16, "--batch-size", 2, "--steps", 2, "--device", "cpu"]
    said = command(*line, *words)
    if said.startswith("error: "):  # of another model than this one
        assert entry.name == "s-kan" and "has no S-KAN part" in said and not (tmp_path / "out").exists()
        return
    noted = json.loads(said)["settings"]
    where = {"--method": "options", "--optimizer": "optimizer_options", "--layer-rates": "layer_rates_options"}
    chosen = noted["penalties"][entry.name] if option == "--penalties" else noted[where[option]]
    assert values.items() <= chosen.items()


@pytest.mark.parametrize("name", comparisons())
def test_comparisons(name, command, tmp_path):
    """Each says something of two models or why it does not, and none fails."""
    asked = ["--facts", "facts.json", "--passages", "passages.json", "--json", "--out", tmp_path / "out"]
    line = ["diff", "model", "model", "--what", name, "--data", "text.txt", *asked]
    found = json.loads(command(*line, "--sequences", 4, "--sequence-length", 16))
    assert not found["failed"] and {*found["findings"], *found["refused"]} == {name}


@pytest.mark.parametrize("entry", studies(), ids=ids(studies()))
def test_studies(entry, command, tmp_path):
    """Each is small enough with the settings in `SHORT`, and takes every one of its settings."""
    values, words = given(entry, True)
    found = json.loads(command("study", entry.name, "--out", tmp_path / "out", "--json", *words))
    assert found["findings"] and values.items() <= found["settings"].items()
    assert all((tmp_path / "out" / name).exists() for name in ("index.html", *entry.files))


@pytest.mark.parametrize(("entry", "complete"), in_turn(searchers()))
def test_searches(entry, complete, command, tmp_path):
    values, words = given(entry, complete)
    line = ["search", "model", "--method", entry.name, "--keep", 0.8, "--data", "text.txt", "--neurons", "24,48"]
    said = command(*line, "--sequences", 12, "--sequence-length", 16, "--batch-size", 2, "--steps", 2, "--json",
                   "--device", "cpu", "--out", tmp_path / "out", *words)  # fmt: skip
    noted = json.loads(said)["settings"]
    assert noted["method"] == entry.name and values.items() <= noted["options"].items()


@pytest.mark.parametrize(("entry", "complete"), in_turn(mergings()))
def test_mergings(entry, complete, command, tmp_path):
    values, words = given(entry, complete)
    base = ["--base", "model"] if entry.needs_base else []
    line = ["merge", "model", "model", "--method", entry.name, *base, "--out", tmp_path / "out", "--json", *words]
    outcome = json.loads(command(*line))
    noted = history(tmp_path / "out")["merge"]
    assert outcome["method"] == noted["method"] == entry.name and values.items() <= noted["settings"].items()


# Conversions of other models than the one that these commands are tried on.
CONVERTED_FROM_OTHERS = {"ia-red2", "rms-norms", "sret", "symmetrize-attention"}


def spelled_short(name):
    return spelled(study_named(name), SHORT[name])


# A command: its arguments, what it needs beside `VALUES`, and flags that do not go with the others.
COMMANDS = {
    "adapt": (
        ["model"],
        {"method": "lora", "forgets": "text.txt", "penalties": "decorrelation", "layer_rates": "farms"}, [],
    ),
    "build": (
        ["model"],
        {"hidden": "32", "blocks": "2", "heads": "4", "key_value_heads": "2", "head_size": "8", "neurons": "48",
         "vocabulary": "64", "length": "32", "mixer": "pooling", "mlp": "plain", "norm": "rms",
         "matrix": "memoryformer", "block": "ultramem-v2", "tokenizer": "model"},
        ["activation"],  # an MLP brings its own
    ),
    "catalogue": ([], {"records": "verdicts"}, []),
    "check-architecture": (["architecture.json"], {}, []),
    "claims": (["fwsvd/below-svd"], {}, []),
    "compare": (
        ["model"], {"methods": "svd,svd-llm", "keep": "0.8,0.6", "sequence_length": "12", "facts": "said.json",
                   "also": "text.txt", "beside": "model"},
        ["stream", "dry_run"],
    ),
    "compress": (["model"], {"method": "svd-llm"}, ["stream"]),
    "convert": (["model"], {"method": "liger", "train": "lora", "lowers": "own", "lengths": "8,16"}, []),
    "diff": (["model", "model"], {"what": "weights,text"}, []),
    "edit": (["model"], {"method": "kfac-edit", "name": "mine"}, ["undo", "list_edits", "dependents"]),
    "eval": (["model"], {}, []),
    "inspect": (["model"], {}, []),
    "memorize": (["model"], {"neighbours": "4"}, []),
    "merge": (["model", "model"], {"method": "average", "curve": "text.txt"}, ["base"]),
    "methods": (["svd"], {}, []),
    "prefer": (
        ["model"],
        {"data": "preferences.json", "eval_data": "preferences.json", "categories": "all", "aspects": "length",
         "rank": "4", "batch_size": "2"}, [],
    ),
    "race": (
        ["model"],
        {"adapters": "lora,full", "forgets": "text.txt", "shares": "0.2", "rates": "1", "optimizer": "adamw",
         "layer_rates": "farms", "penalties": "decorrelation"},
        [],
    ),
    "recover": (["model"], {"how": "distill"}, []),
    "study": (["organism-questions", *spelled_short("organism-questions")], {}, []),
    "search": (["model"], {"neurons": "24,48", "heads": "1,2", "depth": "2,3", "hidden": "16,32"}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", main_group.commands)
def test_commands_with_what_they_require_and_with_every_option(name, command, place, tmp_path):
    assert name in COMMANDS, f"{name} is new: say in COMMANDS what its arguments are"
    arguments, special, left_out = COMMANDS[name]
    plain, complete = [], []
    for option in main_group.commands[name].params:
        if not isinstance(option, click.Option) or option.name in (*left_out, "revision"):
            continue  # a local folder has no revisions
        if option.is_flag:
            complete.append(option.opts[0])
            continue
        known = {**VALUES, **special}
        assert option.name in known or option.default is not None, f"give {option.opts[0]} a value in VALUES"
        value = known.get(option.name) or option.default
        words = [option.opts[0], tmp_path / value if option.name in ("out", "cache") else value]
        complete += words
        if option.required or option.name in ("model", "method", "data", "eval_data", "passages"):
            plain += words
    if "out" in {option.name for option in main_group.commands[name].params}:
        plain += [] if "--out" in plain else ["--out", tmp_path / "out"]
    for words in (plain, complete):
        said = command(name, *arguments, *words)
        assert said and not said.startswith("error"), (name, said)


def test_a_parameter_that_is_called_as_an_argument_is_given_by_the_name_of_its_method():
    data = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(5))
    model = transect.compress(tiny("llama"), "armor", 0.7, data, seed=3, settings={"armor": {"seed": 8}}, rounds=1)
    noted = transect.Anatomy(model).record.history[-1]["compress"]["settings"]
    assert noted["seed"] == 8 and noted["rounds"] == 1
    for settings, message in [
        ({"armor": {"rounds": 2}}, "armor: rounds was given twice"),
        ({"svd-llm": {"shrinkage": 0.1}}, "settings for svd-llm, but only armor, uniform can"),
        ({"armor": {"turns": 2}}, "armor has no parameter turns"),
    ]:
        with pytest.raises(TransectError, match=message):
            transect.compress(tiny("llama"), "armor", 0.7, data, settings=settings, rounds=1)
