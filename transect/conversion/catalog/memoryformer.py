"""MemoryFormer (Ding et al., NeurIPS 2024, arXiv:2411.12992): trained matrices as tables read by the input's signs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch

from ...anatomy import Anatomy
from ...anatomy.architecture import MATRIX_ROLES
from ...anatomy.storage import is_dense, shape_of
from ...errors import TransectError
from ...parameters import block_numbers, pieces
from ...parts import insert
from ...parts.catalog.memoryformer import fit_tables
from ...parts.insert import places
from ..inputs import inputs_of_modules
from ..registry import Calibration, Range, conversion
from ..stage import Stage


def _roles(roles: str) -> list[str]:
    chosen = pieces(roles)
    if unknown := set(chosen) - set(MATRIX_ROLES):
        raise TransectError(
            f"memoryformer: unknown roles {', '.join(sorted(unknown))}; known: {', '.join(MATRIX_ROLES)}"
        )
    return chosen


def _check(anatomy: Anatomy, bits: int, roles: str, layers: str, **_: Any) -> None:
    for number in block_numbers(layers, anatomy.blocks):
        for path in places(anatomy, "matrix", number, _roles(roles)):
            module: Any = anatomy.model.get_submodule(path)
            if not is_dense(module):
                raise TransectError(f"{path} is stored as {type(module).__name__}: convert first, and compress then")
            if (inputs := shape_of(module)[1]) % bits:
                raise TransectError(f"memoryformer: {path} has {inputs} inputs, no whole number of chunks of {bits}")


@conversion(
    "memoryformer",
    paper="arXiv:2411.12992",
    group="rewrites and starts",
    exact="nothing",
    check=_check,
    stages=(Stage("memoryformer", train="full", lr=3e-4, lowers="distill"),),
    causal=False,
)
@torch.no_grad()
def memoryformer(
    anatomy: Anatomy, calibration: Calibration, *, roles: str = "up", bits: Annotated[int, Range(1, 16)] = 4,
    weight: Literal["scaled", "probability"] = "scaled", positions: Annotated[int, Range(1, 2**20)] = 4096,
    layers: str = "",
) -> None:  # fmt: skip
    """Matrices become tables of which each input reads the rows that the signs of its chunks name. Ours; lossy.

    The rows are the least squares fit to what the matrix makes of its inputs on the data, block by block, each from
    what the blocks before it, as they are then, put out. That takes a pass over the data for each block. 2^bits / bits
    times the numbers are stored, and of these 1 / bits read. Tables follow a dense matrix from afar: the
    error on the data that they were fitted to is said, and all blocks then follow the model as it was (rate: three
    times the usual, as in the paper).

    roles: which matrices, of q, k, v, o, gate, up, down; fused ones go together.
    bits: of an address; it divides the inputs of the matrices.
    weight: of a row, see the part.
    positions: that the rows are fitted to, for each matrix.
    layers: only these blocks, such as 0-5,7; default all.
    """
    worst = 0.0
    for number in block_numbers(layers, anatomy.blocks):
        paths = places(anatomy, "matrix", number, _roles(roles))
        trained: dict[str, Any] = {path: anatomy.model.get_submodule(path) for path in paths}
        seen = inputs_of_modules(anatomy, trained, calibration.batches, positions)
        insert(
            anatomy.model, "matrix", "memoryformer", layers=[number], roles=_roles(roles), seed=calibration.seed,
            settings={"bits": bits, "weight": weight},
        )  # fmt: skip
        for path, matrix in trained.items():
            part: Any = anatomy.model.get_submodule(path)
            worst = max(worst, fit_tables(part, seen[path], matrix(seen[path])) ** 0.5)
    calibration.told["error of the tables over the size of the outputs they were fitted to, worst matrix"] = worst
