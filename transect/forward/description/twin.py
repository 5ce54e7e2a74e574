"""A tiny random model of the same class as a large one: what a description is checked on."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from ...anatomy import Architecture
from ...errors import TransectError

# In our names for sizes. Heads of 8 numbers, so that a rotation of a quarter of them still has a pair.
SIZES = {
    "blocks": 3, "hidden": 32, "heads": 4, "head_size": 8, "neurons": 48, "experts": 4, "chosen_experts": 2,
}  # fmt: skip
ROTATED = 4
VOCABULARY = 64
LARGEST = 20_000_000  # parameters: a config that cannot be made smaller than this is not a tiny model's


def small_config(config: Any, architecture: Architecture) -> Any:
    """A copy of a model's config with small sizes, and all else as it is: flags, multipliers, kinds of layers.

    Key/value heads stay as many as query heads, one, or fewer than query heads, as they were.
    """
    left_out = ("quantization_config", "per_layer_config")
    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k not in left_out})
    text = config.get_text_config()
    names = architecture.config
    heads, shared = (getattr(text, names.get(name, ""), None) for name in ("heads", "key_value_heads"))
    sizes = dict(SIZES)
    sizes["key_value_heads"] = sizes["heads"] if shared and shared == heads else 1 if shared == 1 else 2
    for name, key in names.items():
        if name in sizes and hasattr(text, key):
            setattr(text, key, sizes[name])
    rotated = architecture.rotation.get("width", "")
    if getattr(text, rotated, None) is not None:
        setattr(text, rotated, ROTATED)
    for key, value in architecture.only_if.items():  # of a default config
        setattr(text, key, value)
    for key in architecture.per_block:
        values = getattr(text, key, None)
        if values:
            setattr(text, key, [values[i * len(values) // sizes["blocks"]] for i in range(sizes["blocks"])])
    for key, value in (("vocab_size", VOCABULARY), ("max_position_embeddings", 64), ("pad_token_id", 0),
                       ("bos_token_id", 1), ("eos_token_id", 2)):  # fmt: skip
        if hasattr(text, key):
            setattr(text, key, value)
    if getattr(text, "rope_parameters", None):
        text.rope_parameters = _plain_rotation(text.rope_parameters)
    if isinstance(getattr(config, "patch_size", None), int) and hasattr(config, "image_size"):
        config.image_size = 4 * config.patch_size
    return config


def _plain_rotation(parameters: Any) -> Any:
    """Rotary settings without what belongs to a size (factors by frequency); nested ones by kind of layer too."""
    if not isinstance(parameters, dict):
        return parameters
    if "rope_type" not in parameters:
        return {key: _plain_rotation(value) for key, value in parameters.items()}
    numbers = {key: value for key, value in parameters.items() if not isinstance(value, (list, tuple))}
    return {**numbers, "rope_type": "default"}


@torch.random.fork_rng(devices=[])
def twin(cls: Any, config: Any, architecture: Architecture) -> Any:
    """A random model of the class, with the config made small: every part of it matters to the output.

    In float64, or in float32 where the class cannot compute in that.

    Attention is eager where the class can do that, because it uses every number that the module keeps for itself.
    Raises TransectError where the config does not become small.
    """
    config = small_config(config, architecture)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise TransectError(
            f"a {cls.__name__} does not get small: it still has {count:,} parameters where the description names "
            f"the sizes {sorted(architecture.config)} under `config`"
        )
    torch.manual_seed(0)
    model = plain_experts(cls._from_config(config, attn_implementation="eager").eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    try:
        with torch.no_grad():
            model.double()(**batch_for(model))
    except RuntimeError:  # XGLM mixes in a number of the default type
        model.float()
    return model


def plain_experts(model: Any) -> Any:
    """The model, with experts computed one by one: the fast way takes no float64."""
    with suppress(AttributeError, ValueError):  # it has none
        model.set_experts_implementation("eager")
    return model


def class_and_config(model_type: str) -> tuple[Any, Any]:
    """The class of transformers that a model of this type has, with its task's head, and its default config."""
    import transformers

    tables: Any = (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    )
    for table in tables:
        names = table.get(model_type)
        if names is not None:
            return getattr(transformers, names if isinstance(names, str) else names[0]), AutoConfig.for_model(
                model_type
            )
    raise TransectError(
        f"this version of transformers ({transformers.__version__}) has no language model and no image classifier of "
        f"the type {model_type!r}; name a model that the description is for (--model)"
    )


def batch_for(model: Any) -> dict[str, torch.Tensor]:
    """Two short random examples, as the model reads them: token ids, or images."""
    generator = torch.Generator().manual_seed(1)
    config = model.config.get_text_config()
    if model.main_input_name == "pixel_values":
        shape = (2, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator, dtype=model.dtype)}
    return {"input_ids": torch.randint(3, min(config.vocab_size, 1000), (2, 12), generator=generator)}
