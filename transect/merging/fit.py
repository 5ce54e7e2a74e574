"""Models that can be merged: the same tensors, by name, shape and type, the same vocabulary, the same computation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..anatomy import Anatomy
from ..errors import TransectError
from ..operators import Operator

logger = logging.getLogger(__name__)
# Entries of a config that say nothing about what the tensors mean.
_BESIDE = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "transect",
           "bos_token_id", "eos_token_id", "pad_token_id", "name_or_path"}  # fmt: skip


def refuse_unfit(models: Sequence[Anatomy], names: Sequence[str]) -> None:
    """TransectError where two models do not fit, which names the tensor, or what else is not the same.

    names: what to call the models, the first of which is held against each other one.
    """
    first, *others = models
    for anatomy, name in zip(models, names, strict=True):
        anatomy.check_finite()
        _refuse_compressed(anatomy, name)
    for anatomy, name in zip(others, names[1:], strict=True):
        _refuse_other(first, anatomy, names[0], name)


def _refuse_compressed(anatomy: Anatomy, name: str) -> None:
    for path, module in anatomy.model.named_modules():
        if isinstance(module, Operator):
            raise TransectError(
                f"{path} of {name} is stored as {type(module).__name__}, whose factors do not add up as its matrix "
                "does: merge the models first and compress afterwards"
            )


def _refuse_other(first: Anatomy, other: Anatomy, a: str, b: str) -> None:
    kinds = first.config.model_type, other.config.model_type
    if kinds[0] != kinds[1]:
        raise TransectError(f"{a} is a {kinds[0]!r} model and {b} a {kinds[1]!r} model: merged are models of one kind")
    states = first.model.state_dict(), other.model.state_dict()
    for name in sorted(states[0].keys() ^ states[1].keys()):
        has, lacks = (a, b) if name in states[0] else (b, a)
        raise TransectError(f"{has} has a tensor {name}, and {lacks} has none")
    for name, tensor in states[0].items():
        like = states[1][name]
        if tensor.shape != like.shape:
            raise TransectError(f"{name} is {list(tensor.shape)} in {a} and {list(like.shape)} in {b}")
        if tensor.dtype != like.dtype:
            raise TransectError(
                f"{name} is of type {_type(tensor)} in {a} and {_type(like)} in {b}: load both in one (--dtype)"
            )
        if not tensor.is_floating_point() and not torch.equal(tensor.to(like.device), like):
            raise TransectError(f"{name} holds whole numbers that are not the same in {a} and {b}")
    if _structure(first) != _structure(other):
        raise TransectError(f"{a} and {b} were changed in their structure in different ways (see their config.json)")
    settings = [{k: v for k, v in one.config.to_dict().items() if k not in _BESIDE} for one in (first, other)]
    for key in sorted(settings[0].keys() | settings[1].keys()):
        one, two = (each.get(key) for each in settings)
        if one != two and not key.startswith("_"):
            logger.warning("%s is %s in the config of %s and %s in that of %s: the result has the first", key, one, a,
                           two, b)  # fmt: skip


def refuse_other_words(tokenizers: Sequence[Any], names: Sequence[str]) -> None:
    """TransectError where two tokenizers give a token different numbers, or one has a token more; names the token."""
    known = [
        (one.get_vocab(), name)
        for one, name in zip(tokenizers, names, strict=True)
        if hasattr(one, "get_vocab")  # an image processor has no words
    ]
    for vocabulary, name in known[1:]:
        first, a = known[0]
        for token in sorted(first.keys() | vocabulary.keys()):
            one, two = first.get(token, "none"), vocabulary.get(token, "none")
            if one != two:
                raise TransectError(
                    f"the tokenizers of {a} and {name} are not the same: {token!r} is number {one} and {two}, so the "
                    "rows of the embedding do not belong together"
                )


def _structure(anatomy: Anatomy) -> list[Any]:
    """What a structure record says beyond the sizes of dense matrices, which the tensors show."""
    record = anatomy.record
    modules = {path: one for path, one in record.modules.items() if one["kind"] not in ("linear", "conv1d")}
    return [modules, {path: one for path, one in record.attributes.items() if one}]


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
