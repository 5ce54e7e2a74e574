"""Adapters on a changed model: where their base is.

An adapter's folder holds the adapter alone, and names its base. Where that name stands for the model as it was before
Transect changed it, the base is saved too: into `base` inside the adapter's folder, and is what the adapter names.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ..modules import when_imported
from ..store import read_json, replacing
from .base import place_of_base
from .save import is_changed, save_base

FOLDER = "base"


def complete_adapter(base: Any, folder: str | Path) -> None:
    """Let the adapters that were just written to a folder name the base that they are for; save it if need be."""
    if not is_changed(base):
        return
    folder = Path(folder).expanduser().resolve()
    where = place_of_base(base) or str(save_base(base, folder / FOLDER))
    for file in [folder / "adapter_config.json", *folder.glob("*/adapter_config.json")]:
        if file.is_file():
            config = read_json(file) | {"base_model_name_or_path": where}
            with replacing(file) as partial:
                partial.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def attach_to_peft() -> None:
    """Make `PeftModel.save_pretrained` complete the adapter: now, or as soon as peft is imported."""
    when_imported("peft.peft_model", _wrap)


def _wrap(peft_model: Any) -> None:
    original = peft_model.PeftModel.save_pretrained
    if hasattr(original, "completes_adapter"):
        return

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        original(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            complete_adapter(self.get_base_model(), save_directory)

    save_pretrained.completes_adapter = True  # type: ignore[attr-defined]
    peft_model.PeftModel.save_pretrained = save_pretrained
