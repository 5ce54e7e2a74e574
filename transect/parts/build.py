"""An ordinary Hugging Face model with random weights, of any sizes and with any parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForMaskedLM

from ..anatomy.architecture import architecture_of
from ..errors import TransectError
from ..pretrained import pretrained
from .insert import insert
from .registry import SLOTS, part_named

_NAMES = {
    "vocabulary": "vocab_size", "length": "max_position_embeddings", "classes": "num_labels", "image": "image_size",
    "patch": "patch_size", "channels": "num_channels",
}  # fmt: skip
_SIZES = {"hidden", "blocks", "heads", "key_value_heads", "head_size", "neurons"}


def build_model(
    base: str | Path,
    *,
    parts: Mapping[str, str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    **sizes: int | None,
) -> Any:
    """A model of a kind that transformers has (`llama`, `gpt2`, `bert`, `vit`, or a config.json), with random weights.

    parts: slot -> name of the part that stands in it, in every block. settings: name of a part -> its settings.
    sizes: hidden, blocks, heads, key_value_heads, head_size, neurons; vocabulary and length; of image classifiers
        classes, image (its side), patch and channels; the others are the config's.
    Raises TransectError for what does not fit.
    """
    for slot, name in (parts or {}).items():
        part_named(slot, name)
    if {"mlp", "activation"} <= set(parts or {}):
        raise TransectError("an MLP brings its own activation: name a part for one of these two slots")
    config = config_of(base)
    architecture = architecture_of(config.model_type)
    for name, size in sizes.items():
        if size is None:
            continue
        key = _NAMES.get(name)
        if name in _SIZES:
            key = architecture.config.get(name)
        if key is None or (name in _NAMES and name != "classes" and not hasattr(config, key)):
            raise TransectError(f"{architecture.name} has no size {name!r}")
        setattr(config, key, size)
    if (hidden := sizes.get("hidden")) and "head_size" in architecture.config and not sizes.get("head_size"):
        setattr(config, architecture.config["head_size"], hidden // getattr(config, architecture.config["heads"]))
    if sizes.get("heads") and "key_value_heads" in architecture.config and not sizes.get("key_value_heads"):
        setattr(config, architecture.config["key_value_heads"], sizes["heads"])
    for kind in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, kind, None)
        if isinstance(token, int) and token >= getattr(config, "vocab_size", token + 1):
            setattr(config, kind, None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = _auto(config).from_config(config)
        except (ValueError, TypeError, RuntimeError) as reason:
            raise TransectError(f"transformers cannot build this {config.model_type}: {reason}") from reason
    for slot in SLOTS:
        if name := (parts or {}).get(slot):
            insert(model, slot, name, settings=(settings or {}).get(name), seed=seed)
    return model.eval()


def config_of(base: str | Path) -> Any:
    """The config of a kind of model, of a folder, or of a config.json."""
    path = Path(base)
    try:
        if path.exists():
            return pretrained(AutoConfig, path)
        return AutoConfig.for_model(str(base))
    except (ValueError, OSError, KeyError) as reason:
        raise TransectError(
            f"{str(base)[:200]!r} is no kind of model that transformers knows, such as llama, gpt2 or vit, and no "
            "file or folder of a config"
        ) from reason


def _auto(config: Any) -> Any:
    """The auto class that a fresh model of this kind is made with: what predicts the next token, if there is one."""
    decoders = () if config.model_type in _ENCODERS else (AutoModelForCausalLM,)
    for auto in (*decoders, AutoModelForMaskedLM, AutoModelForImageClassification):
        if type(config) in auto._model_mapping:
            return auto
    raise TransectError(f"{config.model_type} is no language model and no image classifier")


_ENCODERS = ("bert", "roberta", "electra", "camembert")  # which transformers could also make decoders of
