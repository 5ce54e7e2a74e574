"""Damaged folders, wrong names, full disks and Ctrl-C: one clear error each, and nothing that was there is lost."""

import contextlib
import errno
import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from transect.anatomy import StructureRecord
from transect.checkpoint import check_folder, open_model, replay, save
from transect.errors import BadCheckpoint, TransectError

from .models import assert_same_model, inputs, tiny
from .reliability.faults import Failing
from .test_checkpoint import change, tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "m"
    save(change(tiny("llama")), folder, tokenizer(), max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(good, tmp_path):
    shutil.copytree(good, tmp_path / "m")
    return tmp_path / "m"


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def refused(folder, *words):
    """Before anything is loaded, and by `open_model`, with the same words."""
    for call in (check_folder, open_model):
        with pytest.raises(BadCheckpoint) as caught:
            call(folder)
        for word in words:
            assert word in str(caught.value)


def test_a_whole_folder_passes(good):
    check_folder(good)
    assert len(shards(good)) > 2


def test_a_missing_shard_is_named(folder):
    shards(folder)[1].unlink()
    refused(folder, "lacks the shard", "model-00002-of")


def test_a_truncated_shard_is_named(folder):
    shard = shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    refused(folder, shard.name, "truncated")


def test_a_shard_that_is_too_long_is_named(folder):
    shard = shards(folder)[0]
    shard.write_bytes(shard.read_bytes() + b"\0" * 4)
    refused(folder, shard.name, "too long")


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, struct.pack("<Q", 4) + b"nope", b"\0" * 64])
def test_a_shard_without_a_header_is_named(folder, content):
    shard = shards(folder)[0]
    shard.write_bytes(content)
    refused(folder, shard.name)


def test_a_header_that_belies_its_shapes_is_named(folder):
    shard = shards(folder)[0]
    content = shard.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = next(key for key, entry in header.items() if key != "__metadata__" and entry["shape"] not in ([0], []))
    header[name]["shape"][0] += 1
    new = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
    refused(folder, name, "bytes")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_truncation_is_noticed(good, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut") / "m"
    shutil.copytree(good, folder)
    shard = data.draw(st.sampled_from(shards(folder)))
    content = shard.read_bytes()
    shard.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(BadCheckpoint, match=shard.name):
        check_folder(folder)


def test_an_index_that_names_other_tensors(folder):
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.layers.9.mlp.up_proj.weight"] = shards(folder)[0].name
    index.write_text(json.dumps(table))
    refused(folder, "layers.9")
    index.write_text("{}")
    refused(folder, "weight_map")


def test_a_missing_or_damaged_config(folder):
    (folder / "config.json").write_text('{"model_type": ')
    refused(folder, "config.json")
    (folder / "config.json").write_text("[1]")
    refused(folder, "JSON object")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


def test_a_pickle_is_refused(tmp_path):
    tiny("llama").config.save_pretrained(tmp_path)
    for name in ("pytorch_model.bin", "model.pt"):
        torch.save({"x": torch.ones(1)}, tmp_path / name)
        refused(tmp_path, "pickle", name)
        (tmp_path / name).unlink()
    refused(tmp_path, "no model.safetensors")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda record: record.pop("format"), "format"),
        (lambda record: record.update(format=99), "format 99"),
        (lambda record: record["modules"]["model.layers.0.self_attn.q_proj"].update(rank=4), "does not fit"),
        (lambda record: record["modules"]["model.layers.0.self_attn.q_proj"].update(kind="magic"), "magic"),
        (lambda record: record["modules"]["model.layers.0.self_attn.q_proj"].pop("rank"), "q_proj"),
        (lambda record: record["modules"].pop("model.layers.0.self_attn.q_proj"), "q_proj.weight has shape [0]"),
        (lambda record: record["modules"].update({"model.layers.7.mlp.up_proj": {"kind": "conv1d"}}), "layers.7"),
        (lambda record: record["parameters"].update({"model.norm.weight": [31]}), "model.norm.weight"),
        (lambda record: record["attributes"].update({"model.layers.7.mlp": {"x": 1}}), "layers.7"),
        (lambda record: record.update(modules=[1]), "should hold objects"),
    ],
)
def test_a_record_that_does_not_fit(folder, edit, words):
    edit_config(folder, lambda config: edit(config["quantization_config"]["record"]))
    with pytest.raises(BadCheckpoint) as caught:
        open_model(folder)
    assert words in str(caught.value)


def test_a_missing_record(folder):
    edit_config(folder, lambda config: config["quantization_config"].pop("record"))
    refused(folder, "no structure record")


