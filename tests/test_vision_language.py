"""Vision-language models: the language model inside is opened up and changed in place, and the whole is saved."""

import json

import pytest
import torch
import transformers as tf
from transformers import AutoModel, AutoModelForImageTextToText

import transect
from transect.anatomy import Anatomy, record_of
from transect.checkpoint import open_model, save

from .models import assert_alike, assert_same_tensors
from .test_checkpoint import change, low_rank, same_size_everywhere, tokenizer

_TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_EYES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
)
_GEMMA = dict(_TEXT, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
_QWEN = dict(_TEXT, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
_QWEN_EYES = dict(depth=1, hidden_size=32, num_heads=2, out_hidden_size=32, intermediate_size=32, patch_size=8)
_QWEN_IDS = dict(image_token_id=63, video_token_id=62, vision_start_token_id=61)

CONFIGS = {
    "llava": lambda: tf.LlavaConfig(
        text_config=tf.LlamaConfig(**_TEXT), vision_config=tf.CLIPVisionConfig(**_EYES, projection_dim=32),
        image_token_index=63, vision_feature_layer=-1, image_seq_length=16,
    ),
    "paligemma": lambda: tf.PaliGemmaConfig(
        text_config=dict(_GEMMA, model_type="gemma2"), vision_config=dict(_EYES, model_type="siglip_vision_model"),
        image_token_index=63, projection_dim=32, hidden_size=32,
    ),
    "gemma3": lambda: tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**_GEMMA), vision_config=tf.SiglipVisionConfig(**_EYES),
        mm_tokens_per_image=4, image_token_index=63, boi_token_index=61, eoi_token_index=62,
    ),
    "smolvlm": lambda: tf.SmolVLMConfig(
        text_config=tf.LlamaConfig(**_TEXT), vision_config=dict(_EYES), image_token_id=63, scale_factor=2
    ),
    "qwen2-vl": lambda: tf.Qwen2VLConfig(
        text_config=dict(_QWEN), vision_config=dict(_QWEN_EYES, embed_dim=32, mlp_ratio=2), **_QWEN_IDS,
        vision_end_token_id=60,
    ),
    "qwen2.5-vl": lambda: tf.Qwen2_5_VLConfig(
        text_config=dict(_QWEN), vision_config=dict(_QWEN_EYES, fullatt_block_indexes=[0]), **_QWEN_IDS,
        vision_end_token_id=60,
    ),
    "qwen3-vl": lambda: tf.Qwen3VLConfig(
        text_config=dict(_QWEN, head_dim=8), **_QWEN_IDS,
        vision_config=dict(_QWEN_EYES, deepstack_visual_indexes=[0], num_position_embeddings=16),
    ),
}  # fmt: skip
IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def tiny(name):
    """A random model of that kind, as `tests.models.tiny`."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def same(folder, model):
    """Whether the folder holds the model, eyes included."""
    again = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    assert type(again) is type(model)
    assert_same_tensors(again, model)
    assert_alike(logits(again), logits(model))
    return again


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_language_model_inside_is_what_is_opened(name):
    model = tiny(name)
    anatomy = Anatomy(model)
    inside = next(m for m in model.modules() if getattr(m, "config", None) is model.config.get_text_config())
    assert [matrix.path for matrix in anatomy.matrices()] == [
        next(path for path, module in model.named_modules() if module is inside) + "." + matrix.path
        for matrix in Anatomy(inside).matrices()
    ]
    assert len(anatomy.blocks) == 3 and anatomy.final_norm is not None and anatomy.unembedding is not None
    before = logits(model)
    for block in anatomy.blocks:  # the order of neurons and heads means nothing
        block.mlp.keep(torch.randperm(block.mlp.neurons))
        block.attention.keep([2, 3, 0, 1])
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_compressed_saved_and_loaded(tmp_path, name):
    model, whole = tiny(name), tiny(name)
    transect.compress(model, "svd-llm", keep=0.6, data=IDS)
    change_more = Anatomy(model)
    change_more.blocks[2].attention.drop()
    assert not torch.equal(logits(model), logits(whole))
    text = Anatomy(model)._prefix
    for key, tensor in whole.state_dict().items():
        assert key.startswith(text) or torch.equal(tensor, model.state_dict()[key])
    model.save_pretrained(tmp_path)
    again = same(tmp_path, model)
    assert record_of(again).history[-1]["compress"]["method"] == "svd-llm"
    Anatomy(again).blocks[0].mlp.keep(range(11))  # and further
    again.save_pretrained(tmp_path)
    same(tmp_path, again)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2-vl"])
def test_what_config_json_can_say_is_plain(tmp_path, name):
    model = same_size_everywhere(tiny(name))
    Anatomy(model).drop_block(0)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and not list(tmp_path.glob("*.py"))
    assert (config["text_config"]["intermediate_size"], config["text_config"]["num_hidden_layers"]) == (20, 2)
    same(tmp_path, model)


def test_each_layer_of_its_own_size_and_both_towers(tmp_path):
    model = change(tiny("llava"))
    model.save_pretrained(tmp_path)
    same(tmp_path, model)
    low_rank(Anatomy(model.model.language_model).blocks[0].matrix("k"))
    model.save_pretrained(tmp_path)
    same(tmp_path, model)
    model.model.language_model.save_pretrained(tmp_path / "inside")
    inside = AutoModel.from_pretrained(tmp_path / "inside").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            inside(IDS).last_hidden_state, model.model.language_model(IDS).last_hidden_state, rtol=1e-5, atol=1e-5
        )


def test_images_still_go_through(tmp_path):
    model = change(tiny("llava"))
    ids = torch.cat([torch.full((2, 16), 63), IDS], 1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=images).logits
        torch.testing.assert_close(again(input_ids=ids, pixel_values=images).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(model(input_ids=ids, pixel_values=images + 1).logits, expected)


def test_from_folder_to_folder_with_text_alone(tmp_path):
    """Evaluated, inspected, edited and compressed by its name; the files of its processor go along."""
    save(tiny("smolvlm"), tmp_path / "m", tokenizer())
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"image_processor_type": "SmolVLMImageProcessor"}')
    (tmp_path / "m" / "processor_config.json").write_text('{"processor_class": "SmolVLMProcessor"}')
    opened = open_model(tmp_path / "m")
    assert opened.tokenizer is not None
    dense = transect.evaluate(opened, IDS)
    assert dense["tokens"] == 22 and dense["loss"] > 0
    found = transect.inspect(opened, ["nuclear-norm", "lazy-neuron"], IDS)
    assert set(found) == {"nuclear-norm", "lazy-neuron"} and not found.refused
    model = transect.compress(opened, "asvd", keep=0.5, data=IDS)
    save(model, tmp_path / "small", opened.tokenizer)
    assert (tmp_path / "small" / "processor_config.json").exists()
    assert (tmp_path / "small" / "preprocessor_config.json").exists()
    small = transect.evaluate(tmp_path / "small", IDS)
    assert small["loss"] != dense["loss"] and small["parameters"] < dense["parameters"]
