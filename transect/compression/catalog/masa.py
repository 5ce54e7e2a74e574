"""MASA's conversion: attention matrices of all layers from a few shared ones (Zhussip et al., AAAI 2026,
arXiv:2508.04581), without training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...anatomy import Anatomy, Matrix
from ...anatomy.storage import is_dense
from ...errors import OutOfReach, TransectError
from ...operators.atoms import Atoms
from ...operators.shared import Bank
from ...statistics import InputCovariance, Statistics, key_of
from ..frame import put
from ..registry import Calibration, Range, restructuring
from ..sizes import dense_bytes
from ..weighted_svd import weighted_svd

Family = list[Matrix]  # matrices of one role and shape, of several blocks, that share atoms


def check(anatomy: Anatomy, keep: float, *, projections: str, group_size: int) -> None:
    """Raises OutOfReach where one atom for each family is still too much, since everything else stays dense."""
    if keep == 1:
        return
    families = families_of(anatomy, projections, group_size)
    if not families:
        raise TransectError(
            "masa shares matrices between blocks, but there are no two neighbouring blocks whose attention matrices "
            "have the same shapes"
        )
    targeted = sum(map(family_bytes, families))
    least = max(smallest_share(family) for family in families)
    if attention_share(anatomy, families, keep) < least:
        within = math.ceil(1e4 * (1 - (1 - least) * targeted / anatomy.matrix_bytes())) / 1e4
        raise OutOfReach(
            f"keep={keep:g} is out of reach of masa: it shares the matrices {', '.join(projections)} only, which are "
            f"{targeted / anatomy.matrix_bytes():.1%} of all; the smallest keep here is {within:g}"
        )


@restructuring("masa", paper="arXiv:2508.04581", check=check, needs=[InputCovariance()])
def masa(
    anatomy: Anatomy,
    calibration: Calibration,
    keep: float,
    *,
    projections: Literal["qkv", "qkvo"] = "qkv",
    group_size: Annotated[int, Range(0, 10_000)] = 0,
) -> None:
    """Share attention matrices between layers: mixtures of a few atoms, and a low-rank correction for each layer.

    Only attention matrices change, so the whole budget is saved on them, and all of them keep the same share. Every
    family (one projection in one group of layers) is decomposed by matrix PCA: with the layers' vec(W) as rows,
    X = U Σ Vᵀ, atoms are the leading rows of Vᵀ and coefficients UΣ, not centred. What is missing then is approximated
    at low rank, by SVD whitened with the layer's inputs. How the bytes are split between S atoms and rank r the paper
    does not say. Here every S is tried with the largest r that it leaves, and the split taken whose output error
    E||(W - Ŵ)x||² / E||Wx||², summed over the layers, is least. The weights of a family are held twice in float64.

    The order of a layer's heads and the bases inside them are free, and are left as they are: on the models tried,
    matching heads between layers left the spectra as flat, and rotating value heads helped at small budgets only.

    projections: which matrices are shared; o is the most sensitive one, so the default leaves it dense.
    group_size: at most so many neighbouring layers share atoms, in groups as equal as possible; 0 for all layers. The
        paper groups layers by how their removal changes the predictions; a fixed number is our choice.
    """
    if keep == 1:
        return
    families = families_of(anatomy, projections, group_size)
    share = attention_share(anatomy, families, keep)
    for family in calibration.shown(families, "masa"):
        convert(family, share, calibration.statistics)


def families_of(anatomy: Anatomy, projections: str, group_size: int) -> list[Family]:
    """One family a projection and group. Neighbours without attention, or of other shapes, end a group."""
    with_attention = [block for block in anatomy.blocks if block.attention is not None]
    families = []
    for _, same in groupby(with_attention, lambda block: [block.matrix(role).shape for role in projections]):
        run = list(same)
        groups = math.ceil(len(run) / group_size) if group_size else 1
        for number in range(groups):
            members = run[number * len(run) // groups : (number + 1) * len(run) // groups]
            if len(members) > 1:
                families += [[block.matrix(role) for block in members] for role in projections]
    for matrix in (matrix for family in families for matrix in family):
        if not is_dense(matrix.module):
            raise TransectError(
                f"masa shares dense matrices, but {matrix.name} is stored as {type(matrix.module).__name__}"
            )
    return families


def family_bytes(family: Family) -> int:
    """Bytes of all matrices of a family while they are dense."""
    return sum(map(dense_bytes, family))


def smallest_share(family: Family) -> float:
    """Of the bytes, with one atom and no correction."""
    d_out, d_in = family[0].shape
    return 1 / len(family) + 1 / (d_out * d_in)


def attention_share(anatomy: Anatomy, families: Sequence[Family], keep: float) -> float:
    """The share of the families' bytes that remains, if all other matrices stay as they are."""
    return 1 - (1 - keep) * anatomy.matrix_bytes() / sum(map(family_bytes, families))


