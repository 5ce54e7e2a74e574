"""Tiny random models of every supported architecture, the same for all tests."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import FunctionType
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
_WIDE = dict(_GROUPED, head_dim=8)
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
_GPTJ = dict(
    vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=48, rotary_dim=4, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
_BLOOM = dict(
    vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
_FALCON = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_hidden_size=48,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_XGLM = dict(
    vocab_size=VOCABULARY, d_model=32, num_layers=3, attention_heads=4, ffn_dim=48, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_MULTIPLIERS = dict(residual_multiplier=0.4, attention_multiplier=0.3, embedding_multiplier=3.0)

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
    # Blocks that return tuples; attention that adds the residual, ALiBi; parallel sublayers and scaled logits;
    # multipliers on residuals.
    "gptj": (tf.GPTJConfig(**_GPTJ), AutoModelForCausalLM),
    "bloom": (tf.BloomConfig(**_BLOOM), AutoModelForCausalLM),
    "cohere": (tf.CohereConfig(**_GROUPED, use_qk_norm=True, logit_scale=0.125), AutoModelForCausalLM),
    "granite": (tf.GraniteConfig(**_GROUPED, **_MULTIPLIERS, logits_scaling=8.0), AutoModelForCausalLM),
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
# The rest of what is built in: of kinds that CONFIGS has. The descriptions are checked on all of these, every method is
# tried on those.
MORE_CONFIGS: dict[str, tuple[Any, Any]] = {
    "apertus": (tf.ApertusConfig(**_GROUPED), AutoModelForCausalLM),
    "arcee": (tf.ArceeConfig(**_WIDE), AutoModelForCausalLM),
    "bert-generation": (tf.BertGenerationConfig(**_TEXT), tf.BertGenerationDecoder),
    "biogpt": (tf.BioGptConfig(**_TEXT), AutoModelForCausalLM),
    "camembert": (tf.CamembertConfig(**_TEXT), AutoModelForMaskedLM),
    "clip": (tf.CLIPTextConfig(**_TEXT, projection_dim=24), tf.CLIPTextModelWithProjection),
    "cohere2": (tf.Cohere2Config(**_WIDE, sliding_window=8, layer_types=_KINDS), AutoModelForCausalLM),
    "ctrl": (tf.CTRLConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=32, dff=48, n_layer=3, n_head=4),
             AutoModelForCausalLM),
    "cwm": (tf.CwmConfig(**_WIDE, sliding_window=8, layer_types=_KINDS), AutoModelForCausalLM),
    "data2vec-text": (tf.Data2VecTextConfig(**_TEXT), AutoModelForMaskedLM),
    "distilbert": (tf.DistilBertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, n_layers=3, n_heads=4, dim=32,
                                       hidden_dim=48), AutoModelForMaskedLM),
    "electra": (tf.ElectraConfig(**_TEXT, embedding_size=16), AutoModelForMaskedLM),
    "ernie": (tf.ErnieConfig(**_TEXT), AutoModelForMaskedLM),
    "ernie4_5": (tf.Ernie4_5Config(**_WIDE), AutoModelForCausalLM),
    "esm": (tf.EsmConfig(**_TEXT, mask_token_id=3, position_embedding_type="rotary"), AutoModelForMaskedLM),
    "eurobert": (tf.EuroBertConfig(**_WIDE), AutoModelForMaskedLM),
    "exaone4": (tf.Exaone4Config(**_GROUPED, sliding_window=8, layer_types=_KINDS), AutoModelForCausalLM),
    "falcon": (tf.FalconConfig(**_FALCON), AutoModelForCausalLM),  # one key/value head for all
    "falcon-groups": (tf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2), AutoModelForCausalLM),
    "falcon-alibi": (tf.FalconConfig(**_FALCON, alibi=True, multi_query=False, parallel_attn=False),
                     AutoModelForCausalLM),
    "gemma": (tf.GemmaConfig(**_WIDE), AutoModelForCausalLM),
    "glm4": (tf.Glm4Config(**_WIDE), AutoModelForCausalLM),
    "gpt_bigcode": (tf.GPTBigCodeConfig(**_GPT2, n_inner=48), AutoModelForCausalLM),
    "gpt_bigcode-heads": (tf.GPTBigCodeConfig(**_GPT2, n_inner=48, multi_query=False), AutoModelForCausalLM),
    "gpt_neo": (tf.GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48,
                                window_size=8, attention_types=[[["global", "local", "global"], 1]],
                                max_position_embeddings=64, bos_token_id=1, eos_token_id=2), AutoModelForCausalLM),
    "granite_swa": (tf.GraniteSWAConfig(**_GROUPED, **_MULTIPLIERS, logits_scaling=8.0), AutoModelForCausalLM),
    "helium": (tf.HeliumConfig(**_WIDE), AutoModelForCausalLM),
    "hunyuan_v1_dense": (tf.HunYuanDenseV1Config(**_WIDE), AutoModelForCausalLM),
    "hyperclovax": (tf.HyperCLOVAXConfig(**_WIDE, **_MULTIPLIERS, logits_scaling=0.5, use_post_norm=True),
                    AutoModelForCausalLM),
    "jais2": (tf.Jais2Config(**_WIDE), AutoModelForCausalLM),
    "jina_embeddings_v3": (tf.JinaEmbeddingsV3Config(**_TEXT), AutoModelForMaskedLM),
    "layoutlm": (tf.LayoutLMConfig(**_TEXT), AutoModelForMaskedLM),
    "megatron-bert": (tf.MegatronBertConfig(**_TEXT), AutoModelForMaskedLM),
    "ministral": (tf.MinistralConfig(**_WIDE, sliding_window=8, layer_types=_KINDS), AutoModelForCausalLM),
    "ministral3": (tf.Ministral3Config(**_WIDE), AutoModelForCausalLM),
    "modernbert": (tf.ModernBertConfig(**_TEXT), AutoModelForMaskedLM),
    "modernbert-decoder": (tf.ModernBertDecoderConfig(**_TEXT), AutoModelForCausalLM),
    "mpnet": (tf.MPNetConfig(**_TEXT), AutoModelForMaskedLM),
    "mpt": (tf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=3, max_seq_len=64),
            AutoModelForCausalLM),
    "nanochat": (tf.NanoChatConfig(**_GROUPED, final_logit_softcapping=2.0), AutoModelForCausalLM),
    "nemotron": (tf.NemotronConfig(**_WIDE), AutoModelForCausalLM),
    "nomic_bert": (tf.NomicBertConfig(**_TEXT, head_dim=8), AutoModelForMaskedLM),
    "olmo": (tf.OlmoConfig(**_GROUPED), AutoModelForCausalLM),
    "olmo3": (tf.Olmo3Config(**_GROUPED, sliding_window=8, layer_types=_KINDS), AutoModelForCausalLM),
    "persimmon": (tf.PersimmonConfig(**_TEXT), AutoModelForCausalLM),
    "phi": (tf.PhiConfig(**_GROUPED, qk_layernorm=True), AutoModelForCausalLM),
    "rembert": (tf.RemBertConfig(**_TEXT, input_embedding_size=16, output_embedding_size=24), AutoModelForMaskedLM),
    "roberta-prelayernorm": (tf.RobertaPreLayerNormConfig(**_TEXT), AutoModelForMaskedLM),
    "roc_bert": (tf.RoCBertConfig(**_TEXT, pronunciation_vocab_size=20, shape_vocab_size=20,
                                  pronunciation_embed_dim=8, shape_embed_dim=8), AutoModelForMaskedLM),
    "roformer": (tf.RoFormerConfig(**_TEXT, embedding_size=32), AutoModelForMaskedLM),
    "seed_oss": (tf.SeedOssConfig(**_WIDE, attention_dropout=0.0, residual_dropout=0.0), AutoModelForCausalLM),
    "smollm3": (tf.SmolLM3Config(**_GROUPED, no_rope_layers=[1, 0, 1], sliding_window=8, layer_types=_KINDS,
                                 use_sliding_window=True), AutoModelForCausalLM),
    "stablelm": (tf.StableLmConfig(**_GROUPED), AutoModelForCausalLM),
    "stablelm-parallel": (tf.StableLmConfig(**_GROUPED, use_parallel_residual=True), AutoModelForCausalLM),
    "starcoder2": (tf.Starcoder2Config(**_GROUPED), AutoModelForCausalLM),
    "vaultgemma": (tf.VaultGemmaConfig(**_GEMMA, final_logit_softcapping=2.0), AutoModelForCausalLM),
    "xglm": (tf.XGLMConfig(**_XGLM), AutoModelForCausalLM),
    "xlm-roberta": (tf.XLMRobertaConfig(**_TEXT), AutoModelForMaskedLM),
}  # fmt: skip
CAUSAL = [name for name, (_, auto) in CONFIGS.items() if auto is AutoModelForCausalLM]


def entry(name: str) -> tuple[Any, Any]:
    """Config and class of the model of that name."""
    return (CONFIGS | MORE_CONFIGS | MOE_CONFIGS)[name]


class Copies(pickle.Unpickler):
    """A copy of a model, as `copy.deepcopy` would make it, in a third of the time: see `copier`."""

    def __init__(self, content: bytes, kept: list[Any]) -> None:
        super().__init__(io.BytesIO(content))
        self._kept, self._copied = kept, {}

    def persistent_load(self, number: int) -> Any:
        return copy.deepcopy(self._kept[number], self._copied)  # tied ones are one tensor again


def copier(model: Any) -> Callable[[], Any]:
    """Makes copies of the model, which must stay as it is: all but tensors and functions is written once, as bytes."""
    kept, numbers, file = [], {}, io.BytesIO()

    def persistent_id(one: Any) -> int | None:
        if not isinstance(one, (torch.Tensor, FunctionType)):
            return None
        if id(one) not in numbers:
            numbers[id(one)] = len(kept)
            kept.append(one)
        return numbers[id(one)]

    pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.persistent_id = persistent_id
    pickler.dump(model)
    return lambda: Copies(file.getvalue(), kept).load()


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model with weights large enough that every part matters to the output.

    It is the caller's own. The random state is left as making it leaves it.
    """
    again, state = _made(name, id(entry(name)[0]), seed, torch.get_default_dtype(), torch.empty(0).device)
    torch.set_rng_state(state)
    return again().to(dtype)


@lru_cache(maxsize=256)
def _made(
    name: str, number: int, seed: int, default: torch.dtype, device: torch.device
) -> tuple[Callable[[], Any], torch.Tensor]:
    """What makes copies of the model, and the random state behind it.

    number: of its config, since a test may put another in its place. default, device: in which numbers and on which
    device modules are made meanwhile.
    """
    torch.manual_seed(seed)
    config, auto = entry(name)
    config = type(config).from_dict(config.to_dict())
    model = (auto.from_config if hasattr(auto, "from_config") else auto._from_config)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return copier(model), torch.get_rng_state()


def inputs(
    name: str, batch: int = 2, length: int = 12, seed: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """One batch for the model of that name: token ids, or images (batch, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    if entry(name)[1] is AutoModelForImageClassification:
        return {
            "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator, dtype=dtype),
            "labels": torch.randint(0, 5, (batch,), generator=generator),
        }
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The logits, or of a model without a head its last states."""
    with torch.no_grad():
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


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
