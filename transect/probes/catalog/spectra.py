"""The spectrum of every weight matrix: ranks, norms and heavy tails. Looks at the weights alone."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ...data import Specimen
from ...errors import TransectError
from ...parameters import Range
from ...spectra import (
    FLOOR,
    SMALLEST_SPECTRUM,
    condition_number,
    hill_median,
    how_many_together,
    pooled_eigenvalues,
    power_law,
    singular_values,
)
from ...threads import side_by_side
from ..draw import Drawing, Table, heatmap, lines
from ..registry import probing
from ..result import Quantity, Result

_LARGEST_WINDOW = 2000  # FARMS's, for language models
_ABSOLUTE_FLOOR = 1e-5  # weightwatcher's: eigenvalues at most this large are left out of the fit
_STARTS = 500  # of a tail that are tried among the many eigenvalues of the windows
_FIGURES = {
    "side": ("", "the smaller side: how many singular values there are"),
    "frobenius_norm": ("", "‖W‖_F"),
    "spectral_norm": ("", "the largest singular value"),
    "nuclear_norm": ("", "the sum of the singular values"),
    "nuclear_share": ("share", "nuclear norm over the largest that its Frobenius norm allows: 1 is a flat spectrum"),
    "stable_rank": ("", "‖W‖_F² over the largest squared singular value"),
    "effective_rank": ("", "e^H of the squared singular values as shares of their sum"),
    "condition": ("", "the largest singular value over the smallest; infinite if that is zero, to rounding"),
    "alpha": ("", "tail exponent of the squared singular values"),
    "alpha_distance": ("", "how far the tail is from that power law (Kolmogorov-Smirnov)"),
    "alpha_tail": ("", "how many eigenvalues are in that tail"),
    "alpha_windows": ("", "tail exponent of windows of one shape"),
    "hill_windows": ("", "Hill's exponent of the upper half of the windows' eigenvalues"),
}


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    names = result.label("matrix", len(result["alpha"]))
    drawings: list[Drawing] = [
        _by_place(
            "Tail exponent by matrix", result["hill_windows"], names,
            "Hill's exponent. Smaller is a heavier tail: a few directions stand out. Windows of one shape, so that "
            "matrices of any shape can be compared.",
        ),
        _by_place(
            "Effective rank, as a share of the full one", result["effective_rank"] / result["side"], names,
            "1: all directions weigh the same. Near 0: a few directions carry the matrix.",
        ),
        _spectra(result, names),
    ]  # fmt: skip
    shown = (
        "side",
        "nuclear_share",
        "stable_rank",
        "effective_rank",
        "condition",
        "alpha",
        "alpha_windows",
        "hill_windows",
    )
    rows = [[name, *(round(float(result[key][number]), 3) for key in shown)] for number, name in enumerate(names)]
    note = "side: the full rank. alpha: whole matrix, as weightwatcher fits it. A gap: there is no tail to fit."
    return [*drawings, Table("Every matrix", note, ["matrix", *shown], rows)]


def _by_place(title: str, values: Tensor, names: list[str], note: str) -> Drawing:
    """One figure of each matrix, blocks by roles; the mean over the experts of a mixture."""
    places = [(name.split(".")[1], name.rpartition(".")[2]) for name in names]
    blocks, roles = (list(dict.fromkeys(column)) for column in zip(*places, strict=True))
    table = torch.full((len(blocks), len(roles)), float("nan"), dtype=torch.float64)
    for block, role in dict.fromkeys(places):
        mine = [number for number, place in enumerate(places) if place == (block, role)]
        table[blocks.index(block), roles.index(role)] = values[mine].nanmean()
    return heatmap(title, note, table, x=roles, y=blocks, xlabel="matrix", ylabel="block")


def _spectra(result: Result, names: list[str]) -> Drawing:
    """Singular values over their largest, averaged over the blocks, by role."""
    by_role: dict[str, list[Tensor]] = {}
    grid = torch.linspace(0, 1, 65, dtype=torch.float64)
    for name, values in zip(names, result["singular_values"].double(), strict=True):
        values = values[values.isfinite()]
        if values[0] > 0:
            places = (grid * (len(values) - 1)).round().long()
            by_role.setdefault(name.rpartition(".")[2], []).append(values[places] / values[0])
    return lines(
        "Singular values", "Mean over the blocks, each matrix over its largest. A steep start is a heavy tail.",
        {role: torch.stack(found).mean(0) for role, found in by_role.items()}, x=grid.tolist(),
        xlabel="position in the spectrum", ylabel="singular value over the largest", log=True,
    )  # fmt: skip


@probing("spectra", title="Spectra of the weights", paper="arXiv:2506.06280", draw=draw)
def spectra(
    specimen: Specimen,
    *,
    window: Annotated[int, Range(0, 100_000)] = 0,
    windows: Annotated[int, Range(1, 100)] = 4,
) -> Result:
    """Singular values, ranks, condition numbers and heavy-tail exponents of every weight matrix of every block.

    The exponent α of a matrix is that of weightwatcher (Martin and Mahoney, arXiv:1810.01075): the power law that fits
    a tail of the eigenvalues of W Wᵀ best, by maximum likelihood, its start chosen by the Kolmogorov-Smirnov distance.
    Eigenvalues of at most 1e-5 are left out; that is an absolute number, so α may change with the scale of W. It also
    depends on the matrix's shape. FARMS (arXiv:2506.06280) removes that: the same fit on the pooled eigenvalues of
    square windows of one size, and, less noisy, Hill's estimator on their upper half. The fit to windows tries at most
    500 starts of the tail, and leaves out eigenvalues below 1e-5 of the largest (both ours). NaN: fewer than 20
    eigenvalues, or no tail.
    Time: one eigenvalue problem of the smaller side a matrix, and windows² of the window's side. Runs on any model.

    window: rows (and columns) of a window; 0 is the smallest side of all the model's matrices, at most 2000.
    windows: windows along each side of a matrix, overlapping where they must. The paper takes 10 or 15; 4 costs less.
    """
    specimen.anatomy.check_finite()
    matrices = specimen.matrices()
    rows = window or min(_LARGEST_WINDOW, *(min(matrix.shape) for matrix in matrices))
    measured = side_by_side(
        lambda matrix: _measured(matrix.weight, rows, windows),
        matrices,
        most=how_many_together([matrix.shape for matrix in matrices]),
        shown=lambda items: specimen.shown(items, "spectra"),
    )
    values, tails = [found for found, _ in measured], [tail for _, tail in measured]
    figures = torch.cat([torch.stack([_ranks(one) for one in values]), torch.tensor(tails, dtype=torch.float64)], 1)
    padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=float("nan"))
    quantities = {
        name: Quantity(column, ("matrix",), *described)
        for (name, described), column in zip(_FIGURES.items(), figures.T, strict=True)
    }
    quantities["singular_values"] = Quantity(
        padded.float(), ("matrix", "number"), "", "singular values, falling; NaN beyond a matrix's last"
    )
    names = [matrix.name for matrix in matrices]
    caveats = [
        "An exponent is an estimate from few eigenvalues, and overlapping windows share them: small differences mean "
        "nothing. Heavier tails go with better training across models in the literature; that is a correlation.",
    ]
    if any(rows > min(matrix.shape) for matrix in matrices):
        caveats.append("Some matrices are smaller than the window and got smaller windows: compare those with care.")
    return Result(quantities, _findings(quantities, names, rows), caveats, {"matrix": names})


def _measured(weight: Tensor, rows: int, windows: int) -> tuple[Tensor, list[float]]:
    """The singular values of a matrix, and the last figures of `_FIGURES`."""
    values = singular_values(weight).cpu()
    return values, _tail(values) + _window_tail(weight, rows, windows)


def _ranks(values: Tensor) -> Tensor:
    """The first figures of `_FIGURES` from the singular values (falling) of one matrix (8), float64."""
    squares = values.square()
    total, nuclear, side = squares.sum(), values.sum(), len(values)
    shares = squares / total
    entropy = -torch.xlogy(shares, shares).sum()
    return torch.stack(
        [
            torch.tensor(float(side), dtype=torch.float64), total.sqrt(), values[0], nuclear,
            nuclear / (side * total).sqrt(), total / squares[0], entropy.exp(), condition_number(values),
        ]
    )  # fmt: skip


def _tail(values: Tensor) -> list[float]:
    """weightwatcher's exponent, its distance, and the length of the tail."""
    fit = power_law(values.square().flip(0), _ABSOLUTE_FLOOR)
    return [float("nan")] * 3 if fit is None else [fit.alpha, fit.distance, float(fit.tail)]


