"""PEFT knows our adapters where Transect has been imported: it asks for the catalog when it first reads a config."""

from __future__ import annotations

import functools
from typing import Any

from ..modules import when_imported
from .registry import load


def attach_to_peft() -> None:
    """Let PEFT load the folders of our adapters: now, or as soon as it is imported."""
    when_imported("peft.config", _wrap)


def _wrap(config: Any) -> None:
    for name in ("_get_peft_type", "from_peft_type"):
        original = getattr(config.PeftConfigMixin, name).__func__
        if hasattr(original, "loads_ours"):
            continue

        def wrapped(cls: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            load()
            return original(cls, *args, **kwargs)

        functools.update_wrapper(wrapped, original)
        wrapped.loads_ours = True  # type: ignore[attr-defined]
        setattr(config.PeftConfigMixin, name, classmethod(wrapped))
