"""CONTRIBUTING.md keeps its word: its examples are executed as they stand, in order, and leave nothing behind."""

import ast
import importlib
import json
import re
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import transect
import transect.claims
from transect.anatomy import Anatomy, architecture
from transect.claims import registry as claim_registry
from transect.cli import main_group
from transect.compression import registry
from transect.errors import UnknownArchitecture
from transect.forward.description.bench import CHECKS

from . import models, test_anatomy, test_architectures, test_compress

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text()
PACKAGE = Path(transect.__file__).parent


def section(heading):
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def blocks(heading):
    """(language, title or "", text) of every fenced block of a section."""
    found = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', section(heading), re.M | re.S)
    assert section(heading).count("```") == 2 * len(found)
    return found


def say(text):
    """Run the commands of a console block; what each printed."""
    printed = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        assert words[:2] == ["$", "transect"]
        result = CliRunner().invoke(main_group, words[2:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        printed.append(result.stdout)
    return printed


def write_model(folder, model):
    words = ["<unk>", *(f"w{i}" for i in range(1, models.VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with two texts, and registries that are as they were afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(claim_registry, "_claims", dict(claim_registry._claims))
    monkeypatch.setattr(architecture, "_registered", {})
    for name, step in (("calibration", 7), ("held_out", 11)):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{(i * step + i * i // 5) % 60 + 3}" for i in range(400)))
    return tmp_path


def put(monkeypatch, folder, title, text):
    """Write a module of the package into `folder`, where Python's own import finds it as if it stood in the package."""
    path = folder / title
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    parts = path.relative_to(folder).with_suffix("").parts
    package = importlib.import_module(".".join(parts[:-1]))
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(path.parent)])
    monkeypatch.setitem(sys.modules, ".".join(parts), None)  # so that undoing removes the entry ...
    del sys.modules[".".join(parts)]  # ... and importing makes it
    monkeypatch.setattr(package, parts[-1], None, raising=False)
    monkeypatch.delattr(package, parts[-1])
    importlib.import_module(".".join(parts))  # as the package itself does for every file in its folder


def test_the_method_and_its_claim(here, monkeypatch):
    write_model(here / "my-model", models.tiny("llama"))
    printed = []
    for language, title, text in blocks("Add a method"):
        if language == "console":
            printed += say(text)
        elif title.startswith("tests/"):
            assert run_tests(text) == 5
        else:
            put(monkeypatch, here, title, text)
    listed, compressed, evaluated, streamed, compared, claimed = printed
    assert "rms-svd (factorization), the diagonal case" in listed and "0 to 2" in listed and "power" in listed
    assert "kept" in compressed and "kept" in streamed and "loss" in evaluated
    assert compared.count("rms-svd") == 2 and "rms-svd/below-svd" in claimed
    config = json.loads((here / "small" / "config.json").read_text())
    assert config["quantization_config"]["record"]["history"][-1]["compress"]["settings"] == {"power": 0.5}
    assert "--rms-svd.power" in CliRunner().invoke(main_group, ["compress", "--help"]).stdout


def test_the_method_that_changes_structure(here, monkeypatch):
    write_model(here / "my-model", models.tiny("llama"))
    printed = []
    for language, title, text in blocks("Add a method that changes structure"):
        if language == "console":
            printed += say(text)
        elif title.startswith("tests/"):
            assert run_tests(text) == 4
        else:
            put(monkeypatch, here, title, text)
    compressed, evaluated, compared = printed
    assert "kept" in compressed and "loss" in evaluated and "large-neurons" in compared
    config = json.loads((here / "narrow" / "config.json").read_text())
    assert "quantization_config" not in config  # the same width in every block is an ordinary model


def run_tests(text):
    """Call every test of a file, with each combination of its parameters; how many calls that were."""
    namespace = {"__name__": "page"}
    exec(compile(text, "tests of the page", "exec"), namespace)
    calls = 0
    for name, function in namespace.items():
        if not name.startswith("test_"):
            continue
        combinations = [{}]
        for mark in getattr(function, "pytestmark", []):
            argument, values = mark.args
            combinations = [{**given, argument: value} for given in combinations for value in values]
        for given in combinations:
            function(**given)
        calls += len(combinations)
    return calls


def test_nothing_of_the_example_is_left():
    """Runs after the example, and would also fail if the method had been built in since."""
    assert not {"rms-svd", "large-neurons"} & {method.name for method in transect.methods()}
    assert not [name for name in sys.modules if "rms_svd" in name or "large_neurons" in name]
    assert not hasattr(transect.compression.catalog, "rms_svd") and not hasattr(transect.claims, "rms_svd")
    assert not [claim for claim in transect.claims.claims() if claim.method == "rms-svd"]
    assert "glm" not in architecture.known_model_types()


def glm(monkeypatch):
    """The page's line for tests/models.py, in place; the tiny model is `models.tiny("glm")`."""
    (line,) = [text for _, title, text in blocks("Add an architecture") if title == "tests/models.py"]
    ((name, entry),) = eval(f"{{{line}}}", vars(models)).items()
    assert name not in models.CONFIGS and name not in models.MORE_CONFIGS
    monkeypatch.setitem(models.MORE_CONFIGS, name, entry)
    return name


def test_the_architecture_of_a_user(here, monkeypatch):
    write_model(here / "my-glm", models.tiny(glm(monkeypatch)))
    with pytest.raises(UnknownArchitecture, match=r"'glm' is not described yet.*CONTRIBUTING\.md"):
        transect.compress("my-glm", "svd", 0.6)
    ran, printed = [], []
    for language, title, text in blocks("Add an architecture"):
        ran.append(language)
        if language == "json":
            (here / title).write_text(text)
        elif language == "console":
            printed.append(say(text))
            architecture._registered.clear()
        elif title != "tests/models.py":
            exec(compile(text, "CONTRIBUTING.md", "exec"), {})
    assert ran == ["json", "console", "console", "python", "python"]
    (alone, with_model, listed), (compressed, evaluated) = printed
    assert alone.count("holds") == with_model.count("holds") == len(CHECKS) and "FAILS" not in alone
    assert "gpt_neox" in listed and " glm " not in listed
    assert "kept" in compressed and "loss" in evaluated


@pytest.fixture
def dropped_in(here, monkeypatch):
    """The JSON of the page lies beside the built-in ones, and the tiny model is one of `MORE_CONFIGS`."""
    folder = here / "anatomy" / "architectures"
    shutil.copytree(PACKAGE / "anatomy" / "architectures", folder)
    ((title, text),) = [(title, text) for language, title, text in blocks("Add an architecture") if language == "json"]
    (folder / title).write_text(text)
    monkeypatch.setattr(architecture, "resources", SimpleNamespace(files=lambda package: here / "anatomy"))
    architecture._built_in.cache_clear()
    yield glm(monkeypatch)
    architecture._built_in.cache_clear()


def test_the_architecture_of_a_contributor(dropped_in, tmp_path):
    """The tests that go over all architectures and some that go over CONFIGS, for the architecture of the page."""
    test_architectures.test_every_check_holds_of_every_built_in_description(dropped_in)
    test_architectures.test_what_was_changed_is_saved_loads_and_generates(dropped_in, tmp_path / "changed")
    test_anatomy.test_every_matrix_maps_its_input_to_its_output(dropped_in)
    test_anatomy.test_permuting_neurons_and_heads_leaves_the_logits_unchanged(dropped_in)
    test_anatomy.test_removing_a_neuron_or_head_equals_zeroing_it(dropped_in)
    test_anatomy.test_dropped_sublayers_and_blocks_add_nothing(dropped_in)
    test_compress.test_every_architecture_is_compressed_within_its_budget_by_every_method(dropped_in)
    anatomy = Anatomy(models.tiny(dropped_in))
    norms = {*anatomy.blocks[0].norms.values(), anatomy.final_norm}
    assert {type(norm).__name__ for norm in norms} == {"GlmRMSNorm"} and len(norms) == 3
    assert anatomy.config_value("neurons") == 48
    check_mlp(anatomy)
    # Fewer heads and neurons in every block are still an ordinary model, which needs no Transect.
    for block in anatomy.blocks:
        block.attention.keep([2, 3])
        block.mlp.keep(range(20))
    anatomy.model.save_pretrained(tmp_path / "narrow")
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert "quantization_config" not in config and (config["num_attention_heads"], config["head_dim"]) == (2, 8)
    again, batch = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow"), models.inputs(dropped_in)
    models.assert_same_model(again, anatomy.model, batch)


def check_mlp(anatomy):
    """What enters `down` is activation(gate x) * up x, with the parts of the fused matrix in this order."""
    seen, mlp = {}, anatomy.blocks[1].mlp
    for matrix in (mlp.up, mlp.down):
        matrix.module.register_forward_pre_hook(lambda module, args, role=matrix.role: seen.update({role: args[0]}))
    models.logits(anatomy.model, models.inputs("glm"))
    expected = mlp.activation(seen["up"] @ mlp.gate.weight.T) * (seen["up"] @ mlp.up.weight.T)
    torch.testing.assert_close(seen["down"], expected, rtol=1e-5, atol=1e-5)


def test_every_key_of_an_architecture_is_explained():
    table = section("Add an architecture").split("| key |")[1].split("\n\n")[0]
    explained = {key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert explained == {field.name for field in fields(architecture.Architecture)}
    assert "glm" in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES


def rooms():
    """The names in the page's table of rooms, from the ground up."""
    return re.findall(r"^\| `(\w+)` \|", section("The rooms"), re.M)


def test_imports_point_at_rooms_above_in_the_table():
    order = rooms()
    everybody = re.findall(r"`(\w+)`", section("The rooms").rpartition("Beside them")[2])
    found = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {*order, *everybody} == found - {"__init__", "__main__", "__pycache__"}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts in (("__init__",), ("__main__",)):
            continue
        for target in imported(path, parts):
            floor = order.index(parts[0]) if parts[0] in order else -1
            if target != parts[0] and target not in everybody and order.index(target) > floor:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {target}")
    assert not wrong


def imported(path, parts):
    """The rooms that a file imports from, wherever in the file it does so."""
    here = ["transect", *parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            full = [*base, *(node.module.split(".") if node.module else [])]
            if full[:1] == ["transect"]:
                yield from full[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("transect."))


@pytest.mark.parametrize("room", ["compression", "probes", "editing"])
def test_methods_do_not_know_each_other(room):
    catalog = PACKAGE / room / "catalog"
    wrong = []
    for path in sorted(catalog.rglob("*.py")):
        own = path.relative_to(catalog).with_suffix("").parts
        if own == ("__init__",):
            continue
        here = ["transect", room, "catalog", *own[:-1]]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = here[: len(here) - node.level + 1] if node.level else []
            full = [*base, *(node.module or "").split("."), *(alias.name for alias in node.names)]
            if full[:3] == here[:3] and full[3] != own[0]:
                wrong.append(f"{path.relative_to(catalog)} imports {full[3]}")
    assert not wrong


def test_the_commands_of_the_page_exist():
    targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    assert set(re.findall(r"`make (\w+)`", PAGE)) == {"test", "lint", "demo", "bench", "nightly"} <= set(targets)
    for link in re.findall(r"\]\(#([a-z-]+)\)", PAGE):
        assert link in {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.+)$", PAGE, re.M)}
