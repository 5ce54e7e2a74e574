"""Is this folder a whole checkpoint? Looked at from outside, before anything is loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..anatomy.record import StructureRecord
from ..errors import BadCheckpoint
from ..store import finish_exchange, read_json
from .chosen import check_chosen
from .config import check_config
from .header import Stored, read_stored
from .place import LAST
from .quantizer import METHOD
from .replay import built

_INDEX = "model.safetensors.index.json"
Shapes = dict[str, tuple[int, ...]]
# What transformers reads of a folder beside the weights, each a JSON object.
_JSON = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", _INDEX,
)  # fmt: skip
_READ = (".json", ".safetensors", ".txt", ".model", ".jinja", ".gguf")
_OTHER_WEIGHTS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # transformers would prefer these


def check_folder(folder: str | Path) -> dict[str, Stored]:
    """Raise BadCheckpoint, naming the file, unless the folder holds a complete checkpoint in safetensors.

    Returns what is stored, by its name on disk. Reads headers and JSON only: every file is an ordinary one, all JSON is
    what it should be, the weights are the model's own and not an adapter's, every shard is there, is as long as its
    header says, and the tensors are those that the structure record describes.
    """
    folder = Path(folder)
    if not is_folder(folder):
        raise BadCheckpoint(f"there is no folder {folder}")
    if os.access(folder, os.W_OK):
        finish_exchange(folder, LAST)
    try:
        check_files(folder)
        left = sorted(folder.glob(".*.previous-*/config.json"))
    except OSError as error:
        raise BadCheckpoint(f"the folder {folder} cannot be read: {error}") from None
    if left and not (folder / "config.json").exists():
        raise BadCheckpoint(
            f"{folder} has no config.json: a save into it was broken off. Its earlier model is in {left[0].parent}; "
            "move the files there back"
        )
    _refuse_adapter(folder)
    if not (folder / "config.json").exists():
        packed = sorted(folder.glob("*.gguf"))
        if packed:
            raise BadCheckpoint(f"{folder} has no config.json, but GGUF files; name the file: {packed[0]}")
        raise BadCheckpoint(f"{folder} has no config.json, so it is not a model folder")
    config = read_json(folder / "config.json")
    for name in _JSON:
        if (folder / name).exists():
            read_json(folder / name)
    stored = _stored_in(folder)
    check_config(config, folder / "config.json", stored)
    description = config.get("quantization_config") or {}
    if description.get("quant_method") == METHOD:
        _check_record(folder, description.get("record"), {name: tensor.shape for name, tensor in stored.items()})
    return stored


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; False too for what can be no path at all."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def check_files(folder: Path) -> None:
    """Refuse what would keep whoever opens it waiting (a pipe), and links that lead nowhere."""
    templates = folder / "additional_chat_templates"
    for file in [*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]:
        if not (file.is_file() or file.is_dir()) and (file.exists() or file.suffix in _READ):
            kind = "no ordinary file" if file.exists() else "a link that leads nowhere"
            raise BadCheckpoint(f"{file} is {kind}, so {folder} is no model folder")
        if file.suffix in _READ and file.is_file() and not os.access(file, os.R_OK):
            raise BadCheckpoint(f"{file} cannot be read: permission denied")
        if file.name in _JSON and file.is_dir():
            raise BadCheckpoint(f"{file} is a folder, and should be a file")
        if _OTHER_WEIGHTS.fullmatch(file.name):
            raise BadCheckpoint(f"{folder} holds the shards of a distributed run ({file.name}); save the model whole")


def _refuse_adapter(folder: Path) -> None:
    """An adapter is no model, and one beside a model would be put into it without a word."""
    adapter = folder / "adapter_config.json"
    if not os.path.lexists(adapter):
        return
    base = read_json(adapter).get("base_model_name_or_path")
    beside = ", beside a model" if (folder / "config.json").exists() else ", not a model"
    raise BadCheckpoint(
        f"{folder} holds an adapter for {base if isinstance(base, str) else 'a model that it does not name'}{beside}. "
        "Load both with peft (AutoPeftModelForCausalLM.from_pretrained), call merge_and_unload(), save the model into "
        "a folder of its own, and open that"
    )


def _stored_in(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder, by its name on disk; BadCheckpoint where two shards hold the same."""
    stored: dict[str, Stored] = {}
    for file, promised in _weight_files(folder).items():
        found = read_stored(file)
        lacking = promised - found.keys()
        if lacking:
            raise BadCheckpoint(f"{file} lacks the tensor {min(lacking)}, which {_INDEX} says is in it")
        twice = stored.keys() & found.keys()
        if twice:
            raise BadCheckpoint(f"{file} holds the tensor {min(twice)}, which another shard holds too")
        stored |= found
    return stored


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files that transformers would read, each with the names that an index gives it.

    BadCheckpoint unless all of them are there.
    """
    if (folder / "model.safetensors").exists():
        return {folder / "model.safetensors": set()}
    index = folder / _INDEX
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict):
            raise BadCheckpoint(f"{index} has no weight_map")
        odd = [name for name in table.values() if not _is_shard(name)]
        if odd:
            raise BadCheckpoint(f"{index} names the shard {odd[0]!r}: it should be a safetensors file in that folder")
        files: dict[Path, set[str]] = {folder / name: set() for name in sorted(set(table.values()))}
        for name, shard in table.items():
            files[folder / shard].add(name)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise BadCheckpoint(f"{folder} lacks the shard{'s' * (len(missing) > 1)} {', '.join(missing)}")
        return files
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise BadCheckpoint(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run any code when it is read, and is "
            "refused; convert it to safetensors first"
        )
    raise BadCheckpoint(f"{folder} has no model.safetensors and no {_INDEX}")


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", name) is not None


def _check_record(folder: Path, record: Any, shapes: Shapes) -> None:
    if not isinstance(record, dict):
        raise BadCheckpoint(f"{folder / 'config.json'} has no structure record under quantization_config.record")
    tables = StructureRecord.from_dict(record)
    check_chosen(tables)
    expected: Shapes = {}
    for path, description in sorted(tables.modules.items(), key=lambda entry: entry[0].count(".")):  # outer ones first
        expected = {name: shape for name, shape in expected.items() if not name.startswith(f"{path}.")}
        state = built(path, description, "meta").state_dict()
        expected.update({f"{path}.{name}": tuple(tensor.shape) for name, tensor in state.items()})
    groups = tables.ties()
    for name, shape in ({path: tuple(shape) for path, shape in tables.parameters.items()} | expected).items():
        # Of places that hold one tensor, one is stored; which, depends on the order of the model's modules.
        places = groups[tables.tied[name]] if name in tables.tied else [name]
        stored = next((shapes[place] for place in (name, *places) if place in shapes), None)
        if stored != shape:
            found = "is not there" if stored is None else f"has shape {list(stored)}"
            raise BadCheckpoint(
                f"the structure record does not fit the weights in {folder}: {name} should have shape {list(shape)}, "
                f"but {found}"
            )
