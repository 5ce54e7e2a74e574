"""What may be given as MODEL: GGUF files, revisions of hub models, folders that do not say all; and what is refused."""

import json
import sys

import gguf
import huggingface_hub.constants
import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import transect
from transect.checkpoint import folder_of, open_model, save
from transect.cli import main_group
from transect.errors import BadCheckpoint, TransectError

from .models import assert_same_model, inputs, logits, tiny
from .test_checkpoint import tokenizer

TOKENS = ["<|endoftext|>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "cd", "Ġe", "abcd"]
MERGES = ["a b", "c d", "Ġ e", "ab cd"]


def write_gguf(file, model, kind=None):
    """A tiny Llama as llama.cpp writes it: rows of q and k in its order of rotation, matrices quantised if asked."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = TOKENS + [f"<unused{i}>" for i in range(config.vocab_size - len(TOKENS))]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        values = tensor.contiguous().numpy()
        stem, _, ending = name.rpartition(".")
        packed = kind is not None and values.ndim == 2 and values.shape[1] % 32 == 0
        writer.add_tensor(
            f"{names.get_name(stem)}.{ending}", gguf.quants.quantize(values, kind) if packed else values,
            raw_dtype=kind if packed else None,
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def packed(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", tiny("llama"), gguf.GGMLQuantizationType.Q8_0)


def test_a_gguf_file_is_the_model_that_it_was_written_from(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", tiny("llama"))
    opened = open_model(file)
    torch.testing.assert_close(logits(opened.model, inputs("llama")), logits(tiny("llama"), inputs("llama")))
    assert opened.path == file and opened.model.dtype == torch.float32 and not opened.model.training
    assert opened.tokenizer("abcd e")["input_ids"] == [TOKENS.index("abcd"), TOKENS.index("Ġe")]
    assert open_model(file, dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_packed_gguf_file_is_unpacked_and_saved_as_an_ordinary_checkpoint(tmp_path, packed):
    opened = open_model(packed)
    dense = tiny("llama").state_dict()
    state = opened.model.state_dict()
    off = [(tensor - dense[name]).abs().max() / dense[name].abs().max() for name, tensor in state.items()]
    assert 0 < max(off) < 0.01
    transect.compress(opened, "svd", keep=0.6)
    save(opened.model, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert_same_model(again, opened.model, inputs("llama"))
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("abcd e") == opened.tokenizer("abcd e")
    save(open_model(packed).model, tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    torch.testing.assert_close(
        logits(open_model(tmp_path / "whole").model, inputs("llama")), logits(open_model(packed).model, inputs("llama"))
    )


def test_the_commands_take_a_gguf_file(tmp_path, packed):
    (tmp_path / "text.txt").write_text("abcd e ab cd e " * 60)
    run = CliRunner().invoke(main_group, ["eval", str(packed), "--data", str(tmp_path / "text.txt"), "--json"])
    assert run.exit_code == 0 and json.loads(run.stdout)["loss"] > 0
    with pytest.raises(TransectError, match="folder of safetensors"):
        transect.compress(packed, "svd", 0.5, stream_to=tmp_path / "small")
    with pytest.raises(BadCheckpoint, match=r"GGUF files; name the file: .*tiny\.gguf"):
        open_model(tmp_path)


def test_gguf_files_that_cannot_be_read(tmp_path, packed, monkeypatch):
    content = packed.read_bytes()
    for name, damaged in (("short", content[: len(content) // 2]), ("head", content[:100]), ("other", b"no" * 100)):
        (tmp_path / f"{name}.gguf").write_bytes(damaged)
        with pytest.raises(BadCheckpoint, match=rf"{name}\.gguf cannot be read as a GGUF file"):
            open_model(tmp_path / f"{name}.gguf")
    with pytest.raises(TransectError, match="no revisions"):
        open_model(packed, revision="main")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda: False)
    with pytest.raises(TransectError, match=r"needs the package gguf.*pip install 'transect\[gguf\]'"):
        open_model(packed)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache without a network: some-one/tiny, whose main branch is one model and whose tag v1 another."""
    repository = tmp_path / "hub" / "models--some-one--tiny"
    for commit, seed, names in (("a" * 40, 1, ["main"]), ("b" * 40, 2, ["v1"])):
        save(tiny("llama", seed=seed), repository / "snapshots" / commit, tokenizer())
        for name in names:
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository


def test_a_revision_of_a_hub_model(tmp_path, hub):
    for revision, seed in (("v1", 2), ("b" * 40, 2), ("main", 1)):
        opened = open_model("some-one/tiny", revision=revision)
        expected = logits(tiny("llama", seed=seed), inputs("llama"))
        torch.testing.assert_close(logits(opened.model, inputs("llama")), expected)
        assert opened.tokenizer is not None and opened.source == "some-one/tiny"
        assert opened.path == folder_of("some-one/tiny", revision)  # from which other processes open the same
    transect.compress("some-one/tiny", "svd", 0.6, revision="v1", stream_to=tmp_path / "streamed")
    whole = transect.compress(open_model("some-one/tiny", revision="v1"), "svd", keep=0.6)
    streamed = open_model(tmp_path / "streamed").model
    torch.testing.assert_close(logits(streamed, inputs("llama")), logits(whole, inputs("llama")))
    with pytest.raises(TransectError, match="with the revision 'v9'"):
        open_model("some-one/tiny", revision="v9")
    with pytest.raises(TransectError, match="is a local folder, which has no revisions"):
        open_model(tmp_path / "streamed", revision="v1")


def test_every_command_that_takes_a_model_takes_a_revision(tmp_path, hub):
    (tmp_path / "text.txt").write_text("w5 w9 w7 " * 200)
    text, out = str(tmp_path / "text.txt"), tmp_path / "out"
    commands = {
        "eval": ["--data", text],
        "compress": ["--method", "svd", "--keep", "0.5", "--out", str(out / "compress")],
        "inspect": ["--probes", "nuclear-norm", "--out", str(out / "inspect")],
        "compare": ["--methods", "svd", "--keep", "0.5", "--data", text, "--eval", text, "--out", str(out / "compare")],
        "recover": ["--data", text, "--steps", "1", "--how", "full", "--out", str(out / "recover")],
    }
    for name, more in commands.items():
        length = [] if name in ("compress", "inspect") else ["--sequence-length", "16"]
        run = CliRunner().invoke(main_group, [name, "some-one/tiny", "--revision", "v9", *more, *length])
        assert isinstance(run.exception, TransectError) and "v9" in str(run.exception), name
        run = CliRunner().invoke(main_group, [name, "some-one/tiny", "--revision", "v1", *more, *length])
        assert run.exit_code == 0, (name, run.output, run.exception)
    for name, more in {"claims": ["svd"], "edit": ["some-one/tiny"]}.items():
        assert "--revision" in CliRunner().invoke(main_group, [name, *more, "--help"]).output


def without(folder, *keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in keys}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_a_folder_that_does_not_name_its_class(tmp_path, name):
    model = tiny(name)
    save(model, tmp_path)
    without(tmp_path, "architectures")
    with pytest.warns(UserWarning, match=rf"names no class \(architectures\): assumed {type(model).__name__}"):
        again = open_model(tmp_path).model
    assert type(again) is type(model)
    assert_same_model(again, model, inputs(name))
    if name == "llama":
        with pytest.warns(UserWarning, match="assumed LlamaForCausalLM"):
            transect.compress(tmp_path, "svd", 0.5, stream_to=tmp_path / "small")


def test_a_type_without_a_usual_class(tmp_path):
    save(tiny("llama"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**tf.EncodecConfig().to_dict(), "architectures": None}))
    with pytest.raises(TransectError, match=r"none is usual for 'encodec'.*architectures"):
        open_model(tmp_path)


