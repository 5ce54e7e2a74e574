"""Make the ordinary `model.save_pretrained` and `from_pretrained` keep the structure record."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..anatomy.record import StructureRecord, set_record
from .adapters import attach_to_peft, complete_adapter
from .base import note_base
from .chosen import check_chosen
from .header import Stored, read_stored
from .quantizer import TransectQuantizer, register
from .save import hugging_face_save, is_changed, save
from .unpacked import PackedConfig, expect_packed, register_packed, take_packed


class RecordingQuantizer(TransectQuantizer):
    """What Transect registers: the loaded model knows its record, and can be changed and saved further."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not isinstance(self.quantization_config, PackedConfig):
            record = getattr(self.quantization_config, "record", None)
            if isinstance(record, dict):
                check_chosen(StructureRecord.from_dict(record))
            return super()._process_model_before_weight_loading(model, **kwargs)
        stored: dict[str, Stored] = {}
        for file in checkpoint_files or ():
            stored |= read_stored(Path(file))
        self.record = expect_packed(model, self.quantization_config.packed, stored, model.name_or_path)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if isinstance(self.quantization_config, PackedConfig):
            take_packed(model, self.record)
        set_record(model, self.record)
        note_base(model, model.name_or_path)
        return super()._process_model_after_weight_loading(model, **kwargs)


@functools.wraps(hugging_face_save)
def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """transformers' own for a model in which Transect has changed nothing; otherwise `transect.checkpoint.save`.

    As in transformers, a checkpoint that is there already is replaced, and of a model with an adapter only the adapter
    is written, if its base is at a known place; otherwise the base too, see `adapters`.
    """
    if not is_changed(self):
        return hugging_face_save(self, save_directory, *args, **kwargs)
    given = inspect.signature(hugging_face_save).bind(self, save_directory, *args, **kwargs).arguments
    given = {**given.pop("kwargs", {}), **given}
    del given["self"], given["save_directory"]
    main = given.get("is_main_process", True)
    if getattr(self, "_hf_peft_config_loaded", False):
        hugging_face_save(self, save_directory, **given)
        if main:
            complete_adapter(self, save_directory)
        return
    hub = {key: given.pop(key) for key in ("repo_id", "commit_message", "create_pr", "private") if key in given}
    if not main:  # takes part in gathering a sharded model, writes nothing
        return hugging_face_save(self, save_directory, **given)
    push_to_hub = given.pop("push_to_hub", False)
    target = save(self, save_directory, overwrite=True, **given)
    if push_to_hub:
        self.push_to_hub(**{"repo_id": target.name, "token": given.get("token"), **hub})


def attach() -> None:
    """Called when Transect is imported.

    The method is replaced on the class, not on each changed model: an instance that held its own would be part of a
    reference cycle, so that a deleted model would keep its memory, and a copy of it would save the original.
    """
    PreTrainedModel.save_pretrained = save_pretrained
    attach_to_peft()
    register(RecordingQuantizer)
    register_packed()
