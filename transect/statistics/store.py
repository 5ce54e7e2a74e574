"""The collected sums: merged, saved and read as one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TransectError
from ..store import keep, kept
from .gram import is_gram
from .kinds import Statistic, Sums
from .unreached import of_the_others

KIND = "statistics"  # what a file of them says that it holds
LAYOUT = 2  # of the sums in a file: another number, another file
_SEPARATOR = "|"  # key|statistic|sum, the name of a tensor on disk


class Statistics:
    """Sums by (key, statistic). `dtype` is the precision in which they are added up."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self._sums: dict[tuple[str, str], Sums] = {}
        self._derived: dict[Any, Tensor] = {}

    def sums(self, key: str, statistic: Statistic, shape: tuple[int, int], like: Any) -> Sums:
        """The sums of one statistic, made with zeros on first use; `like` is a module on the right device."""
        found = self._sums.get((key, statistic.label))
        if found is None:
            tensor = next(like.parameters(), None)
            device = torch.device("cpu") if tensor is None else tensor.device
            found = self._sums[key, statistic.label] = statistic.zeros(*shape, self.dtype, device)
        return found

    def value(self, key: str, statistic: Statistic) -> Tensor:
        """The statistic's value, see its class; an error if it was not collected or has seen no data.

        For an expert that no position was sent to, see `unreached`.
        """
        found = self._sums.get((key, statistic.label))
        if found is None:
            raise TransectError(f"the statistic {statistic.label} of {key} was not collected")
        borrowed = of_the_others(key, statistic, self._sums)
        if borrowed is not None:
            return borrowed
        if float(found["count"]) == 0:
            raise TransectError(f"the statistic {statistic.label} of {key} has seen no data")
        return statistic.value(found)

    def derived(self, what: Any, make: Callable[[], Tensor]) -> Tensor:
        """Something small that follows from the statistics, made at the first call and remembered for the next ones.

        what: names it, and all that it depends on beside the sums.
        """
        if what not in self._derived:
            self._derived[what] = make()
        return self._derived[what]

    def copy_from(self, other: Statistics, key: str, statistic: Statistic) -> None:
        """Take over one statistic from another store, sharing its tensors."""
        found = other._sums.get((key, statistic.label))
        if found is None:
            raise TransectError(f"the statistic {statistic.label} of {key} was not collected")
        self._derived.clear()
        self._sums[key, statistic.label] = found

    def __contains__(self, item: tuple[str, Statistic]) -> bool:
        return (item[0], item[1].label) in self._sums

    def merge(self, other: Statistics) -> Statistics:
        """Add another part's sums, in place; the result is that of collecting over both parts' data."""
        self._derived.clear()
        for key, sums in other._sums.items():
            mine = self._sums.get(key)
            if mine is None:
                self._sums[key] = {name: tensor.clone() for name, tensor in sums.items()}
                continue
            for name, tensor in sums.items():
                if mine[name].shape != tensor.shape:
                    raise TransectError(f"cannot merge {key}: shapes {tuple(mine[name].shape)}, {tuple(tensor.shape)}")
                mine[name] += tensor.to(mine[name])
        return self

    def all_reduce(self) -> None:
        """Sum over all processes of torch.distributed; each then holds the total."""
        for key in sorted(self._sums):
            for tensor in self._sums[key].values():
                # NCCL adds on GPUs only, and some sums (the counts) are kept on the CPU.
                moved = tensor.cuda() if torch.distributed.get_backend() == "nccl" else tensor
                torch.distributed.all_reduce(moved)
                tensor.copy_(moved)

    def check_finite(self) -> None:
        """Raise an error that names a layer whose activations or gradients were NaN or infinite."""
        for (key, label), sums in self._sums.items():
            for tensor in sums.values():
                # one number per row is enough: a NaN or infinity anywhere in a Gram matrix reaches its diagonal, which
                # lies within its panels
                probe = tensor.diagonal() if is_gram(sums) and tensor.ndim == 2 else tensor
                if not torch.isfinite(probe).all():
                    raise TransectError(f"NaN or infinite activations or gradients at {key} (seen by {label})")

    def state(self) -> dict[str, Tensor]:
        """All sums as flat tensors, names `key|statistic|sum`."""
        return {
            _SEPARATOR.join((*key, name)): tensor.contiguous()
            for key, sums in self._sums.items()
            for name, tensor in sums.items()
        }

    @staticmethod
    def of_state(state: Mapping[str, Tensor], dtype: str) -> Statistics:
        """The sums that `state` gave, and the precision in which they were added up, as torch writes it."""
        store = Statistics(getattr(torch, dtype.removeprefix("torch.")))
        for name in state:
            key, label, part = name.split(_SEPARATOR)
            store._sums.setdefault((key, label), {})[part] = state[name]
        return store

    def save(self, path: Path, of: str, collected: Iterable[str]) -> None:
        """Write the sums to a file. of: what they are of, and begins with KIND; `load` wants the same.

        collected: labels of the statistics that were asked for; of some, no matrix may have had any.
        """
        keep(path, self.state(), of, {KIND: str(self.dtype), "collected": sorted(collected)})

    @staticmethod
    def load(path: Path, of: str) -> tuple[Statistics, set[str]] | None:
        """Read saved sums, and the labels of what was collected.

        None if there are none, if they are of another model, data or setting, or damaged.
        """
        found = kept(path, of)
        return None if found is None else (Statistics.of_state(found, found.note[KIND]), set(found.note["collected"]))
