"""Whether a dense model can be the teacher of a compressed one."""

from __future__ import annotations

from typing import Any

from ..anatomy import Anatomy
from ..errors import TransectError
from ..forward import task_of
from .settings import Settings


def check_teacher(anatomy: Anatomy, teacher: Any, settings: Settings) -> None:
    """Raise TransectError, saying what does not fit, unless the repair has the teacher that it needs."""
    if not settings.needs_teacher:
        if teacher is not None:
            raise TransectError(f"how={settings.how!r} uses no teacher; distill and blocks do")
        return
    model = anatomy.model
    if teacher is None:
        raise TransectError(f"how={settings.how!r} learns from the dense model: pass it as teacher= (--teacher)")
    if teacher is model:
        raise TransectError("the teacher is the very model that is to be repaired: load the dense model for it")
    for what, of in (("task", task_of), ("vocabulary", _vocabulary), ("classes", _classes)):
        ours, theirs = of(model), of(teacher)
        if ours != theirs:
            raise TransectError(f"the teacher has another {what} than the model: {theirs}, not {ours}")
    if settings.how == "blocks":
        dense = Anatomy(teacher)
        if len(dense.blocks) != len(anatomy.blocks):
            raise TransectError(
                f"the teacher has {len(dense.blocks)} blocks and the model {len(anatomy.blocks)}, so they cannot be "
                "paired; after dropping blocks use how='distill'"
            )
        if dense.config_value("hidden") != anatomy.config_value("hidden"):
            raise TransectError(
                f"the teacher's stream is {dense.config_value('hidden')} wide and the model's "
                f"{anatomy.config_value('hidden')}, so that blocks cannot be compared; use how='distill'"
            )


def check_same_tokens(tokenizer: Any, of_teacher: Any) -> None:
    """Raise TransectError if two tokenizers, where both are known, give tokens different numbers."""
    if not hasattr(tokenizer, "get_vocab") or not hasattr(of_teacher, "get_vocab"):
        return
    ours, theirs = tokenizer.get_vocab(), of_teacher.get_vocab()
    if ours != theirs:
        different = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        raise TransectError(
            f"the teacher has another vocabulary than the model: {len(different)} tokens differ, {different[0]!r} first"
        )


def _vocabulary(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _classes(model: Any) -> int | None:
    return model.config.num_labels if task_of(model) == "classification" else None
