import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy, record_of
from transect.errors import TransectError
from transect.streaming import passes
from transect.verbs import compress_stream

from .models import VOCABULARY, tiny


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
        ("llama", "svd", {}), ("llama", "svd-llm", {}), ("llama", "fwsvd", {}), ("llama", "kfac-svd", {}),
        ("llama", "kfac-svd", {"allocation": "global"}), ("llama", "svd-llm", {"sequential": True}),
        ("llama", "kfac-svd", {"sequential": True, "allocation": "global"}), ("gpt2", "kfac-svd", {}),
        ("gemma3", "svd-llm", {}), ("phi3", "svd-llm", {"sequential": True}), ("gpt_neox", "kfac-svd", {}),
    ],
)  # fmt: skip
def test_streaming_gives_what_compressing_in_memory_gives(folder, tmp_path, name, method, options):
    source = folder(name, max_shard_size="20KB")
    outcome = compress_stream(source, tmp_path / "small", method, 0.6, DATA, batch_size=4, **options)
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
    expected = compress_stream(source, tmp_path / "once", method, 0.6, DATA, batch_size=4)
    calls, original = [0], passes.run_block

    def interrupted(*args):
        calls[0] += 1
        if calls[0] == stop:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(passes, "run_block", interrupted)
    try:
        compress_stream(source, tmp_path / "small", method, 0.6, DATA, batch_size=4)
    except KeyboardInterrupt:
        assert not (tmp_path / "small").exists()
    first = calls[0]
    compress_stream(source, tmp_path / "small", method, 0.6, DATA, batch_size=4)
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
        compress_stream(source, tmp_path / "small", "svd-llm", 0.6, DATA)
    compress_stream(source, tmp_path / "small", "svd-llm", 0.6, DATA)
    assert calls[0] == 9 + 12  # block 0's six matrices are not factorized again
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    whole = transect.compress(tiny("gpt2"), "svd-llm", 0.6, DATA)
    with torch.no_grad():
        torch.testing.assert_close(loaded(DATA).logits, whole(DATA).logits, rtol=1e-3, atol=1e-3)


def test_what_streaming_refuses(folder, tmp_path):
    source = folder("llama")
    for options, message in (
        ({"allocation": "ilp"}, "whole model"), ({"keep": 0.001}, "leaves no rank"), ({"data": None}, "calibration"),
    ):  # fmt: skip
        given = {"method": "svd-llm", "keep": 0.5, "data": DATA} | options
        with pytest.raises(TransectError, match=message):
            compress_stream(source, tmp_path / "x", **given)
    compress_stream(source, tmp_path / "small", "svd", 0.5)
    with pytest.raises(TransectError, match="exists"):
        compress_stream(source, tmp_path / "small", "svd", 0.5)
    with pytest.raises(TransectError, match="already"):
        compress_stream(tmp_path / "small", tmp_path / "smaller", "svd", 0.5)
    model = tiny("llama")
    Anatomy(model).blocks[1].mlp.up.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(TransectError, match="up_proj"):
        compress_stream(tmp_path / "nan", tmp_path / "y", "svd", 0.5)


def test_bfloat16_stays_bfloat16(tmp_path):
    tiny("llama").bfloat16().save_pretrained(tmp_path / "dense")
    compress_stream(tmp_path / "dense", tmp_path / "small", "svd-llm", 0.5, DATA)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "small").parameters()} == {torch.bfloat16}
