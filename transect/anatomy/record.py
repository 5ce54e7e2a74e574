"""The structure record: what differs in a model's modules from what its config alone would build, as plain JSON.

It describes the state, not the steps, so that replaying it twice does nothing more than replaying it once.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import BadCheckpoint
from .body import body_of, path_of, unwrapped

FORMAT = 1
TABLES = ("modules", "attributes", "parameters", "tied")
_AROUND = ("_orig_mod", "base_layer", "original_module")
_KEPT = "_structure_record"  # under which a body keeps its record, whose paths begin at the body


@dataclass
class StructureRecord:
    """Every structural change of one model.

    modules: module path -> description of the module that stands there now (see `operators.build`).
    attributes: module path -> attribute -> value; `config.<name>` is an attribute of the module's private config.
    parameters: parameter path -> its shape, where only a parameter's size has changed.
    tied: parameter path -> name of a group; all parameters of one group are one tensor, which is stored once.
    history: what was done, newest last: method, settings, version. Informative; nothing is rebuilt from it.
    """

    modules: MutableMapping[str, dict[str, Any]] = field(default_factory=dict)
    attributes: MutableMapping[str, dict[str, Any]] = field(default_factory=dict)
    parameters: MutableMapping[str, list[int]] = field(default_factory=dict)
    tied: MutableMapping[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        """True when the config alone no longer describes the model."""
        return bool(self.modules or self.attributes or self.parameters or self.tied)

    def set_module(self, path: str, description: dict[str, Any]) -> None:
        """The module at `path` is now the one described; what was recorded below it is gone."""
        self.modules = {key: value for key, value in self.modules.items() if not (key + ".").startswith(path + ".")}
        self.modules[path] = description
        self.keep_ties({key: group for key, group in self.tied.items() if not key.startswith(path + ".")})

    def keep_ties(self, tied: MutableMapping[str, str]) -> None:
        """These are the ties now; a group of one parameter is none."""
        sizes = Counter(tied.values())
        self.tied = {path: group for path, group in tied.items() if sizes[group] > 1}

    def ties(self) -> dict[str, list[str]]:
        """Group -> paths of its parameters."""
        found: dict[str, list[str]] = {}
        for path, group in self.tied.items():
            found.setdefault(group, []).append(path)
        return found

    def arrange_blocks(self, blocks: str, order: Sequence[int]) -> None:
        """The module list at path `blocks` now holds what were its blocks of these numbers; a repeated one is tied."""

        def arranged(table: MutableMapping[str, Any]) -> dict[str, Any]:
            """The table with the entries of each place's block under the place's number."""
            kept, of_blocks = {}, {}
            for path, value in table.items():
                if path.startswith(blocks + "."):
                    number, _, rest = path[len(blocks) + 1 :].partition(".")
                    of_blocks.setdefault(int(number), {})[rest] = value
                else:
                    kept[path] = value
            for place, number in enumerate(order):
                for rest, value in of_blocks.get(number, {}).items():
                    kept[f"{blocks}.{place}.{rest}"] = copy.deepcopy(value)
            return kept

        self.modules, self.attributes, self.parameters = map(arranged, (self.modules, self.attributes, self.parameters))
        self.keep_ties(arranged(self.tied))

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the number of the format."""
        tables = {name: copy.deepcopy(dict(getattr(self, name))) for name in TABLES}
        return {"format": FORMAT, **tables, "history": copy.deepcopy(self.history)}

    @staticmethod
    def from_dict(data: Any) -> StructureRecord:
        """From what `to_dict` gave; BadCheckpoint for another format, and for what is of another type anywhere."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise BadCheckpoint(f"structure record of format {found!r}; this version reads {FORMAT}")
        for name in TABLES:
            kind = {"parameters": list, "tied": str}.get(name, dict)
            what, table = "names" if name == "tied" else "objects", data.get(name, {})
            if not isinstance(table, dict) or not all(isinstance(entry, kind) for entry in table.values()):
                raise BadCheckpoint(f"the structure record is damaged: its {name} should hold {what} by path")
        for path, shape in data.get("parameters", {}).items():
            if not all(type(size) is int and 0 <= size < 2**40 for size in shape) or len(shape) > 8:
                raise BadCheckpoint(f"the structure record is damaged: {path!r} has no shape")
        checked_history(data.get("history", []), "the structure record")
        return StructureRecord(**{part.name: data[part.name] for part in fields(StructureRecord) if part.name in data})


def checked_history(history: Any, where: str) -> list[dict[str, Any]]:
    """The history, if it is a list of objects; BadCheckpoint otherwise."""
    if not isinstance(history, list) or not all(isinstance(step, dict) for step in history):
        raise BadCheckpoint(f"{where} is damaged: its history should be a list of objects")
    return history


class _Below(MutableMapping[str, Any]):
    """A table of the body's record under the paths that a model around the body has for them."""

    def __init__(self, table: MutableMapping[str, Any], prefix: str) -> None:
        self.table, self.prefix = table, prefix

    def _inside(self, path: str) -> str:
        if not path.startswith(self.prefix):
            raise KeyError(f"{path!r} is not in the part of the model that holds the blocks, {self.prefix!r}")
        return path.removeprefix(self.prefix)

    def __getitem__(self, path: str) -> Any:
        return self.table[self._inside(path)]

    def __setitem__(self, path: str, entry: Any) -> None:
        self.table[self._inside(path)] = entry

    def __delitem__(self, path: str) -> None:
        del self.table[self._inside(path)]

    def __iter__(self) -> Iterator[str]:
        return (self.prefix + path for path in self.table)

    def __len__(self) -> int:
        return len(self.table)


