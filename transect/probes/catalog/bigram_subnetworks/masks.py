"""Masks over the weights of a model's matrices: made, combined, put on for a while, and stored as bits.

A mask is a bool tensor (d_out x d_in) for each matrix, by its name, such as `blocks.3.mlp.up`; True keeps a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ....anatomy import Matrix
from ....errors import TransectError

Masks = dict[str, Tensor]


def uniform(matrices: Sequence[Matrix], keep: bool) -> Masks:
    """All weights, or none."""
    return {one.name: torch.full(one.shape, keep, dtype=torch.bool, device=one.weight.device) for one in matrices}


def complement(masks: Mapping[str, Tensor]) -> Masks:
    """What these leave out."""
    return {name: ~mask for name, mask in masks.items()}


def union(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Masks:
    """What either keeps: a candidate circuit on top of another. A matrix without a mask in one is as in the other."""
    for name in one.keys() & other.keys():
        if one[name].shape != other[name].shape:
            shapes = f"{tuple(one[name].shape)} and {tuple(other[name].shape)}"
            raise TransectError(f"the two masks of {name} have the shapes {shapes}")
    return {**other, **{name: mask | other[name] if name in other else mask for name, mask in one.items()}}


def count(masks: Mapping[str, Tensor]) -> int:
    """How many weights they keep."""
    return sum(int(mask.sum()) for mask in masks.values())


def density(masks: Mapping[str, Tensor]) -> float:
    """Share of the weights that they keep."""
    return count(masks) / max(1, sum(mask.numel() for mask in masks.values()))


def shuffled(masks: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """As many weights of every matrix, at random."""
    found = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        found[name] = mask.flatten()[order].view_as(mask)
    return found


def largest(masks: Mapping[str, Tensor], matrices: Sequence[Matrix]) -> Masks:
    """As many weights of every matrix, those of largest magnitude."""
    found = {}
    for one in matrices:
        number, size = int(masks[one.name].sum()), one.weight.abs().flatten()
        mask = torch.zeros_like(size, dtype=torch.bool)
        mask[size.topk(number).indices] = True
        found[one.name] = mask.view(one.shape)
    return found


@contextmanager
def applied(matrices: Sequence[Matrix], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the `with` the weights that a mask leaves out are 0; biases stay. Then all is as before, bit for bit.

    Matrices without a mask stay whole. Holds a copy of the others.
    Raises TransectError for a mask of another shape, or of a matrix that is not there, before any change.
    """
    by_name = {one.name: one for one in matrices}
    for name, mask in masks.items():
        if name not in by_name:
            raise TransectError(f"there is a mask for {name}, and the model has no such matrix")
        if tuple(mask.shape) != by_name[name].shape or mask.dtype != torch.bool:
            raise TransectError(
                f"the mask of {name} should be bool of shape {by_name[name].shape}, not {mask.dtype} of "
                f"{tuple(mask.shape)}"
            )
    whole = {name: by_name[name].weight.clone() for name in masks}
    try:
        for name, mask in masks.items():
            by_name[name].write(torch.where(mask.to(whole[name].device), whole[name], 0))
        yield
    finally:
        for name, weight in whole.items():
            by_name[name].write(weight)


def packed(masks: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """All masks one behind the other in the order of these names, row by row, eight weights a byte (uint8)."""
    bits = torch.cat([masks[name].flatten().cpu() for name in names])
    return torch.from_numpy(np.packbits(bits.numpy()))


def unpacked(stored: Tensor, matrices: Sequence[Matrix]) -> Masks:
    """What `packed` stored of these matrices. TransectError where it is of matrices of other sizes."""
    sizes = [one.shape[0] * one.shape[1] for one in matrices]
    if len(stored) != -(-sum(sizes) // 8):
        raise TransectError(f"{len(stored)} bytes hold no masks of {sum(sizes)} weights: they are of another model")
    bits = torch.from_numpy(np.unpackbits(stored.numpy())[: sum(sizes)]).bool().split(sizes)
    return {one.name: part.view(one.shape).to(one.weight.device) for one, part in zip(matrices, bits, strict=True)}
