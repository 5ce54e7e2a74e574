"""Tiny random models of every supported architecture, the same for all tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForMaskedLM

VOCABULARY = 64
_TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_GROUPED = dict(_TEXT, num_key_value_heads=2)
_IMAGE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
    num_labels=5,
)  # fmt: skip
_GPT2 = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
_OPT = dict(
    vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_GEMMA = dict(_GROUPED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)

CONFIGS: dict[str, tuple[Any, Any]] = {
    "gpt2": (tf.GPT2Config(**_GPT2), AutoModelForCausalLM),
    "opt": (tf.OPTConfig(**_OPT), AutoModelForCausalLM),
    "gpt_neox": (tf.GPTNeoXConfig(**_TEXT), AutoModelForCausalLM),
    "llama": (tf.LlamaConfig(**_GROUPED), AutoModelForCausalLM),
    "mistral": (tf.MistralConfig(**_GROUPED, sliding_window=None), AutoModelForCausalLM),
    "qwen2": (tf.Qwen2Config(**_GROUPED), AutoModelForCausalLM),
    "qwen3": (tf.Qwen3Config(**_GROUPED, head_dim=8), AutoModelForCausalLM),
    "gemma2": (tf.Gemma2Config(**_GEMMA), AutoModelForCausalLM),
    "gemma3": (tf.Gemma3TextConfig(**_GEMMA), AutoModelForCausalLM),
    "phi3": (tf.Phi3Config(**_GROUPED), AutoModelForCausalLM),
    "olmo2": (tf.Olmo2Config(**_GROUPED), AutoModelForCausalLM),
    "bert": (tf.BertConfig(**_TEXT), AutoModelForMaskedLM),
    "roberta": (tf.RobertaConfig(**_TEXT), AutoModelForMaskedLM),
    "vit": (tf.ViTConfig(**_IMAGE), AutoModelForImageClassification),
    "deit": (tf.DeiTConfig(**_IMAGE, architectures=["DeiTForImageClassification"]), AutoModelForImageClassification),
}
# Mixtures of experts have tests of their own (test_experts.py): they would double the time of the whole suite.
_EXPERTS = dict(_GROUPED, num_experts_per_tok=2)
_QWEN_MOE = dict(_EXPERTS, num_experts=5, moe_intermediate_size=20, mlp_only_layers=[1])
MOE_CONFIGS: dict[str, tuple[Any, Any]] = {
    "mixtral": (tf.MixtralConfig(**{**_EXPERTS, "intermediate_size": 20}, num_local_experts=5), AutoModelForCausalLM),
    "qwen3_moe": (tf.Qwen3MoeConfig(**_QWEN_MOE, head_dim=8), AutoModelForCausalLM),
    "qwen2_moe": (tf.Qwen2MoeConfig(**_QWEN_MOE, shared_expert_intermediate_size=24), AutoModelForCausalLM),
    "olmoe": (tf.OlmoeConfig(**{**_EXPERTS, "intermediate_size": 20}, num_experts=5), AutoModelForCausalLM),
    "flex_olmo": (tf.FlexOlmoConfig(**{**_EXPERTS, "intermediate_size": 20}, num_experts=5), AutoModelForCausalLM),
    "phimoe": (tf.PhimoeConfig(**{**_EXPERTS, "intermediate_size": 20}, num_local_experts=5), AutoModelForCausalLM),
}
CAUSAL = [name for name, (_, auto) in CONFIGS.items() if auto is AutoModelForCausalLM]


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model with weights large enough that every part matters to the output."""
    torch.manual_seed(seed)
    config, auto = (CONFIGS | MOE_CONFIGS)[name]
    model = auto.from_config(type(config).from_dict(config.to_dict())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def inputs(
    name: str, batch: int = 2, length: int = 12, seed: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """One batch for the model of that name: token ids, or images (batch, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    if (CONFIGS | MOE_CONFIGS)[name][1] is AutoModelForImageClassification:
        return {
            "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator, dtype=dtype),
            "labels": torch.randint(0, 5, (batch,), generator=generator),
        }
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


# How far what is computed from the same numbers may lie apart, as a share of the largest result. A processor picks its
# kernels by layout, place in memory and number of threads, and they round differently. So "nothing was lost" means: the
# same tensors, bit for bit, and the same logits to within this.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number; NaN where there is one."""
    assert one.shape == other.shape
    return ((one - other).abs().max() / other.abs().max()).item()


def assert_alike(one: torch.Tensor, other: torch.Tensor) -> None:
    """The same result, computed from the same numbers in another place."""
    assert apart(one, other) <= TOLERANCE[other.dtype]


def assert_same_tensors(one: Any, other: Any) -> None:
    """Two modules hold the same tensors under the same names: bit for bit, in one dtype, laid out alike in memory."""
    state, expected = one.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
        assert state[name].stride() == tensor.stride(), name


def assert_same_model(one: Any, other: Any, batch: dict[str, Any]) -> None:
    """Nothing was lost between the two: the same tensors, and the same logits but for rounding."""
    assert_same_tensors(one, other)
    assert_alike(logits(one, batch), logits(other, batch))


def saved_and_loaded(model: Any, name: str, folder: Path) -> Any:
    """The language model of that name after a round trip, which must not change it; it must also copy and generate."""
    dtype = next(model.parameters()).dtype
    model.save_pretrained(folder)
    again: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    batch = inputs(name)
    assert_same_model(again, model, batch)
    assert_same_model(copy.deepcopy(again), again, batch)
    wide = copy.deepcopy(again).float()
    made = [
        wide.generate(batch["input_ids"][:1], max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*made)
    return again
