"""Code that comes with a model never runs, and nobody is asked; nor is an adapter used without a word."""

import ast
import io
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import transect
from transect.checkpoint import open_model, save
from transect.cli import main_group
from transect.errors import BadCheckpoint, TransectError

from ..models import tiny
from ..test_checkpoint import tokenizer

PACKAGE = Path(transect.__file__).parent


def edit(file, **entries):
    value = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**value, **entries}))


def config(folder):
    edit(folder / "config.json", model_type="novel", auto_map={
        "AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C", None],
    })  # fmt: skip


def tokens(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="Novel", auto_map={"AutoTokenizer": ["evil.C", "evil.C"]})


def images(folder):
    edit(folder / "preprocessor_config.json", image_processor_type="Novel", auto_map={"AutoImageProcessor": "evil.C"})


def generation(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "evil.py").read_text())


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """What the code in `folder` writes when it runs. Whoever asks hears a yes."""
    marker, folder = tmp_path / "ran", tmp_path / "m"
    save(tiny("llama"), folder, tokenizer())
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass C: pass\ndef generate(*a): pass\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    (tmp_path / "text.txt").write_text("w5 w9 w7 " * 200)
    return marker


@pytest.mark.parametrize("needed", [config, tokens, images])
def test_code_in_a_folder_never_runs(marker, tmp_path, needed):
    folder = tmp_path / "m"
    needed(folder)
    text, out = str(tmp_path / "text.txt"), str(tmp_path / "out")
    with pytest.raises(TransectError, match="never runs such code"):
        open_model(folder)
    commands = [
        ["eval", str(folder), "--data", text], ["inspect", str(folder), "--probes", "nuclear-norm", "--out", out],
        ["compress", str(folder), "--method", "svd", "--keep", "0.5", "--out", out],
        ["compress", str(folder), "--method", "svd", "--keep", "0.5", "--out", out, "--stream"],
    ]  # fmt: skip
    for command in commands:
        run = CliRunner().invoke(main_group, command, input="y\n" * 20)
        if not (needed is not config and "--stream" in command):  # which needs neither tokenizer nor processor
            assert isinstance(run.exception, TransectError) and len(str(run.exception)) < 500, (command, run.exception)
            assert "never runs such code" in str(run.exception)
        assert not marker.exists(), command


def test_code_that_nothing_needs_does_no_harm(marker, tmp_path):
    folder = tmp_path / "m"
    generation(folder)
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})
    opened = open_model(folder)
    assert type(opened.model).__module__.startswith("transformers.") and "generate" not in vars(opened.model)
    assert not marker.exists()


def test_every_call_goes_through_one_door():
    """The rule holds for calls that are yet to be written."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                found.append(file.relative_to(PACKAGE).as_posix())
    assert found == ["pretrained.py"]


@pytest.mark.parametrize("entries", [
    {"attn_implementation": "somebody/attention"}, {"attn_implementation": {"": "somebody/attention"}},
    {"transformers_weights": "other.safetensors"}, {"fusion_config": {"x": 1}}, {"__class__": "x"},
    {"get_text_config": 5}, {"to_dict": {}},
])  # fmt: skip
def test_config_entries_that_stand_for_other_code_or_weights(tmp_path, entries):
    save(tiny("llama"), tmp_path / "m")
    edit(tmp_path / "m" / "config.json", **entries)
    with pytest.raises(BadCheckpoint, match=rf"config\.json.*({next(iter(entries))}|callable)"):
        open_model(tmp_path / "m")


def test_shards_that_transformers_would_prefer(tmp_path):
    save(tiny("llama", seed=1), tmp_path / "other")
    save(tiny("llama"), tmp_path / "m")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "m" / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(BadCheckpoint, match="distributed"):
        open_model(tmp_path / "m")


def test_an_adapter_beside_a_model_is_refused(tmp_path):
    folder = save(tiny("llama"), tmp_path / "m", tokenizer())
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(folder)
    assert (folder / "adapter_config.json").exists() and (folder / "config.json").exists()
    (tmp_path / "text.txt").write_text("w5 w9 w7 " * 200)
    out = tmp_path / "out"
    compress = ["compress", str(folder), "--method", "svd", "--keep", "1", "--out", str(out)]
    for command in (compress, [*compress, "--stream"], ["eval", str(folder), "--data", str(tmp_path / "text.txt")]):
        run = CliRunner().invoke(main_group, command)
        assert isinstance(run.exception, BadCheckpoint) and "merge_and_unload" in str(run.exception), command
    assert not out.exists()
    for file in [*folder.glob("adapter_model*"), folder / "config.json"]:
        file.unlink()
    with pytest.raises(BadCheckpoint, match="not a model"):
        open_model(folder)