def _window_tail(weight: Tensor, rows: int, windows: int) -> list[float]:
    """The exponents of the windows' pooled eigenvalues: of the best fit, and Hill's."""
    pooled = pooled_eigenvalues(weight.double(), rows, windows=windows).cpu()
    fit = power_law(pooled, FLOOR * float(pooled[-1]), cuts=_STARTS)
    try:
        hill = hill_median(pooled)
    except TransectError:
        hill = float("nan")
    return [float("nan") if fit is None else fit.alpha, hill]


def _findings(quantities: dict[str, Quantity], names: list[str], rows: int) -> list[str]:
    alpha, windowed, hill = (quantities[name].values for name in ("alpha", "alpha_windows", "hill_windows"))
    share = quantities["effective_rank"].values / quantities["side"].values
    known = alpha.isfinite()
    found = []
    if known.any():
        inside = int(((alpha >= 2) & (alpha <= 6)).sum())
        found.append(
            f"The squared singular values of a matrix fall off like a power law with exponent {_spread(alpha)}; "
            f"{inside} of {int(known.sum())} exponents are from 2 to 6, the range that weightwatcher's authors see in "
            "well-trained models. A smaller exponent is a heavier tail: a few directions that stand out."
        )
    if not known.all():
        found.append(
            f"{int((~known).sum())} of {len(alpha)} matrices have no exponent: fewer than {SMALLEST_SPECTRUM} "
            "eigenvalues, or a flat spectrum."
        )
    if windowed.isfinite().any():
        found.append(
            f"With the shape of the matrix taken out (windows of {rows} x {rows}) the exponent is {_spread(windowed)}, "
            f"and Hill's steadier estimate {_spread(hill)}. By Hill's the heaviest tail is that of "
            f"{_least(hill, names)}, the lightest that of {_least(-hill, names)}."
        )
    low = int(share.nan_to_num(nan=2).argmin())
    found.append(
        f"The effective rank is {_spread(share)} of the full one; {names[low]} has the lowest: "
        f"{float(quantities['effective_rank'].values[low]):.1f} of {int(quantities['side'].values[low])}."
    )
    condition = quantities["condition"].values
    singular = int(condition.isinf().sum())
    found.append(
        f"The condition number is {_spread(condition)}; the worst is that of {_least(-condition, names)}"
        + (f". {singular} of {len(condition)} matrices are singular, to rounding." if singular else ".")
    )
    return found


def _spread(values: Tensor) -> str:
    finite = values[values.isfinite()]
    if len(finite) == 0:
        return "unknown"
    return f"{float(finite.median()):.2f} at the median ({float(finite.min()):.2f} to {float(finite.max()):.2f})"


def _least(values: Tensor, names: list[str]) -> str:
    return names[int(values.nan_to_num(nan=float("inf")).argmin())]
