"""What to do to a model, as one value: validated before any work, and written into the checkpoint afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..anatomy import Matrix
from ..errors import TransectError
from .allocation import allocation_named, check_keep, needs_measure
from .registry import Method, method


@dataclass(frozen=True)
class Recipe:
    """A compression: which method, how many bytes to keep, and how the ranks are shared out.

    keep: share of the targeted matrices' bytes to keep, in (0, 1].
    settings, allocation_settings: of the method and of the allocation; see `transect methods NAME`.
    sequential: calibrate each block on the outputs of the blocks already compressed, instead of on the dense model's.
    refit: refit the left factors on the compressed model's activations (methods whose paper has it).
    """

    method: str
    keep: float
    allocation: str = "uniform"
    settings: Mapping[str, Any] = field(default_factory=dict)
    allocation_settings: Mapping[str, Any] = field(default_factory=dict)
    sequential: bool = False
    refit: bool = False

    def resolved(self, matrices: Sequence[Matrix]) -> Recipe:
        """The same with all defaults filled in; an error if anything in it cannot be done to these matrices."""
        chosen = method(self.method)
        settings = chosen.settings(self.settings)
        allocation_settings = allocation_named(self.allocation).settings(self.allocation_settings)
        check_keep(self.keep, {matrix.name: matrix.shape for matrix in matrices})
        if self.refit and not chosen.refit:
            raise TransectError(f"{self.method} has no refit in its paper; svd-llm has one")
        if self.sequential and not chosen.needs:
            raise TransectError(f"{self.method} uses no calibration data, so sequential calibration changes nothing")
        return Recipe(
            self.method, self.keep, self.allocation, settings, allocation_settings, self.sequential, self.refit
        )

    @property
    def registered(self) -> Method:
        return method(self.method)

    @property
    def needs_data(self) -> bool:
        return bool(self.registered.needs) or self.refit or needs_measure(self.allocation)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
