import errno
import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import transect
from transect.anatomy import Anatomy, record_of
from transect.checkpoint import folder_of, open_model
from transect.checkpoint.save import hugging_face_save
from transect.errors import BadCheckpoint, TransectError
from transect.evaluation import matrix_bytes
from transect.store import link
from transect.streaming import passes

from .models import CONFIGS, VOCABULARY, assert_alike, assert_same_tensors, tiny


@pytest.fixture
def folder(tmp_path):
    def save(name, **kwargs):
        tiny(name).save_pretrained(tmp_path / name, **kwargs)
        return tmp_path / name

    return save


DATA = torch.randint(3, VOCABULARY, (10, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("llama", "svd", {}), ("llama", "svd-llm", {}), ("llama", "fwsvd", {}),
        ("llama", "kfac-svd", {"allocation": "uniform"}),
        ("llama", "kfac-svd", {"allocation": "global"}), ("llama", "svd-llm", {"sequential": True}),
        ("llama", "kfac-svd", {"sequential": True, "allocation": "global"}), ("gpt2", "kfac-svd", {}),
        ("llama", "mixed", {"structures": "integer"}), ("gpt2", "mixed", {"structures": "integer"}),
        ("gemma3", "svd-llm", {}), ("phi3", "svd-llm", {"sequential": True}), ("gpt_neox", "kfac-svd", {}),
    ],
)  # fmt: skip
def test_streaming_gives_what_compressing_in_memory_gives(folder, tmp_path, name, method, options):
    source = folder(name, max_shard_size="20KB")
    outcome = transect.compress(source, method, 0.6, DATA, batch_size=4, **options, stream_to=tmp_path / "small")
    whole = transect.compress(tiny(name), method, 0.6, DATA, batch_size=4, **options)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(streamed(DATA).logits, whole(DATA).logits, rtol=1e-3, atol=1e-3)
    history = record_of(whole).history[-1]
    assert outcome["matrix_bytes"] == history["matrix_bytes"] <= 0.6 * outcome["dense_matrix_bytes"]
    names = {p.name for p in (tmp_path / "small").iterdir()}
    assert "model-00001-of-00004.safetensors" in names and not list(tmp_path.glob(".small*"))


@pytest.mark.parametrize("method", ["svd-llm", "kfac-svd"])
@pytest.mark.parametrize("stop", [2, 5, 9])
def test_an_interrupted_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, method, stop):
    source = folder("llama")
    expected = transect.compress(source, method, 0.6, DATA, batch_size=4, stream_to=tmp_path / "once")
    calls, original = [0], passes.run_block

    def interrupted(*args):
        calls[0] += 1
        if calls[0] == stop:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(passes, "run_block", interrupted)
    try:
        transect.compress(source, method, 0.6, DATA, batch_size=4, stream_to=tmp_path / "small")
    except KeyboardInterrupt:
        assert not (tmp_path / "small").exists()
    first = calls[0]
    transect.compress(source, method, 0.6, DATA, batch_size=4, stream_to=tmp_path / "small")
    assert calls[0] - first < (9 if method == "svd-llm" else 18) or first < 4  # blocks that were done are not run again
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("once", "small"))
    for (name, one), (_, two) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        torch.testing.assert_close(one, two, msg=name)
    assert expected["kept"] <= 0.6


def test_writing_resumes_with_the_structure_of_finished_shards(folder, tmp_path, monkeypatch):
    from transect.compression import compressors

    source, original, calls = folder("gpt2"), compressors.factorize_matrix, [0]

    def interrupted(*args):
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(compressors, "factorize_matrix", interrupted)
    with pytest.raises(KeyboardInterrupt):
        transect.compress(source, "svd-llm", 0.6, DATA, stream_to=tmp_path / "small")
    transect.compress(source, "svd-llm", 0.6, DATA, stream_to=tmp_path / "small")
    assert calls[0] == 9 + 12  # block 0's six matrices are not factorized again
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    whole = transect.compress(tiny("gpt2"), "svd-llm", 0.6, DATA)
    with torch.no_grad():
        torch.testing.assert_close(loaded(DATA).logits, whole(DATA).logits, rtol=1e-3, atol=1e-3)


def test_what_streaming_refuses(folder, tmp_path):
    source = folder("llama")
    for options, message in (
        ({"allocation": "ilp"}, "whole model"), ({"method": "mixed"}, "mixed.structures integer"),
        ({"keep": 0.001}, "leaves no rank"), ({"data": None}, "calibration"),
    ):  # fmt: skip
        given = {"method": "svd-llm", "keep": 0.5, "data": DATA} | options
        with pytest.raises(TransectError, match=message):
            transect.compress(source, **given, stream_to=tmp_path / "x")
    transect.compress(source, "svd", 0.5, stream_to=tmp_path / "small")
    with pytest.raises(TransectError, match="exists"):
        transect.compress(source, "svd", 0.5, stream_to=tmp_path / "small")
    with pytest.raises(TransectError, match="already"):
        transect.compress(tmp_path / "small", "svd", 0.5, stream_to=tmp_path / "smaller")
    model = tiny("llama")
    Anatomy(model).blocks[1].mlp.up.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(TransectError, match="up_proj"):
        transect.compress(tmp_path / "nan", "svd", 0.5, stream_to=tmp_path / "y")


