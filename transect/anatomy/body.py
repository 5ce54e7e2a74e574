"""Where in a model the blocks are: inside wrappers, below heads, beside a vision tower."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Pipeline, PreTrainedModel

from ..errors import TransectError

# Under these names torch.compile, DataParallel, DistributedDataParallel, DeepSpeed and FSDP hold the model.
_INSIDE = ("_orig_mod", "module", "_fsdp_wrapped_module")

ADAPTED = (
    "the model carries an adapter, so what it computes is not in its weights alone. Call merge_and_unload() of the "
    "PeftModel and take the model that it returns. (An adapter that was put in with add_adapter is merged by saving it "
    "and AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().)"
)


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`, DataParallel and their like; anything else as it is."""
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        inner = next((model._modules[name] for name in _INSIDE if name in model._modules), None)
        if inner is None:
            break
        model = inner
    return model


def text_config_of(model: Any) -> Any:
    """The config that describes the blocks: the model's own, or that of the language model inside."""
    config = model.config
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError as error:  # several of them
        raise TransectError(f"{type(model).__name__} has several language models; pass one: {error}") from error


def body_of(model: Any) -> Any:
    """The part of an unwrapped model that holds the blocks, without heads: in a vision-language model, its language
    model."""
    if not hasattr(model, "config"):
        return model
    text = text_config_of(model)
    if text is not model.config:
        inside = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module.config is text)
        model = next(inside, model)
    return getattr(model, "base_model", model)


def submodule(model: Any, path: str) -> Any:
    """`model.get_submodule(path)`, which looks each name up in five ways and is most of what a handle costs."""
    module = model
    for name in path.split("."):
        module = module._modules.get(name)
        if module is None:  # behind a wrapper that hands attributes on, or nowhere
            return model.get_submodule(path)
    return module


def path_of(model: nn.Module, inner: nn.Module) -> str:
    """The path of a module inside another, with a dot at its end, or nothing where they are one."""
    path = next(name for name, module in model.named_modules() if module is inner)
    return path + "." if path else ""


def model_in(given: Any) -> Any:
    """The model in what a user holds: itself, or that of a pipeline or wrapper.

    Raises TransectError for what is no Hugging Face model, for a PeftModel, and for encoder-decoders.
    """
    model = unwrapped(given.model if isinstance(given, Pipeline) else given)
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "model_type"):
        raise TransectError(
            f"a {type(model).__name__} was given where a Hugging Face model (a PreTrainedModel) is expected; pass the "
            "model itself, or its folder or hub name"
        )
    if hasattr(model, "get_base_model"):
        raise TransectError(f"a {type(model).__name__} cannot be opened: {ADAPTED}")
    refuse_encoder_decoder(config, type(model).__name__)
    return model


def refuse_encoder_decoder(config: Any, name: str) -> None:
    """Raise TransectError for the config of an encoder-decoder. name: what the message calls it."""
    parts = [config, getattr(config, "text_config", None)]
    if any(getattr(part, "is_encoder_decoder", False) for part in parts):
        raise TransectError(
            f"{name} ({config.model_type!r}) is an encoder-decoder, like T5 and BART: two stacks of blocks, and in the "
            "decoder's a third sublayer that reads the encoder. Transect's view is one stack of blocks with attention "
            "and an MLP each. What works: decoders (GPT, Llama, Qwen ...), encoders (BERT, RoBERTa), image encoders "
            "(ViT), and the language model inside a vision-language model"
        )