def test_a_record_for_another_model_names_the_path():
    with pytest.raises(BadCheckpoint, match=r"transformer\.h\.0.*LlamaForCausalLM"):
        replay(tiny("llama"), StructureRecord(modules={"transformer.h.0.mlp.c_fc": {"kind": "linear"}}))


def test_a_missing_tensor_is_named(tmp_path):
    save(tiny("llama"), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"layers\.1\.mlp\.up_proj"):
        open_model(tmp_path / "m")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    model = tiny("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = value
    save(model, tmp_path / "m")
    with pytest.raises(BadCheckpoint, match=r"h\.1\.mlp\.c_fc\.weight"):
        open_model(tmp_path / "m")


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    save(tiny("llama"), tmp_path / "m", tokenizer(70))
    with pytest.raises(BadCheckpoint, match=r"disagree.*69.*64"):
        open_model(tmp_path / "m")


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(BadCheckpoint, match="tokenizer"):
        open_model(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "a/b/c"])
def test_a_folder_that_does_not_exist(name):
    with pytest.raises(TransectError, match="no folder"):
        open_model(name)


def test_a_name_that_is_nowhere(monkeypatch, tmp_path, folder):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TransectError, match=r"no local folder 'no-such-model'.*hub"):
        open_model("no-such-model")
    with pytest.raises(TransectError, match="is a file"):
        open_model(folder / "config.json")


def test_a_class_that_transformers_does_not_have(folder):
    edit_config(folder, lambda config: config.update(architectures=["NovelForCausalLM"]))
    with pytest.raises(TransectError, match="NovelForCausalLM"):
        open_model(folder)
    edit_config(folder, lambda config: config.update(model_type="novel"))
    with pytest.raises(TransectError, match="novel"):
        open_model(folder)


def test_an_existing_folder_needs_overwrite(folder, tmp_path):
    before = contents(folder)
    with pytest.raises(TransectError, match="--overwrite"):
        save(tiny("gpt2"), folder)
    assert contents(folder) == before
    save(tiny("gpt2"), folder, overwrite=True)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    (tmp_path / "empty").mkdir()
    save(tiny("gpt2"), tmp_path / "empty")
    with pytest.raises(TransectError, match="is a file"):
        save(tiny("gpt2"), folder / "config.json", overwrite=True)


def test_a_save_that_was_killed_is_pointed_at(folder):
    (folder / ".m.previous-1").mkdir()
    (folder / "config.json").rename(folder / ".m.previous-1" / "config.json")
    with pytest.raises(BadCheckpoint, match=r"broken off.*\.m\.previous-1"):
        check_folder(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("there", ["nothing", "checkpoint", "tokenizer"])
def test_an_interruption_at_any_moment_leaves_the_old_or_the_new(tmp_path, there, error):
    """With a checkpoint there before: always a whole one, the old or the new, and the user's other files."""
    old, new = tiny("llama", seed=1), change(tiny("llama", seed=2))
    n = 0
    while True:
        n += 1
        parent = tmp_path / str(n)
        target = parent / "m"
        parent.mkdir()
        if there == "checkpoint":
            save(old, target)
            (target / "notes").mkdir()
            (target / "notes" / "mine.txt").write_text("mine")
        elif there == "tokenizer":
            tokenizer().save_pretrained(target)
        before = contents(target) if target.exists() else {}
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else TransectError
        with Failing(parent, n, error) as countdown, contextlib.suppress(expected):
            new.save_pretrained(target, max_shard_size="20KB")
        now = contents(target) if target.exists() else {}
        left = [entry for entry in os.listdir(parent) if entry != "m"]
        if left:  # it was stopped while it took away the old model, and the next save goes on with that
            assert now != before
            new.save_pretrained(target, max_shard_size="20KB")
        assert os.listdir(parent) in ([], ["m"]) and not list(target.glob(".*")), f"left behind at call {n}"
        if now != before:
            check_folder(target)
            assert set(before) - {"model.safetensors", "config.json", "generation_config.json"} <= set(now)
            loaded = open_model(target).model
            assert_same_model(loaded, new, inputs("llama"))
        if not countdown.fired:
            assert now != before
            break
    assert n > 5


def test_a_file_system_that_takes_no_more(folder):
    """A real refusal by the operating system, in the middle of the safetensors file."""
    before = contents(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        with pytest.raises(TransectError, match=r"could not be written.*untouched"):
            save(tiny("llama"), folder, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(folder) == before and os.listdir(folder.parent) == ["m"]


def test_nothing_is_pickled(good):
    assert {file.suffix for file in good.iterdir()} <= {".json", ".safetensors", ".py"}