def splits(layers: int, d_out: int, d_in: int, share: float) -> Iterator[tuple[int, int]]:
    """Every number of atoms S < L that fits, with the largest rank r of the corrections that then fits:
    S d_out d_in + L S + L r (d_out + d_in) <= share L d_out d_in.
    """
    budget = math.floor(share * layers * d_out * d_in + 1e-9)
    for atoms in range(1, layers):
        left = budget - atoms * (d_out * d_in + layers)
        if left >= 0:
            yield atoms, left // (layers * (d_out + d_in))


def convert(family: Family, share: float, statistics: Statistics) -> None:
    """Replace the matrices of a family by mixtures that together have that share of its bytes."""
    weights = torch.stack([matrix.weight.double() for matrix in family])
    covariances = [
        statistics.value(key_of(matrix, InputCovariance()), InputCovariance()).to(weights) for matrix in family
    ]
    atoms, coefficients = matrix_pca(weights)
    count, rank = best_split(weights, atoms, coefficients, covariances, share)
    atoms, coefficients = balanced(atoms[:count], coefficients[:, :count])
    missing = weights - torch.einsum("ls,sij->lij", coefficients, atoms)
    bank, group = Bank(atoms), f"{family[0].role}.{family[0].block.index}"
    for layer, matrix in enumerate(family):
        correction = weighted_svd(missing[layer], input_metric=covariances[layer]).truncate(rank) if rank else None
        put(matrix, Atoms.from_numbers(group, bank, layer == 0, coefficients[layer], correction))


def matrix_pca(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms D (L x d_out x d_in), most important first, and coefficients C (L x L), with W_l = Σ_s C_ls D_s.

    The first S are the best S shared matrices in total squared error. The atoms are orthonormal in the Frobenius inner
    product (those without any energy are 0). weights: (L x d_out x d_in). From the L x L Gram matrix.
    """
    flat = weights.flatten(1)
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    vectors, energies = vectors.flip(1), values.flip(0)
    present = energies > 1e-14 * energies[0]
    sigma = torch.where(present, energies, 0).sqrt()
    atoms = (vectors.T @ flat) / torch.where(present, sigma, torch.inf)[:, None]
    return atoms.view_as(weights), vectors * sigma


def best_split(
    weights: Tensor, atoms: Tensor, coefficients: Tensor, covariances: Sequence[Tensor], share: float
) -> tuple[int, int]:
    """The S and r of `splits` with the least relative output error."""
    metrics = torch.stack(list(covariances))  # L x d_in x d_in
    whole = ((weights @ metrics) * weights).sum((1, 2))  # L: E||Wx||²
    whole = whole.clamp_min(1e-12 * whole.mean())  # a layer without any output must not decide alone
    whole = torch.where(whole > 0, whole, 1)
    missing, taken = weights.clone(), 0
    found = []
    layers, d_out, d_in = weights.shape
    for count, rank in splits(layers, d_out, d_in, share):
        for one in range(taken, count):
            missing -= coefficients[:, one, None, None] * atoms[one]
        taken = count
        spectra = torch.linalg.eigvalsh(missing @ metrics @ missing.mT)  # L x d_out, ascending
        lost = spectra[:, : d_out - rank].clamp_min(0).sum(1)
        found.append((float((lost / whole).sum()), count, rank))
    _, count, rank = min(found)
    return count, rank


def balanced(atoms: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The same mixtures with coefficients of root mean square 1 for every atom, so that a narrow dtype holds both."""
    scale = coefficients.square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    return atoms * scale[:, None, None], coefficients / scale
