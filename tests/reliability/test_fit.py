"""Weights and a config that do not belong together: found out before a number is allocated."""

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors

import transect
from transect.checkpoint import open_model, save
from transect.errors import BadCheckpoint

from ..models import assert_same_tensors, tiny
from ..test_checkpoint import tokenizer
from .damage import JUNK, attempt
from .folders import edit, edit_weights


@pytest.mark.parametrize("dtype", [torch.int16, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.uint8])
def test_weights_that_are_no_ordinary_numbers(plain, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(plain, **{name: load_file(plain / "model.safetensors")[name].to(dtype)})
    for opening in (open_model, lambda path: transect.compress(path, "svd", 0.5, stream_to=path.parent / "out")):
        with pytest.raises(BadCheckpoint, match=r"up_proj\.weight.*stored as"):
            opening(plain)


@pytest.mark.parametrize("dtype", ["int8", "complex64", "bool", "float8_e4m3fn", 5, "nonsense"])
def test_a_config_that_would_load_them_as_something_else(plain, dtype):
    edit(plain, dtype=dtype)
    with pytest.raises(BadCheckpoint, match="dtype"):
        open_model(plain)


EXTRA = ["model.layers.3.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias", "layers.9.x"]
HARMLESS = ["model.layers.1.self_attn.rotary_emb.inv_freq", "score.weight", "cls.predictions.bias"]


@pytest.mark.parametrize("name", EXTRA + HARMLESS)
def test_tensors_that_the_model_does_not_have(plain, name):
    edit_weights(plain, **{name: torch.ones(4)})
    if name in HARMLESS:
        assert_same_tensors(open_model(plain).model, tiny("llama"))
        return
    for opening in (open_model, lambda path: transect.compress(path, "svd", 0.5, stream_to=path.parent / "out")):
        with pytest.raises(BadCheckpoint, match="does not have"):
            opening(plain)


def test_fewer_and_more_layers_than_are_stored(plain):
    edit(plain, num_hidden_layers=2)
    with pytest.raises(BadCheckpoint, match=r"layers\.2"):
        open_model(plain)
    edit(plain, num_hidden_layers=4)
    with pytest.raises(BadCheckpoint, match=r"layers\.3"):
        open_model(plain)


@pytest.mark.parametrize("entries", [
    {"vocab_size": 10_000_000}, {"vocab_size": 10**12}, {"num_hidden_layers": 10**9}, {"num_hidden_layers": 120_000},
    {"num_labels": 10**9}, {"hidden_size": 10**9}, {"head_dim": 10**9}, {"intermediate_size": 2**62},
    {"num_attention_heads": 10**9},
])  # fmt: skip
def test_a_small_folder_takes_little_memory_whatever_it_claims(plain, entries):
    edit(plain, **entries)
    for opening in (open_model, lambda path: transect.compress(path, "svd", 0.5, stream_to=path.parent / "out")):
        before = torch.get_rng_state()
        with pytest.raises(BadCheckpoint):
            opening(plain)
        assert torch.equal(torch.get_rng_state(), before)  # no weight was drawn
    assert attempt(plain, most=2**28) is not None


def test_a_table_of_positions_is_bounded_too(tmp_path):
    save(tiny("xglm"), tmp_path / "m")
    edit(tmp_path / "m", max_position_embeddings=10**8)
    assert "tables" in (attempt(tmp_path / "m", most=2**28) or "")


def test_tables_that_are_computed_number_by_number_are_few(tmp_path):
    """For each number there is a turn of a loop and an object in Python, and that although the table is stored."""
    model = tiny("distilbert")
    positions = 2**23 // model.config.dim + 1
    model.config.update({"max_position_embeddings": positions, "sinusoidal_pos_embds": True})
    table = torch.zeros(positions, model.config.dim, dtype=torch.float16)
    model.distilbert.embeddings.position_embeddings.weight = torch.nn.Parameter(table)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(BadCheckpoint, match="sines for its positions, one by one"):
        open_model(tmp_path / "m")


def test_patterns_that_come_often_and_shapes_without_numbers_make_no_long_lists(tmp_path):
    """transformers makes a list of as many while it reads config.json."""
    save(tiny("gpt_neo"), tmp_path / "neo")
    edit(tmp_path / "neo", attention_types=[[["global"], 10**9]], attention_layers=None)
    assert "attention_types = 1000000000" in (attempt(tmp_path / "neo", most=2**28) or "")
    save(tiny("qwen2"), tmp_path / "qwen")
    edit_weights(tmp_path / "qwen", empty=torch.zeros(10**9, 0))
    edit(tmp_path / "qwen", num_hidden_layers=10**9, layer_types=None)
    assert "num_hidden_layers = 1000000000" in (attempt(tmp_path / "qwen", most=2**28) or "")


def test_a_token_around_every_text_must_have_an_embedding(tmp_path):
    chosen = tokenizer()
    chosen.add_special_tokens({"bos_token": "<begin>"})
    chosen.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", chosen.convert_tokens_to_ids("<begin>"))]
    )
    assert chosen.convert_tokens_to_ids("<begin>") >= 64
    save(tiny("llama"), tmp_path / "m", chosen)
    with pytest.raises(BadCheckpoint, match="disagree"):
        open_model(tmp_path / "m")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "rope_parameters", "rms_norm_eps", "pad_token_id",
                                 "architectures", "model_type", "hidden_act", "quantization_config", "layer_types",
                                 "attention_bias", "id2label", "per_layer_config", "tie_word_embeddings"])  # fmt: skip
def test_config_entries_of_every_type(plain, key):
    for junk in JUNK:
        edit(plain, **{key: junk})
        attempt(plain)
