"""The structure record: what differs in a model's modules from what its config alone would build, as plain JSON.

It describes the state, not the steps, so that replaying it twice does nothing more than replaying it once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..errors import BadCheckpoint

FORMAT = 1


@dataclass
class StructureRecord:
    """Every structural change of one model.

    modules: module path -> description of the module that stands there now (see `operators.build`).
    attributes: module path -> attribute -> value; `config.<name>` is an attribute of the module's private config.
    parameters: parameter path -> its shape, where only a parameter's size has changed.
    history: what was done, newest last: method, settings, version. Informative; nothing is rebuilt from it.
    """

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: dict[str, list[int]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        """True when the config alone no longer describes the model."""
        return bool(self.modules or self.attributes or self.parameters)

    def set_module(self, path: str, description: dict[str, Any]) -> None:
        """The module at `path` is now the one described; what was recorded below it is gone."""
        self.modules = {key: value for key, value in self.modules.items() if not (key + ".").startswith(path + ".")}
        self.modules[path] = description

    def remove_block(self, blocks: str, index: int) -> None:
        """Forget block `index` of the module list at path `blocks`, and renumber the later ones."""

        def renumber(table: dict[str, Any]) -> dict[str, Any]:
            """The table without that block, and with the numbers of the later ones one lower."""
            kept = {}
            for path, value in table.items():
                if path.startswith(blocks + "."):
                    number, _, rest = path[len(blocks) + 1 :].partition(".")
                    if int(number) == index:
                        continue
                    path = f"{blocks}.{int(number) - (int(number) > index)}.{rest}"
                kept[path] = value
            return kept

        self.modules, self.attributes, self.parameters = map(renumber, (self.modules, self.attributes, self.parameters))

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the number of the format."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> StructureRecord:
        """From what `to_dict` gave; BadCheckpoint for another format."""
        if data.get("format") != FORMAT:
            raise BadCheckpoint(f"structure record of format {data.get('format')!r}; this version reads {FORMAT}")
        return StructureRecord(
            **{key: data.get(key, type(value)()) for key, value in asdict(StructureRecord()).items()}
        )


def record_of(model: nn.Module) -> StructureRecord:
    """The model's structure record; an unchanged model gets an empty one."""
    record = model.__dict__.get("_structure_record")
    if record is None:
        record = model.__dict__["_structure_record"] = StructureRecord()
    return record
