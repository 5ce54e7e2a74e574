"""Write a model as an ordinary Hugging Face folder, with its structure record where it needs one."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import SkipAttention, Stacked, StructureRecord, model_in
from ..anatomy.body import ADAPTED
from ..anatomy.experts import SeparateExperts, SkipExperts
from ..anatomy.record import gathered_record, plain_path
from ..arguments import FolderName, accepted
from ..errors import TransectError
from ..operators import Operator
from .base import note_base, without_adapters
from .config import HISTORY, history_of
from .modeling_file import MODULE, auto_map, concrete_class, modeling_source
from .packed import packed_settings, packed_tensors, refused_by_vllm
from .place import placed
from .plain import STRUCTURE_KEYS, fits, sizes_in_config, skeleton, stops, store_as_conv1d
from .processors import copy_processor_files, load_processors
from .quantizer import METHOD, STOP
from .replay import in_order, replay

logger = logging.getLogger(__name__)
hugging_face_save = PreTrainedModel.save_pretrained  # before `attach` puts Transect's in its place


def save(
    model: Any,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    beside: Callable[[Path], None] | None = None,
    **kwargs: Any,
) -> Path:
    """Write safetensors, config.json, the tokenizer and the structure record; returns the folder.

    Where config.json alone can describe the model, the folder needs no Transect to be loaded; nor where all that
    changed are linear layers that became integers: those are written as `compressed-tensors` stores them, see `packed`.
    Otherwise it loads with `import transect`, or with `trust_remote_code=True`, and a transformers that has neither
    refuses it.

    tokenizer: tokenizer or image processor to write. Default: the one of `open_model`, or that of the folder or
        (cached) hub name from which the model was loaded.
    overwrite: whether a folder that exists and is not empty may be written to. A checkpoint in it is replaced as a
        whole when the new one is complete; other files in it stay.
    beside: writes more files that belong to the model into the folder that it is given, before that is put in place.
    kwargs: passed to transformers' `save_pretrained`.

    Raises TransectError if the folder exists, or cannot be written (disk full), or if what it would hold would not load
    as this model; nothing that was there is lost.
    """
    model = model_in(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise TransectError(f"a {type(model).__name__} cannot be saved as a whole: {ADAPTED}")
    return _saved(model, check_output(folder, overwrite), tokenizer, beside, max_shard_size=max_shard_size, **kwargs)


def save_base(model: Any, folder: Path) -> Path:
    """Write the model without the adapters that it carries."""
    had = model.__dict__.pop("_hf_peft_config_loaded", None)  # with it transformers writes the adapter alone
    try:
        return _saved(model, folder, None, None)
    finally:
        if had is not None:
            model._hf_peft_config_loaded = had


def _saved(model: Any, target: Path, tokenizer: Any, beside: Callable[[Path], None] | None, **kwargs: Any) -> Path:
    with placed(target) as partial:
        _write(model, partial, **kwargs)
        tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        source = getattr(model.config, "name_or_path", "")
        if source:
            copy_processor_files(source, partial)
        if beside is not None:
            beside(partial)
    note_base(model, target)
    return target


def is_changed(model: Any) -> bool:
    """Whether Transect has changed anything in the model that it must save itself, or did anything worth recording."""
    record = gathered_record(model)
    return bool(record or record.history) or any(isinstance(module, _CHANGED) for module in model.modules())


def check_output(folder: str | Path, overwrite: bool) -> Path:
    """The absolute path of a folder to write to; an error if that would replace something without `overwrite`."""
    target = accepted(FolderName, folder, "the place to write the model to").resolve()
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise TransectError(f"the folder {target} exists and is not empty; pass overwrite=True (--overwrite)")
    return target


def structure_of(model: Any, state: Mapping[str, Tensor]) -> Structure:
    """How a model is described whose weights are written apart from it, for `write_description`.

    state: name -> tensor of every weight; only the shapes matter, so they may be on the meta device. The weights are
    written as they are, or where the structure is `packed` as `packed_tensors` of the model's record.
    """
    return Structure.of(model, dict(state))


def write_description(model: Any, folder: Path, structure: Structure) -> None:
    """Write config.json and what else describes a model whose weights are written apart from it."""
    model.config.architectures = [concrete_class(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    _add_structure(model, folder, structure)


def _write(model: Any, folder: Path, **kwargs: Any) -> None:
    given = kwargs.get("state_dict")
    state = kwargs["state_dict"] = without_adapters(model, dict(given or model.state_dict()))
    offloaded = any(tensor.is_meta for tensor in state.values())
    structure = Structure.of(model, state, whole=not given, pack=not offloaded)
    if structure.packed is not None:
        kwargs["state_dict"] = packed_tensors(structure.record, state)
    for paths in structure.record.ties().values():  # stored once
        for path in in_order(model, paths)[1:]:
            kwargs["state_dict"].pop(path, None)
    # A record names the modules as they are now; only plain folders follow the names of older transformers versions.
    kwargs.setdefault("save_original_format", structure.ordinary)
    hugging_face_save(model, folder, **kwargs)
    _add_structure(model, folder, structure)


@dataclass
class Structure:
    """How a model's structure is written: `edits` of config.json, and the record unless they say it all (`ordinary`).

    stopped: the shape of some tensor stops a transformers that does not know the record.
    packed: the `quantization_config` of integers in the format of `compressed-tensors`, which is then written in place
        of the record.
    """

    record: StructureRecord
    edits: dict[str, Any]
    ordinary: bool
    stopped: bool
    packed: dict[str, Any] | None = None

    @staticmethod
    def of(model: Any, state: dict[str, Tensor], whole: bool = True, pack: bool = True) -> Structure:
        """Of a model and its weights by name; `state` may be rewritten, see `store_as_conv1d`.

        whole: whether `state` is all of it. pack: whether it can be written in another form than it has.
        Raises TransectError where the record does not describe the weights.
        """
        record = gathered_record(model)
        _check_recorded(model, record)
        if not record:
            return Structure(record, {}, True, False)
        plain = skeleton(model, {})
        store_as_conv1d(record, plain, state)
        edits = sizes_in_config(model, plain)
        plain = skeleton(model, edits) if edits.keys() - STRUCTURE_KEYS else plain
        packed = packed_settings(plain, record, state) if pack else None
        if packed is not None:
            return Structure(record, edits, False, True, packed)
        structure = Structure(record, edits, fits(plain, record, state), stops(plain, state))
        if not structure.ordinary:
            _check_loads(model, plain, record, state, whole)
        return structure


_CHANGED = (Operator, Stacked, SkipAttention, SeparateExperts, SkipExperts)
_UNKNOWN = (
    "so the folder would not load. Something changed the model's modules without Transect's knowing: put operators in "
    "place with Matrix.replace, and heads, neurons and sublayers away with the units' keep and drop"
)


def _check_recorded(model: Any, record: StructureRecord) -> None:
    """Refuse a module of Transect's that no record tells of."""
    for path, module in model.named_modules():
        if isinstance(module, _CHANGED):
            parts = plain_path(path + ".").split(".")[:-1]
            if not any(".".join(parts[:length]) in record.modules for length in range(1, len(parts) + 1)):
                raise TransectError(
                    f"{path} holds a {type(module).__name__} that no structure record names, {_UNKNOWN}"
                )


