"""What a probe found: arrays with names, axes and units, the sentences that say what they mean, and files of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import BadCheckpoint
from ..store import replacing


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

    def save(self, folder: Path, key: str = "") -> None:
        """Write <probe>.safetensors and <probe>.json. key: by which `load` is to recognise it."""
        described = {
            "probe": self.probe, "key": key, "settings": dict(self.settings), "findings": list(self.findings),
            "caveats": list(self.caveats), "labels": {axis: list(names) for axis, names in self.labels.items()},
            "quantities": {
                name: {"axes": one.axes, "unit": one.unit, "about": one.about, "shape": list(one.values.shape)}
                for name, one in self.quantities.items()
            },
        }  # fmt: skip
        with replacing(folder / f"{self.probe}.safetensors") as partial:
            save_file({name: one.values for name, one in self.quantities.items()}, partial)
        with replacing(folder / f"{self.probe}.json") as partial:
            partial.write_text(json.dumps(described, indent=1), encoding="utf-8")

    @staticmethod
    def load(folder: Path, probe: str, key: str | None = None) -> Result | None:
        """Read what `save` wrote; None where there is nothing, or nothing of that key.

        Raises BadCheckpoint for files that are damaged.
        """
        if not (folder / f"{probe}.json").exists():
            return None
        try:
            described = json.loads((folder / f"{probe}.json").read_text(encoding="utf-8"))
            if key is not None and described["key"] != key:
                return None
            arrays = load_file(folder / f"{probe}.safetensors")
            quantities = {
                name: Quantity(arrays[name], tuple(one["axes"]), one["unit"], one["about"])
                for name, one in described["quantities"].items()
            }
        except Exception as error:
            raise BadCheckpoint(f"the result of {probe} in {folder} is damaged ({error}); remove it") from error
        return Result(
            quantities, described["findings"], described["caveats"], described["labels"], probe, described["settings"]
        )
