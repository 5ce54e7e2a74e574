"""Is this folder a whole checkpoint? Looked at from outside, before anything is loaded."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import torch

from ..anatomy.record import StructureRecord
from ..errors import BadCheckpoint
from ..operators.build import build
from ..store import finish_exchange, read_json
from .place import LAST
from .quantizer import METHOD

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4,
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


def check_folder(folder: str | Path) -> None:
    """Raise BadCheckpoint, naming the file, unless the folder holds a complete checkpoint in safetensors.

    Reads headers and JSON only: every shard is there, is as long as its header says, and the tensors are those that
    the structure record describes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadCheckpoint(f"there is no folder {folder}")
    if os.access(folder, os.W_OK):
        finish_exchange(folder, LAST)
    left = sorted(folder.glob(".*.previous-*/config.json"))
    if left and not (folder / "config.json").exists():
        raise BadCheckpoint(
            f"{folder} has no config.json: a save into it was broken off. Its earlier model is in {left[0].parent}; "
            "move the files there back"
        )
    if not (folder / "config.json").exists():
        _refuse_other_contents(folder)
    if not (folder / "config.json").exists():
        raise BadCheckpoint(f"{folder} has no config.json, so it is not a model folder")
    config = read_json(folder / "config.json")
    shapes: Shapes = {}
    for file in weight_files(folder):
        shapes.update(read_header(file))
    description = config.get("quantization_config") or {}
    if description.get("quant_method") == METHOD:
        _check_record(folder, description.get("record"), shapes)


def _refuse_other_contents(folder: Path) -> None:
    """Say what a folder without config.json holds instead of a model, where that is known."""
    adapter, packed = folder / "adapter_config.json", sorted(folder.glob("*.gguf"))
    if adapter.exists():
        base = read_json(adapter).get("base_model_name_or_path")
        raise BadCheckpoint(
            f"{folder} holds an adapter for {base or 'a model that it does not name'}, not a model. Load both with "
            "peft (AutoPeftModelForCausalLM.from_pretrained), call merge_and_unload(), save the model, and open that"
        )
    if packed:
        raise BadCheckpoint(f"{folder} has no config.json, but GGUF files; name the file: {packed[0]}")


def read_header(file: Path) -> Shapes:
    """Tensor name -> shape of a safetensors file; BadCheckpoint unless the file is exactly as its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise BadCheckpoint(f"{file} is truncated: its {size} bytes end before its header does")
        header = stream.read(length)
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        shapes, end = {}, 0
        for name, entry in entries.items():
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            bits = math.prod(shape) * _BITS[entry["dtype"]] if entry["dtype"] in _BITS else (stop - start) * 8
            if bits != (stop - start) * 8:
                raise BadCheckpoint(
                    f"{file} gives {name} {stop - start} bytes, but {entry['dtype']} {list(shape)} takes {bits // 8}"
                )
            shapes[name], end = shape, max(end, stop)
    except BadCheckpoint:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadCheckpoint(f"{file} has a damaged header: {error!r}") from None
    if 8 + length + end != size:
        state = "truncated" if size < 8 + length + end else "too long"
        raise BadCheckpoint(f"{file} is {state}: it has {size} bytes, and its header describes {8 + length + end}")
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read; BadCheckpoint unless all of them are there."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict):
            raise BadCheckpoint(f"{index} has no weight_map")
        files = [folder / str(name) for name in sorted(set(table.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise BadCheckpoint(f"{folder} lacks the shard{'s' * (len(missing) > 1)} {', '.join(missing)}")
        for file in files:
            lacking = {name for name, shard in table.items() if shard == file.name} - set(read_header(file))
            if lacking:
                raise BadCheckpoint(f"{file} lacks the tensor {min(lacking)}, which {index.name} says is in it")
        return files
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise BadCheckpoint(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run any code when it is read, and is "
            "refused; convert it to safetensors first"
        )
    raise BadCheckpoint(f"{folder} has no model.safetensors and no model.safetensors.index.json")


def _check_record(folder: Path, record: Any, shapes: Shapes) -> None:
    if not isinstance(record, dict):
        raise BadCheckpoint(f"{folder / 'config.json'} has no structure record under quantization_config.record")
    tables = StructureRecord.from_dict(record)
    if not all(isinstance(table, dict) for table in (tables.modules, tables.attributes, tables.parameters)):
        raise BadCheckpoint(f"the structure record in {folder / 'config.json'} is damaged: it should hold objects")
    expected: Shapes = {path: tuple(shape) for path, shape in tables.parameters.items()}
    for path, description in tables.modules.items():
        try:
            with torch.device("meta"):
                state = build(description).state_dict()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadCheckpoint(f"the structure record's entry for {path!r} cannot be built: {error}") from None
        expected.update({f"{path}.{name}": tuple(tensor.shape) for name, tensor in state.items()})
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found = f"has shape {list(shapes[name])}" if name in shapes else "is not there"
            raise BadCheckpoint(
                f"the structure record does not fit the weights in {folder}: {name} should have shape {list(shape)}, "
                f"but {found}"
            )
