"""SpikingBrain (Pan et al., 2025, arXiv:2509.05276), Section 3.3: what every matrix reads becomes counts of spikes."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...anatomy.storage import dense, is_dense
from ...errors import TransectError
from ...forward import run_body, to_device
from ...operators.grouped_integer import GroupedInteger
from ...operators.spiking import Spiking
from ...parameters import block_numbers
from ...parts.catalog.spikingbrain import counting
from ..registry import Calibration, Range, conversion

_BATCHES = 2  # in which spikes are counted for what the user is told


def _matrices(anatomy: Anatomy, layers: str) -> list[Any]:
    return [matrix for number in block_numbers(layers, anatomy.blocks) for matrix in anatomy.blocks[number].matrices()]


def _check(anatomy: Anatomy, layers: str, **_: Any) -> None:
    found = _matrices(anatomy, layers)
    if not found:
        raise TransectError("spikingbrain-spikes: these blocks have no matrix whose input could be coded")
    for matrix in found:
        if not is_dense(matrix.module):
            raise TransectError(
                f"{matrix.name} is stored as {type(matrix.module).__name__}: code spikes first, or of the model that "
                "it came from"
            )


@conversion(
    "spikingbrain-spikes",
    paper="arXiv:2509.05276",
    group="spikes",
    exact="what a matrix reads is within half a threshold of what it was, and counts are coded without loss",
    check=_check,
    causal=False,
)
@torch.no_grad()
def spikingbrain_spikes(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    k: Annotated[float, Range(0, 1e6, above=True)] = 3.0,
    int8: bool = True,
    group: Annotated[int, Range(1, 2**20)] = 128,
    layers: str = "",
) -> None:
    """Each matrix reads whole numbers of spikes times a threshold that each position's mean sets; weights in 8 bits.

    The threshold is the mean of |x| over k. Nothing is trained. It says what spiking hardware would have to compute and
    saves nothing here: with data the share of silent inputs, the spikes of an input, their sparsity, and an idealized
    energy are told. The report's keys and values in 8 bits are left out, and a width need not divide by the group.

    k: the larger, the finer and the less sparse.
    int8: round the weights to 8 bits, symmetrically, with a scale for each row and group of columns.
    group: columns that share a scale; the last group of a row may be shorter.
    layers: only these blocks, such as 0-5,7; default all.
    """
    found: list[Spiking] = []
    for matrix in _matrices(anatomy, layers):
        weight, bias = matrix.weight, matrix.bias
        inner = rounded(weight, group) if int8 else dense(weight, bias)
        if isinstance(inner, GroupedInteger):
            inner.set_bias(bias)
        spiking = Spiking(inner).to(weight)  # k too, as a folder of this type would keep it
        spiking.k.fill_(k)
        matrix.replace(spiking)
        found.append(matrix.module)
    if calibration.data is not None:
        with counting(found) as counted:
            for batch in list(calibration.data)[:_BATCHES]:
                run_body(anatomy.model, to_device(batch, anatomy.model.device))
        calibration.told.update(counted.told())


def rounded(weight: Tensor, group: int) -> GroupedInteger:
    """W to the nearest multiples, from -127 to 127, of a scale for each row and group of columns."""
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    scale = (padded.abs().amax(-1) / 127).clamp_min(torch.finfo(weight.dtype).tiny)
    codes = (padded / scale[..., None]).round().clamp(-127, 127) + 128
    return GroupedInteger.from_codes(codes.flatten(1)[:, : weight.shape[1]], scale, None, 8, group)
