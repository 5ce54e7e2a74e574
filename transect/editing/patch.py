"""What an edit did to a model, small: as a step back that is exact to the bit, and where it can be, one forward again.

A change of low rank is kept as its factors, one of some rows as their new values, one of a whole tensor as the
difference; beside it stands what the step back by these alone would get wrong, packed (see `lossless`). What was
overwritten as a whole has only a step back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, Matrix
from ..anatomy.storage import is_dense
from ..errors import BadCheckpoint
from .lossless import packed, unpacked

_PARTS = {"factors": ("left", "right"), "rows": ("rows", "values"), "difference": ("difference",), "whole": ()}


def product(left: Tensor, right: Tensor, onto: Tensor | None = None) -> Tensor:
    """left @ right (d_out x d_in, float64) for left d_out x r and right r x d_in, added to `onto` in place.

    Term by term, so that it is the same to the bit on every machine, which a matrix product is not.
    """
    left, right = left.double(), right.double()
    total = torch.zeros(len(left), right.shape[1], dtype=torch.float64) if onto is None else onto
    for column, row in zip(left.T, right, strict=True):
        total += column[:, None] * row
    return total


@dataclass(frozen=True)
class Part:
    """How one matrix W (d_out x d_in), or one parameter, was changed.

    kind: "factors" (W + left @ right), "rows" (rows set to values, and in `bias`, if that is there, the bias too),
    "difference" (a parameter + difference) or "whole" (overwritten). numbers: those tensors by name. code: what the
    tensor was before, beyond what the kind says of it; 1-D, uint8.
    """

    kind: str
    numbers: Mapping[str, Tensor]
    code: Tensor

    @staticmethod
    def of(kind: str, numbers: Mapping[str, Tensor], before: Tensor, after: Tensor) -> Part:
        """before, after: the tensor, on the CPU."""
        return Part(kind, numbers, packed(before, _stepped_back(kind, numbers, after)))

    def before(self, after: Tensor) -> Tensor:
        """The tensor as it was, on the CPU."""
        return unpacked(self.code, _stepped_back(self.kind, self.numbers, after.detach().cpu()))


def _stepped_back(kind: str, numbers: Mapping[str, Tensor], after: Tensor) -> Tensor:
    if kind == "factors":
        return (after.double() - product(numbers["left"], numbers["right"])).to(after.dtype)
    if kind == "difference":
        return (after.double() - numbers["difference"].double()).to(after.dtype)
    return after


@dataclass
class Patch:
    """All changes of one edit.

    matrices: by the matrix's name. tensors: of other parameters, by name. added: parameters that the model did not
    have. biases: matrices that have to have a bias for the edit. config: entries of the model's config, before and
    after.
    """

    matrices: dict[str, Part] = field(default_factory=dict)
    tensors: dict[str, Part] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def can_be_repeated(self) -> bool:
        """Whether it also says what the edit does to other weights than those that it was made on."""
        return all(part.kind != "whole" for part in self.matrices.values())

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and JSON that goes with them."""
        tensors = {}
        for table in ("matrices", "tensors"):
            for name, part in getattr(self, table).items():
                tensors |= {f"{table}/{name}/{key}": tensor for key, tensor in part.numbers.items()}
                tensors[f"{table}/{name}/code"] = part.code
        kinds = {
            table: {name: part.kind for name, part in getattr(self, table).items()} for table in ("matrices", "tensors")
        }
        return tensors, {**kinds, "added": self.added, "biases": self.biases, "config": self.config}

    @staticmethod
    def read(tensors: Mapping[str, Tensor], note: Any, anatomy: Anatomy) -> Patch:
        """What `stored` gave; BadCheckpoint unless all of it fits this model."""
        try:
            parts = {
                table: {name: _part(kind, tensors, f"{table}/{name}/") for name, kind in note[table].items()}
                for table in ("matrices", "tensors")
            }
            config = {name: (before, after) for name, (before, after) in note["config"].items()}
            found = Patch(**parts, added=note["added"], biases=note["biases"], config=config)
            fits = found._fits(anatomy)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            fits = False
        if not fits:
            raise BadCheckpoint("it does not fit the model that lies beside it")
        return found

    def _fits(self, anatomy: Anatomy) -> bool:
        parameters, settings = dict(anatomy.model.named_parameters()), vars(anatomy.model.config)
        known = {matrix.name: matrix for matrix in anatomy.matrices()}
        return (
            all(name in known and _fits(part, known[name].shape, known[name]) for name, part in self.matrices.items())
            and all(
                name in parameters and name not in self.added and _fits(part, tuple(parameters[name].shape))
                for name, part in self.tensors.items()
            )
            and all(name.endswith(".bias") and name in parameters for name in self.added)
            and all(name in known and is_dense(known[name].module) for name in self.biases)
            and all(
                type(before) is type(after) is type(settings.get(name)) is bool
                for name, (before, after) in self.config.items()
            )
        )


def _part(kind: str, tensors: Mapping[str, Tensor], prefix: str) -> Part:
    names = _PARTS[kind] + (("bias",) if f"{prefix}bias" in tensors else ())
    return Part(kind, {name: tensors[prefix + name] for name in names}, tensors[f"{prefix}code"])


def _fits(part: Part, shape: tuple[int, ...], matrix: Matrix | None = None) -> bool:
    """Whether a part is of a tensor of that shape."""
    kind, numbers = part.kind, part.numbers
    fits = part.code.dtype == torch.uint8 and part.code.dim() == 1
    fits = fits and all(one.is_floating_point() for name, one in numbers.items() if name != "rows")
    if matrix is None:
        return fits and (kind == "whole" or (kind == "difference" and tuple(numbers["difference"].shape) == shape))
    fits = fits and is_dense(matrix.module) and kind != "difference"
    if kind == "factors":
        left, right = numbers["left"], numbers["right"]
        fits = fits and left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0]
        fits = fits and (left.shape[0], right.shape[1]) == shape
    if kind == "rows":
        rows, bias = numbers["rows"], numbers.get("bias")
        fits = fits and rows.dtype == torch.int64 and rows.dim() == 1
        fits = fits and (rows.numel() == 0 or 0 <= int(rows.min()) <= int(rows.max()) < shape[0])
        fits = fits and tuple(numbers["values"].shape) == (len(rows), shape[1])
        fits = fits and (bias is None or tuple(bias.shape) == (len(rows),))
    return fits


def parameters_of(model: Any, matrices: Iterable[Matrix]) -> set[str]:
    """Names of the parameters in which the matrices and their biases are stored."""
    held = {id(parameter) for matrix in matrices for parameter in matrix.module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}