# What is stored decides


def stored_as(kind, folder, name="llama"):
    """A dense folder whose weights are stored in bfloat16, in float16, or in bfloat16 with norms in float32."""
    model = tiny(name).to(torch.float16 if kind == "float16" else torch.bfloat16)
    for path, parameter in model.named_parameters():
        if kind == "mixed" and ("norm" in path or "ln_" in path):
            parameter.data = parameter.data.float()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "mixed"])
@pytest.mark.parametrize(("name", "method", "options"), [
    ("llama", "svd", {}), ("gpt2", "magnitude", {}), ("gemma3", "svd-llm", {"sequential": True}),
    ("llama", "kfac-svd", {"allocation": "global"}),
])  # fmt: skip
def test_sizes_and_tensors_in_half_precision_are_those_of_compressing_in_memory(tmp_path, kind, name, method, options):
    source = stored_as(kind, tmp_path / "dense", name)
    outcome = transect.compress(source, method, 0.6, DATA, batch_size=4, **options, stream_to=tmp_path / "streamed")
    whole = transect.compress(open_model(source).model, method, 0.6, DATA, batch_size=4, **options)
    whole.save_pretrained(tmp_path / "whole")
    history = Anatomy(whole).record.history[-1]
    assert {key: history[key] for key in outcome} == outcome and 0.5 < outcome["kept"] <= 0.6
    stored = sum(matrix.weight.numel() for matrix in Anatomy(tiny(name)).matrices()) * 2
    assert outcome["dense_matrix_bytes"] == stored  # two bytes a number: what lies on the disk
    streamed, again = (open_model(tmp_path / which).model for which in ("streamed", "whole"))
    configs = [json.loads((tmp_path / which / "config.json").read_text()) for which in ("streamed", "whole")]
    assert configs[0] == configs[1] and configs[0]["dtype"] == ("float16" if kind == "float16" else "bfloat16")
    assert matrix_bytes(Anatomy(streamed)) == outcome["matrix_bytes"]
    if method in ("svd", "magnitude"):  # nothing ran before, so nothing can have rounded differently
        assert_same_tensors(streamed, again)
    else:
        assert {n: (t.dtype, t.shape) for n, t in streamed.state_dict().items()} == {
            n: (t.dtype, t.shape) for n, t in again.state_dict().items()
        }
        assert_alike(streamed(DATA).logits, again(DATA).logits)


