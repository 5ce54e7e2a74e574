"""An ordinary Hugging Face model with random weights, of any sizes and with any parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForMaskedLM
from transformers.pytorch_utils import Conv1D

from ..anatomy.architecture import architecture_of
from ..errors import BadCheckpoint, TransectError
from ..pretrained import pretrained
from ..store import read_json
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
    roles: Iterable[str] | None = None,
    seed: int = 0,
    **sizes: int | None,
) -> Any:
    """A model of a kind that transformers has (`llama`, `gpt2`, `bert`, `vit`, or a config.json), with random weights.

    parts: slot -> name of the part that stands in it, in every block. settings: name of a part -> its settings; parts
        of one name in several slots each take their own of these.
    roles: which matrices the part for matrices stands for; default all.
    sizes: hidden, blocks, heads, key_value_heads, head_size, neurons; vocabulary and length; of image classifiers
        classes, image (its side), patch and channels; the others are the config's, or go with the width.
    With a width of its own the model begins with torch's own random numbers, whose size goes with it: linear layers by
    their inputs, embeddings N(0, 1), or N(0, 1 / width) where they are the head too. Kinds of models have one deviation
    for all (0.02), which is right for thousands of channels; in a stream of 64, attention then hardly learns.
    Raises TransectError for what does not fit.
    """
    for slot, name in (parts or {}).items():
        part_named(slot, name)
    if {"mlp", "activation"} <= set(parts or {}):
        raise TransectError("an MLP brings its own activation: name a part for one of these two slots")
    config = sized(config_of(base), sizes)
    if not Path(base).exists() and not (sizes.get("hidden") and sizes.get("blocks")):
        raise TransectError(f"{base} alone is a model of billions: give hidden and blocks, or the file of a config")
    for kind in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, kind, None)
        if isinstance(token, int) and token >= getattr(config, "vocab_size", token + 1):
            setattr(config, kind, None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            _check_memory(config)
            model = _auto(config).from_config(config)
            if sizes.get("hidden"):
                _draw_for_width(model)
        except TransectError:
            raise
        except (ValueError, TypeError, RuntimeError) as reason:
            raise TransectError(f"transformers cannot build this {config.model_type}: {reason}") from reason
    for slot in SLOTS:
        if name := (parts or {}).get(slot):
            chosen = _settings_of(slot, name, parts or {}, settings or {})
            insert(model, slot, name, roles=roles if slot == "matrix" else None, settings=chosen, seed=seed)
    return model.eval()


def _settings_of(
    slot: str, name: str, parts: Mapping[str, str], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The settings under a part's name, without those that only parts of the same name in other slots have."""
    has = {other: {p.name for p in part_named(other, name).parameters} for other, at in parts.items() if at == name}
    elsewhere = set().union(*has.values()) - has[slot]
    return {key: value for key, value in settings.get(name, {}).items() if key not in elsewhere}


def sized(config: Any, sizes: Mapping[str, int | None]) -> Any:
    """The config with these sizes, in place. TransectError for a size that this kind of model has not.

    Where a width is given, what is not given goes with it: heads as wide as the config's, and as many neurons for each
    of the stream's channels.
    """
    architecture = architecture_of(config.model_type)
    keys = {**_NAMES, **{name: architecture.config.get(name) for name in _SIZES}}
    given = {name: size for name, size in sizes.items() if size is not None}
    for name in given:
        if keys.get(name) is None or (name in _NAMES and name != "classes" and not hasattr(config, str(keys[name]))):
            raise TransectError(f"{architecture.name} has no size {name!r}")
    if "hidden" in given:
        width, heads = getattr(config, str(keys["hidden"])), getattr(config, str(keys["heads"]))
        given.setdefault("heads", max(1, given["hidden"] * heads // width))
        neurons = getattr(config, str(keys["neurons"]), None)
        if neurons:
            given.setdefault("neurons", max(8, given["hidden"] * neurons // width // 8 * 8))
        if keys["head_size"] is not None:
            given.setdefault("head_size", given["hidden"] // given["heads"])
    if "heads" in given and keys["key_value_heads"] is not None:
        given.setdefault("key_value_heads", given["heads"])
    for name, size in given.items():
        setattr(config, str(keys[name]), size)
    return config


@torch.no_grad()
def _draw_for_width(model: Any) -> None:
    """Draw the numbers of linear layers and embeddings anew, each by the width that it reads."""
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, Conv1D):
            nn.init.kaiming_uniform_(module.weight.T, a=5**0.5)  # as nn.Linear does
        elif isinstance(module, nn.Linear) and not (tied and module is head):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5 if tied else 1.0)


def _check_memory(config: Any) -> None:
    """TransectError for a model that the free memory cannot hold; nothing for a skeleton."""
    if torch.empty(0).device.type != "cpu":
        return
    with torch.device("meta"):
        skeleton = _auto(config).from_config(config)
    count = sum(parameter.numel() for parameter in skeleton.parameters())
    free = psutil.virtual_memory().available
    if 4 * count > free:
        raise TransectError(
            f"a model of {count:,} numbers takes {4 * count / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: choose "
            "smaller sizes"
        )


def config_of(base: str | Path) -> Any:
    """The config of a kind of model, of a folder, or of a config.json."""
    path = Path(base)
    try:
        if path.exists():
            read_json(path / "config.json" if path.is_dir() else path)  # transformers would wait for a pipe
            return pretrained(AutoConfig, path)
        return AutoConfig.for_model(str(base))
    except BadCheckpoint:
        raise
    except Exception as reason:  # each kind of config has its own way to fail on what somebody wrote
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