def _check_loads(model: Any, plain: Any, record: StructureRecord, state: Mapping[str, Tensor], whole: bool) -> None:
    """Refuse weights that the model built from config and record does not have. `plain`: its skeleton, changed here."""
    replay(plain, record)
    expected = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in [*shapes, *(expected if whole else ())]:
        if shapes.get(name) != expected.get(name):
            raise TransectError(
                f"{name} is {list(shapes[name]) if name in shapes else 'not there'}, and by {type(model).__name__}'s "
                f"config and structure record it would be {list(expected[name]) if name in expected else 'not there'}, "
                f"{_UNKNOWN}"
            )


def _add_structure(model: Any, folder: Path, structure: Structure) -> None:
    file, record = folder / "config.json", structure.record
    config = {
        k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if k not in (*STRUCTURE_KEYS, HISTORY)
    }
    config |= structure.edits
    if f"{MODULE}." in str(config.get("auto_map")):  # the model was loaded through an earlier folder's modeling file
        del config["auto_map"]
        (folder / f"{MODULE}.py").unlink(missing_ok=True)
    record.history = history_of(vars(model.config), "the model's config") + record.history
    if record.history and (structure.ordinary or structure.packed):
        config[HISTORY] = {"history": record.history}
    if structure.packed is not None:
        config["quantization_config"] = structure.packed
        refused = refused_by_vllm(model, record)
        logger.info(
            "the integers are written as compressed-tensors stores them: transformers, with that package, loads the "
            "folder without Transect. %s",
            "So should vLLM" if refused is None else f"vLLM may not: {refused}",
        )
    elif not structure.ordinary:
        config["quantization_config"] = {"quant_method": METHOD, "record": record.to_dict()}
        if not structure.stopped:
            config["attn_implementation"] = STOP
        _write_modeling_file(model, folder, record, config)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_modeling_file(model: Any, folder: Path, record: Any, config: dict[str, Any]) -> None:
    cls = concrete_class(model)
    classes = auto_map(cls)
    if not classes or not hasattr(transformers, cls.__name__):
        return
    try:
        source = modeling_source(cls, record)
    except TransectError as error:  # an operator typed into an interpreter: the result itself must not be lost
        warnings.warn(f"{error}; the saved folder loads only after the operator has been imported", stacklevel=2)
        return
    (folder / f"{MODULE}.py").write_text(source, encoding="utf-8")
    config["auto_map"] = classes


def tokenizer_of(model: Any) -> Any:
    """The tokenizer or image processor that the model came with, found without asking the network."""
    known = getattr(model, "_transect_tokenizer", None)
    source = getattr(model.config, "name_or_path", "")
    if known is not None or not source:
        return known
    try:
        tokenizer, processor = load_processors(source, local_files_only=True)
    except TransectError as error:
        warnings.warn(f"no tokenizer is saved with the model: {error}", stacklevel=2)
        return None
    return tokenizer if tokenizer is not None else processor