def test_a_folder_without_a_dtype_in_its_config_and_another_dtype_than_the_stored(tmp_path):
    source = stored_as("bfloat16", tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    half = transect.compress(source, "svd", 0.6, stream_to=tmp_path / "half")
    single = transect.compress(source, "svd", 0.6, dtype="float32", stream_to=tmp_path / "single")
    assert 2 * half["dense_matrix_bytes"] == single["dense_matrix_bytes"] and half["kept"] == single["kept"]
    for name, dtype in (("half", torch.bfloat16), ("single", torch.float32)):
        model = open_model(tmp_path / name).model  # in the dtype that the folder itself names
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_an_interrupted_run_in_half_precision_reports_what_an_uninterrupted_one_does(tmp_path, monkeypatch):
    source = stored_as("bfloat16", tmp_path / "dense")
    expected = transect.compress(source, "monarch", 0.6, stream_to=tmp_path / "once")
    with monkeypatch.context() as patch:
        patch.setattr("transect.streaming.compress._finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            transect.compress(source, "monarch", 0.6, stream_to=tmp_path / "small")
    assert (
        transect.compress(source, "monarch", 0.6, stream_to=tmp_path / "small") == expected
    )  # from finished shards alone
    assert_same_tensors(*(open_model(tmp_path / name).model for name in ("small", "once")))


def test_how_the_model_generates_is_kept(folder, tmp_path):
    """What generation_config.json says, and no config does: the tokens at which an assistant stops."""
    source = folder("llama")
    settings = json.loads((source / "generation_config.json").read_text()) | {"eos_token_id": [2, 5], "top_k": 7}
    (source / "generation_config.json").write_text(json.dumps(settings))
    transect.compress(source, "svd", 0.6, stream_to=tmp_path / "small")
    written = json.loads((tmp_path / "small" / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["top_k"]) == ([2, 5], 7)


def test_of_a_hub_model_all_is_fetched_that_the_result_needs(monkeypatch):
    asked = {}
    monkeypatch.setattr("transect.checkpoint.open.snapshot_download", lambda name, **more: asked.update(more) or name)
    folder_of("someone/some-model")
    for file in (
        "model-00001-of-00002.safetensors",
        "generation_config.json",
        "tokenizer.model",
        "chat_template.jinja",
    ):
        assert any(fnmatch(file, pattern) for pattern in asked["allow_patterns"]), file


def test_a_run_in_another_dtype_does_not_go_on_from_the_unfinished_one(folder, tmp_path, monkeypatch):
    source = folder("llama")
    with monkeypatch.context() as patch:
        patch.setattr("transect.streaming.compress._finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            transect.compress(source, "svd", 0.6, stream_to=tmp_path / "small")
    transect.compress(source, "svd", 0.6, dtype="bfloat16", stream_to=tmp_path / "small")
    stored = load_file(tmp_path / "small" / "model-00001-of-00004.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def interrupt(*args):
    raise KeyboardInterrupt


class Gated(LlamaForCausalLM):
    """Llama whose blocks' outputs pass through a stored buffer and one that no checkpoint holds; so does the last."""

    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.gate = nn.Buffer(torch.ones(config.hidden_size))
            layer.shift = nn.Buffer(torch.full((config.hidden_size,), 0.1 * number), persistent=False)
            layer.register_forward_hook(lambda layer, args, out: out * layer.gate + layer.shift)
        self.model.norm.gate = nn.Buffer(torch.ones(config.hidden_size))
        self.model.norm.register_forward_hook(lambda norm, args, out: out * norm.gate)


# What a config names, what the task is known by, and where the class that a checkpoint names is looked for.
Gated.__name__, Gated.__module__ = LlamaForCausalLM.__name__, LlamaForCausalLM.__module__


@pytest.mark.parametrize("method", ["svd-llm", "kfac-svd"])
def test_stored_buffers_are_read_and_written_and_others_survive(tmp_path, monkeypatch, method):
    monkeypatch.setattr("transect.checkpoint.open.transformers.LlamaForCausalLM", Gated)
    model = Gated(CONFIGS["llama"][0])
    model.load_state_dict(tiny("llama").state_dict(), strict=False)
    for name, buffer in model.named_buffers():
        if name.endswith("gate"):
            buffer.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(len(name)))
    hugging_face_save(model, tmp_path / "dense")
    transect.compress(tmp_path / "dense", method, 0.6, DATA, batch_size=4, stream_to=tmp_path / "small")
    whole = transect.compress(model, method, 0.6, DATA, batch_size=4)
    gates = {name: tensor for name, tensor in whole.state_dict().items() if name.endswith("gate")}
    stored = {}
    for file in (tmp_path / "small").glob("*.safetensors"):
        stored |= load_file(file)
    assert len(gates) == 4 and all(torch.equal(stored[name], gate) for name, gate in gates.items())
    assert stored.keys() == whole.state_dict().keys()
    for block in Anatomy(whole).blocks:
        for name, tensor in block.module.state_dict().items():
            torch.testing.assert_close(stored[f"{block.path}.{name}"], tensor, rtol=1e-3, atol=1e-3)


def test_weights_that_do_not_fit_the_config_are_refused_by_name(folder, tmp_path):
    source = folder("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(BadCheckpoint, match=r"layers\.0\.mlp.* has shape \[.*48.*\].* needs \[.*40.*\]"):
        transect.compress(source, "svd", 0.6, stream_to=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_stale_index_is_not_read(folder, tmp_path):
    """Where a folder has one file and an index of others, it is the one file that transformers loads."""
    source = folder("llama", max_shard_size="20KB")
    tiny("llama", seed=1).save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").rename(source / "model.safetensors")
    transect.compress(source, "svd", 1.0, stream_to=tmp_path / "small")
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), tiny("llama", seed=1))


@pytest.mark.parametrize("reason", [errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK])
def test_a_mount_without_hard_links_gets_copies(folder, tmp_path, monkeypatch, reason):
    def refuse(*args, **kwargs):
        raise OSError(reason, os.strerror(reason))

    expected = transect.compress(folder("llama"), "svd", 0.6, stream_to=tmp_path / "linked")
    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "notes.txt").write_text("mine")  # a folder that is there is joined
    assert transect.compress(folder("llama"), "svd", 0.6, overwrite=True, stream_to=tmp_path / "small") == expected
    linked, copied = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("linked", "small"))
    assert_same_tensors(copied, linked)
    names = {path.name for path in (tmp_path / "linked").iterdir()} | {"notes.txt"}
    assert {path.name for path in (tmp_path / "small").iterdir()} == names and not list(tmp_path.glob(".small*"))


def test_a_copy_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    """And mounts that know neither links nor modes and times can be written to."""
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("numbers")
    (tmp_path / "alias").symlink_to("a")

    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "not here")

    def half(source, target, **kwargs):
        Path(target).write_text("num")
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copystat", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", half)
        with pytest.raises(OSError, match="full"):
            link(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "alias"]
    link(source, target)
    link(tmp_path / "alias", tmp_path / "other")
    assert target.read_text() == "numbers" and os.readlink(tmp_path / "other") == "a"
