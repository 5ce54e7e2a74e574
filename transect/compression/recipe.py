"""What to do to a model, as one value: validated before any work, and written into the checkpoint afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..anatomy import MLP, Anatomy, Matrix
from ..errors import OutOfReach, TransectError
from ..statistics import Statistic
from .allocation import allocation_named, check_keep, is_ranking, needs_measure
from .compressors import compressor_of, out_of_reach
from .registry import Method, method
from .rounding import stored_share
from .sizes import dense_bytes


@dataclass(frozen=True)
class Recipe:
    """A compression: which method, how many bytes to keep, and how they are shared out.

    keep: share of the targeted matrices' bytes to keep, in (0, 1]. allocation: empty for the method's own default.
    settings, allocation_settings: of the method and of the allocation; see `transect methods NAME`.
    sequential: calibrate each block on the outputs of the blocks already compressed, instead of on the dense model's.
    refit: refit the operators' last factors on the compressed model's activations (methods that have it).
    structure_keep: share that the structure keeps of numbers as wide as the model's, where they are then rounded (see
        `rounding`), so that `keep` remains; `resolved` finds it.
    """

    method: str
    keep: float
    allocation: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    allocation_settings: Mapping[str, Any] = field(default_factory=dict)
    sequential: bool = False
    refit: bool = False
    structure_keep: float = 0.0

    def __post_init__(self) -> None:
        if not self.allocation:
            object.__setattr__(self, "allocation", self.registered.allocation)
        if not self.structure_keep:
            object.__setattr__(self, "structure_keep", self.keep)

    def resolved(self, anatomy: Anatomy, matrices: Sequence[Matrix]) -> Recipe:
        """The same with all defaults filled in; an error if anything in it cannot be done to these matrices.

        Raises OutOfReach where only the budget is too small for the method on this model.
        """
        chosen, family = self.registered, self.registered.family
        settings = chosen.settings(self.settings)
        allocation_settings = allocation_named(self.allocation).settings(self.allocation_settings)
        check_keep(self.keep)
        if not matrices:
            raise TransectError(
                "there is nothing to compress: no block has such matrices. They were dropped, parts stand in their "
                "places (`transect inspect` shows what is there), or the model has none of these roles"
            )
        if family == "slicing":
            for block in anatomy.blocks:
                if isinstance(block.mlp, MLP):
                    block.mlp.refuse_narrowing()
        if not goes_with(chosen, self.allocation):
            raise TransectError(
                f"{self.allocation} allocation ranks singular components, and {self.method} has none; use a sharing"
                if is_ranking(self.allocation)
                else f"{self.method} shares out the budget itself; leave the allocation uniform"
            )
        if self.refit and not chosen.refit:
            raise TransectError(f"{self.method} has no refit; svd-llm has one")
        if self.refit and chosen.rounding is not None:
            raise TransectError(
                f"{self.method} stores numbers in few bits, which cannot be refitted; leave out the refit"
            )
        if self.sequential and family == "restructuring":
            raise TransectError(f"{self.method} changes the model as a whole, so it cannot go block by block")
        if self.sequential and not chosen.collects:
            raise TransectError(f"{self.method} uses no calibration data, so sequential calibration changes nothing")
        whole = {matrix.name for matrix in matrices} == {matrix.name for matrix in anatomy.matrices()}
        if family in ("slicing", "restructuring") and not whole:
            raise TransectError(f"{self.method} works on whole sublayers; it takes no choice of roles")
        keep = self.keep
        if chosen.rounding is not None and keep < 1:
            keep = min(1.0, keep / stored_share(matrices, chosen))
        if family == "restructuring":
            assert chosen.plan is not None
            with out_of_reach(chosen):
                chosen.plan(anatomy, keep, **settings)
        elif self.allocation == "uniform":  # others need scores, and are checked when those are known
            compressor_of(anatomy, matrices, chosen, settings, dict.fromkeys((m.name for m in matrices), keep))
        elif is_ranking(self.allocation) and keep < 1:
            _check_rank_one(matrices, keep)
        return replace(self, settings=settings, allocation_settings=allocation_settings, structure_keep=keep)

    @property
    def registered(self) -> Method:
        """The method of that name."""
        return method(self.method)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that the method and the allocation need."""
        return tuple(dict.fromkeys([*self.registered.collects, *allocation_named(self.allocation).needs]))

    @property
    def needs_data(self) -> bool:
        """Whether calibration data must be given."""
        return bool(self.needs) or self.registered.data or self.refit or needs_measure(self.allocation)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for the structure record's history."""
        return asdict(self)


def _check_rank_one(matrices: Sequence[Matrix], keep: float) -> None:
    """OutOfReach where a budget does not pay for rank 1 of every matrix, which a ranking leaves at least."""
    least = sum(sum(matrix.shape) * matrix.module.weight.element_size() for matrix in matrices)
    dense = sum(dense_bytes(matrix) for matrix in matrices)
    if least > keep * dense:
        raise OutOfReach(
            f"keep={keep:.4g} does not pay for rank 1 of every matrix, which takes {least / dense:.4g} of the bytes; "
            "raise it"
        )


def goes_with(chosen: Method, allocation: str) -> bool:
    """Whether a method can be combined with an allocation."""
    if chosen.family == "restructuring":
        return allocation == "uniform"
    return chosen.family == "factorization" or not is_ranking(allocation)
