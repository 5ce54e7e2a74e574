"""Memorised text removed without naming it: the weight directions along which the loss hardly bends are cut away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor

from ....anatomy import Matrix
from ....anatomy.architecture import MATRIX_ROLES
from ....data import Specimen
from ....errors import TransectError
from ....forward.objective import task_of
from ....parameters import Range, block_numbers, pieces
from ....probes.curvature import Curvature, curvature, kept_pairs
from ...journal import Journal
from ...registry import editing
from .recitation import LOOSE, recitation

PAPER_LAYERS = "paper"
_FIRST, _LAST = 23 / 32, 25 / 32  # depth of the layers that the paper edits in OLMo-2-7B


def measure(specimen: Specimen) -> dict[str, float]:
    """Recitation of the passages, if there are any; the frame adds the loss."""
    if not specimen.known_passages or task_of(specimen.model) != "causal":
        return {}
    found = recitation(specimen, specimen.known_passages)
    return {
        f"recited word for word, share of {len(specimen.known_passages)} passages": found.strict,
        f"recited to {LOOSE:.0%}, share of passages": found.loose,
        "likeness of what is recited": found.likeness,
    }


def check(specimen: Specimen, *, layers: str, roles: str, rho: float) -> None:
    """Settings and text; everything else depends on the text itself."""
    if rho <= 0:
        raise TransectError(f"kfac-edit: rho must be above 0, got {rho}: nothing would be left of the matrices")
    chosen_matrices(specimen, layers, roles)
    _ = specimen.text


@editing("kfac-edit", paper="arXiv:2510.24256", measure=measure, check=check)
def kfac_edit(
    specimen: Specimen,
    journal: Journal,
    *,
    layers: str = PAPER_LAYERS,
    roles: str = "gate,up",
    rho: Annotated[float, Range(0, 1)] = 0.6,
) -> Mapping[str, Any]:
    """Forget text that was learnt by heart, without naming it, by keeping only what shared structure bends the loss.

    With G = E[g gᵀ] (d_out x d_out) = U_G diag(λ) U_Gᵀ and A = E[x xᵀ] (d_in x d_in) = U_A diag(μ) U_Aᵀ, the loss bends
    by λ_i μ_j along u_i v_jᵀ. Of C = U_Gᵀ W U_A the fewest entries stay whose λ_i μ_j add up to the share rho of all
    curvature mass, and W becomes U_G (C kept) U_Aᵀ. Biases stay, and nothing is trained. Directions that many texts
    need bend the loss on average; what serves single texts does so hardly, and goes (Merullo et al., section 3).

    The curvature comes from the text that is given, with labels drawn from the model; about 20 million tokens like the
    training text in the paper. Rare facts and arithmetic suffer by design: look at them. Forgetting is not deletion:
    a little training may bring the text back. Which layers and which rho serve depends on the model, so try several.

    layers: blocks whose matrices are edited, counted from 0, such as 0,2-3, or all. paper is the same share of depth as
        the paper's blocks 23 to 25 of 32 (which it found for OLMo-2-7B; carrying them over is our choice).
    roles: which matrices there, of q, k, v, o, gate, up, down. A gate where the model has none is passed over.
    rho: share of the curvature mass that stays; 1 changes nothing. It is mass, not a count: most sits in few pairs.
    """
    matrices = chosen_matrices(specimen, layers, roles)
    curvatures = curvature(specimen, matrices)
    notes: dict[str, Any] = {"tokens for the curvature": max(one.positions for one in curvatures.values())}
    thin = [matrix.name for matrix in matrices if curvatures[matrix.name].positions < max(matrix.shape)]
    if thin:
        notes["warning"] = f"fewer tokens than {', '.join(thin)} has rows or columns: the curvature is poorly known"
    for matrix in matrices:
        bent = curvatures[matrix.name]
        weight, kept = keep_share(matrix.weight, bent, rho)
        notes[f"pairs kept in {matrix.name}"] = f"{float(kept.double().mean()):.2%}"
        journal.write(matrix, weight)
    return notes


def keep_share(weight: Tensor, bent: Curvature, rho: float) -> tuple[Tensor, Tensor]:
    """W' = U_G (C ⊙ M) U_Aᵀ, float64, and the mask M of the pairs that stay, both d_out x d_in."""
    kept = kept_pairs(bent.values_out, bent.values_in, rho)
    return bent.matrix(bent.coefficients(weight) * kept), kept


def chosen_matrices(specimen: Specimen, layers: str, roles: str) -> list[Matrix]:
    """The matrices of these roles in these layers. Raises TransectError where there is none, or a name is wrong."""
    wanted = pieces(roles)
    unknown = [role for role in wanted if role not in MATRIX_ROLES]
    if unknown or not wanted:
        raise TransectError(f"kfac-edit: roles={roles!r} should name some of {', '.join(MATRIX_ROLES)}, with commas")
    numbers = (
        papers_layers(specimen.layers) if layers == PAPER_LAYERS else block_numbers(layers, specimen.anatomy.blocks)
    )
    found = [matrix for matrix in specimen.anatomy.matrices(wanted) if matrix.block.index in numbers]
    if not found:
        raise TransectError(f"kfac-edit: blocks {layers} of the model have no {' or '.join(wanted)}")
    return found


def papers_layers(count: int) -> list[int]:
    """The blocks at the paper's share of the depth, in a model of so many."""
    return sorted({min(round(share * count), count - 1) for share in (_FIRST, (_FIRST + _LAST) / 2, _LAST)})