ENCODER_DECODERS = {
    "t5": lambda: tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "bart": lambda: tf.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ENCODER_DECODERS))
def test_encoder_decoders_are_refused_with_the_reason(tmp_path, name):
    model = AutoModelForSeq2SeqLM.from_config(ENCODER_DECODERS[name]())
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 60, (2, 12))
    for attempt in (
        lambda: transect.Anatomy(model),
        lambda: transect.compress(model, "svd", keep=0.5),
        lambda: transect.evaluate(model, ids),
        lambda: transect.inspect(model, ["nuclear-norm"]),
        lambda: open_model(tmp_path),
        lambda: transect.compress(tmp_path, "svd", 0.5, stream_to=tmp_path / "out"),
    ):
        with pytest.raises(TransectError, match=r"encoder-decoder.*two stacks of blocks.*What works: decoders"):
            attempt()


def test_a_quantised_checkpoint_is_refused_before_anything_is_loaded(tmp_path):
    save(tiny("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for method in ("bitsandbytes", "gptq", "awq", "fp8", "torchao", "something-new"):
        settings = {"quant_method": method, "bits": 4}
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        with pytest.raises(TransectError, match=rf"quantised \({method}\).*dequantize"):
            open_model(tmp_path)
        with pytest.raises(TransectError, match=r"quantized|quantised"):
            transect.compress(tmp_path, "svd", 0.5, stream_to=tmp_path / "out")


def test_an_adapter_is_no_model(tmp_path):
    save(tiny("llama"), tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(BadCheckpoint, match=rf"an adapter for {tmp_path / 'm'}.*merge_and_unload"):
        open_model(tmp_path / "adapter")