class _Seen(StructureRecord):
    """The body's own record, under the paths that a model around the body has; changing one changes the other."""

    def __init__(self, record: StructureRecord, prefix: str) -> None:
        for name in TABLES:
            self.__dict__[name] = _Below(getattr(record, name), prefix)
        self.__dict__["history"] = record.history

    def __setattr__(self, name: str, value: Any) -> None:
        there, value = getattr(self, name), copy.copy(value)
        there.clear()
        (there.extend if name == "history" else there.update)(value)


def record_of(model: Any) -> StructureRecord:
    """The model's structure record, with the model's own paths; an unchanged model gets an empty one.

    It is kept by the part of the model that holds the blocks, so that whatever is saved later finds it: the model that
    was given, one around it (a task head, a vision-language model, `torch.compile`), or the body alone.
    """
    model = unwrapped(model)
    body = body_of(model)
    record = body.__dict__.setdefault(_KEPT, StructureRecord())
    return record if body is model else _Seen(record, path_of(model, body))


def record_around(model: Any) -> StructureRecord:
    """The record of what stands in a model outside the part that holds the blocks, such as its head."""
    model = unwrapped(model)
    if body_of(model) is model:
        return record_of(model)
    return model.__dict__.setdefault(_KEPT, StructureRecord())


def has_record(model: nn.Module) -> bool:
    """Whether anything inside the model keeps a structure record."""
    return any(_KEPT in module.__dict__ for module in model.modules())


def set_record(model: nn.Module, record: StructureRecord) -> None:
    """Give a model that was just built the record that it was built from, each entry to the body that it is about."""
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    bodies: dict[str, Any] = {path_of(model, body): body for body in map(body_of, inside)}
    bodies.setdefault("", model)
    for name in TABLES:
        for path, entry in getattr(record, name).items():
            prefix = next(prefix for prefix in bodies if path.startswith(prefix))
            kept = bodies[prefix].__dict__.setdefault(_KEPT, StructureRecord())
            entry = entry.removeprefix(prefix) if name == "tied" else entry
            getattr(kept, name)[path.removeprefix(prefix)] = entry
    record_of(model).history = record.history


def gathered_record(model: nn.Module) -> StructureRecord:
    """A copy of all that is recorded anywhere inside the model, with the model's own paths."""
    found = StructureRecord()
    for path, module in model.named_modules():
        record = module.__dict__.get(_KEPT)
        if record is None:
            continue
        prefix = plain_path(path + "." if path else "")
        copied = StructureRecord.from_dict(record.to_dict())
        for name in TABLES:
            for inner, entry in getattr(copied, name).items():  # groups of two bodies are not one
                getattr(found, name)[prefix + inner] = prefix + entry if name == "tied" else entry
        found.history += copied.history
    return found


def plain_path(path: str) -> str:
    """The path of a module or tensor without what compiled blocks and adapters put into it."""
    return ".".join(part for part in path.split(".") if part not in _AROUND)
