"""What a probe found: arrays with names, axes and units, the sentences that say what they mean, and files of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..store import Folder, keep, kept, write_text

KIND = "an inspection"  # what a folder of results is, see `transect.store.Folder`


@dataclass(frozen=True)
class Quantity:
    """One array.

    values: on the CPU. axes: what each dimension counts, such as ("layer", "head"). unit: such as "nats" or "share"; ""
    for a pure number. about: what it is, in a few words.
    """

    values: Tensor
    axes: tuple[str, ...]
    unit: str
    about: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", torch.as_tensor(self.values).detach().cpu().contiguous())
        if self.values.dim() != len(self.axes):
            raise ValueError(f"{self.about}: {len(self.axes)} axes {self.axes} for shape {tuple(self.values.shape)}")


@dataclass
class Result:
    """What one probe found in one model.

    quantities: the arrays by name. labels: names of an axis's entries (such as the matrices' names), where numbers from
    0 do not say enough. findings: plain sentences with the numbers. caveats: what the numbers do not mean.
    probe, settings: filled in by the frame.
    """

    quantities: dict[str, Quantity]
    findings: Sequence[str] = ()
    caveats: Sequence[str] = ()
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    probe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """The values of a quantity."""
        return self.quantities[name].values

    def label(self, axis: str, count: int) -> list[str]:
        """Names of an axis's entries: its labels, or 0, 1, 2 ..."""
        return list(self.labels.get(axis, map(str, range(count))))

    @staticmethod
    def files(probe: str) -> tuple[str, str]:
        """Names in the folder of what `save` writes for a probe: the arrays with all that was found, and that alone."""
        return f"data/{probe}.safetensors", f"data/{probe}.json"

    def save(self, folder: Folder, key: str = "") -> None:
        """Write the result. The JSON is for other programs and is never read back. key: what `load` is to ask for."""
        arrays, described = self.files(self.probe)
        tensors = {name: one.values for name, one in self.quantities.items()}
        keep(folder.file(arrays), tensors, key, self._described())
        write_text(folder.file(described), json.dumps(self._described(), indent=1))

    @staticmethod
    def load(folder: Folder, probe: str, key: str) -> Result | None:
        """What `save` wrote of that key; None where there is nothing, nothing of that key, or something damaged."""
        found = kept(folder.path / Result.files(probe)[0], key)
        if found is None:
            return None
        said = found.note
        quantities = {
            name: Quantity(found[name], tuple(one["axes"]), one["unit"], one["about"])
            for name, one in said["quantities"].items()
        }
        result = Result(quantities, said["findings"], said["caveats"], said["labels"], probe, said["settings"])
        write_text(folder.file(Result.files(probe)[1]), json.dumps(said, indent=1))  # a kill may have been between them
        return result

    def _described(self) -> dict[str, Any]:
        return {
            "probe": self.probe, "settings": dict(self.settings), "findings": list(self.findings),
            "caveats": list(self.caveats), "labels": {axis: list(names) for axis, names in self.labels.items()},
            "quantities": {
                name: {"axes": one.axes, "unit": one.unit, "about": one.about, "shape": list(one.values.shape)}
                for name, one in self.quantities.items()
            },
        }  # fmt: skip
