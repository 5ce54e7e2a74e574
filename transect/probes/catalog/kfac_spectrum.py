"""Where the loss bends in the weights, and which texts lean on the flat directions (Merullo et al., 2510.24256)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ...anatomy import Matrix
from ...data import Passage, Specimen
from ...forward import Batch, run_body
from ...forward.points import Place, Reader
from ..curvature import Curvature, counted_positions, curvature
from ..draw import Drawing, heatmap, lines
from ..registry import probing
from ..result import Quantity, Result

BANDS = {"top 10 %": 0.1, "10-25 %": 0.25, "25-50 %": 0.5, "bottom 50 %": 1.0}  # where each ends
_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the pairs
_MASSES = (0.5, 0.6, 0.75, 0.9, 0.99)
ROLES = {"mlp": ("gate", "up", "down"), "attention": ("q", "k", "v", "o"), "all": None}


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    names = result.label("matrix", len(result["mass"]))
    roles = {name.rpartition(".")[2]: None for name in names}
    by_role = {role: [number for number, name in enumerate(names) if name.endswith("." + role)] for role in roles}
    drawings: list[Drawing] = [
        lines(
            "Curvature in the sharpest pairs", "Mean over the blocks. A line that starts high: few pairs of directions "
            "hold most of the curvature.",
            {role: result["mass"][numbers].mean(0) for role, numbers in by_role.items()},
            x=[f"{share:.1%}" for share in _SHARES], xlabel="sharpest pairs, of all", ylabel="share of curvature mass",
        ),
        _spectrum("Input side: eigenvalues of A", result["values_in"], by_role),
        _spectrum("Output side: eigenvalues of G", result["values_out"], by_role),
    ]  # fmt: skip
    if "activation_ratio" in result.quantities:
        inputs = result.label("input", len(result["activation_ratio"]))
        drawings.append(
            heatmap(
                "Passages over text, by band", "Length of the inputs' part in each band of directions, sharpest first. "
                "Above 1: the passages use it more than the text does.",
                result["activation_ratio"], x=result.label("band", len(BANDS)), y=inputs, xlabel="band",
                ylabel="inputs", unit="ratio",
            )
        )  # fmt: skip
    return drawings


def _spectrum(title: str, values: Tensor, by_role: Mapping[str, list[int]]) -> Drawing:
    """Eigenvalues as shares of their sum, on 65 places from first to last, mean over the blocks."""
    grid = torch.linspace(0, 1, 65, dtype=torch.float64)
    series = {}
    for role, numbers in by_role.items():
        found = []
        for row in values[numbers].double():
            row = row[row.isfinite()]
            found.append(row[(grid * (len(row) - 1)).round().long()] / row.sum())
        series[role] = torch.stack(found).mean(0)
    note = "Mean over the blocks. A steep fall: the text moves, or pulls, few directions."
    return lines(
        title, note, series, x=grid.tolist(), xlabel="position in the spectrum", ylabel="share of the trace", log=True
    )  # fmt: skip


@probing("kfac-spectrum", title="Curvature of the loss", paper="arXiv:2510.24256", draw=draw)
def kfac_spectrum(specimen: Specimen, *, part: Literal["mlp", "attention", "all"] = "mlp") -> Result:
    """How the loss's curvature is spread over a matrix's directions, and whether passages lean on the flat ones.

    For y = W x the curvature along u_i v_jᵀ is λ_i μ_j, from the eigenpairs of E[g gᵀ] and E[x xᵀ] (K-FAC), with labels
    that the model draws itself. With passages (memorised ones, in the paper) the inputs' directions v_j are cut into
    bands by falling μ_j (top 10 %, 10-25 %, 25-50 %, bottom 50 %), and the mean length of x in each band is compared
    between passages and text. Eigenvectors come from the even sequences of the text and the comparison from the odd
    ones (ours), since directions are flattest on the very text that they were computed from. Ordering v_j by μ_j is
    ordering the pairs' sums over i. The last position of every sequence, which predicts nothing, is left out.
    Memory: 2 (d_in² + d_out²) float64 numbers a matrix, so name one part of a large model at a time. One pass with
    gradients over the text, and one without over half of it.

    part: which matrices: those of the MLPs, those of attention, or all.
    """
    matrices = specimen.matrices(ROLES[part])
    first, second = halves(list(specimen.text))
    passages = passage_batches(specimen, specimen.known_passages)
    found = curvature(specimen, matrices, first if passages and second else specimen.text)
    quantities = _spectra(matrices, found)
    labels: dict[str, Sequence[str]] = {
        "matrix": [matrix.name for matrix in matrices],
        "share": [f"{share:.1%}" for share in _SHARES],
        "kept": [f"{mass:.0%}" for mass in _MASSES],
    }
    caveats = [
        "K-FAC neglects how positions and matrices act together: the curvature is an estimate, good for ranking "
        "directions of one matrix.",
    ]
    positions = next(iter(found.values())).positions
    widest = max(max(matrix.shape) for matrix in matrices)
    if positions < widest:
        caveats.append(
            f"{positions} positions are fewer than the {widest} directions of the widest side: the flat end is empty "
            "for lack of text. Give more."
        )
    if passages and second:
        inputs = {matrix.source: matrix for matrix in matrices}
        labels |= {"input": list(inputs), "band": list(BANDS)}
        quantities |= _loads(specimen, inputs, found, second, passages)
        caveats.append(
            "Passages differ from the text in more than being memorised: any other kind of text may load on flat "
            "directions. Compare with passages of the same kind that the model has not seen."
        )
    elif passages:
        caveats.append("The text is one sequence: none is left to compare the passages with.")
    return Result(quantities, _findings(quantities), caveats, labels)


def halves(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The even and the odd sequences."""
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    passed = 0
    for batch in batches:
        count = len(next(iter(batch.values())))
        for parity in (0, 1):
            rows = slice((parity - passed) % 2, None, 2)
            if len(range(count)[rows]):
                parts[parity].append({name: tensor[rows] for name, tensor in batch.items()})
        passed += count
    return parts


def passage_batches(specimen: Specimen, passages: Sequence[Passage]) -> list[Batch]:
    """The passages with their endings as batches, each of one length; none where there are none."""
    by_length: dict[int, list[Tensor]] = {}
    for passage in passages:
        ids = torch.cat([specimen.encode(passage.prompt), specimen.continuation(passage.prompt, passage.answer)])
        by_length.setdefault(len(ids), []).append(ids)
    return [{"input_ids": part} for rows in by_length.values() for part in torch.stack(rows).split(16)]


def _spectra(matrices: Sequence[Matrix], found: Mapping[str, Curvature]) -> dict[str, Quantity]:
    """Eigenvalues, and how few pairs hold how much of the curvature."""
    masses, kept = [], []
    for matrix in matrices:
        mass = found[matrix.name].products.flatten().sort(descending=True).values.cumsum(0)
        mass /= mass[-1].clone()
        ends = (torch.tensor(_SHARES, dtype=torch.float64) * len(mass)).round().long().clamp_min(1) - 1
        masses.append(mass[ends.to(mass.device)].cpu())
        counts = torch.searchsorted(mass, torch.tensor(_MASSES, dtype=mass.dtype, device=mass.device)) + 1
        kept.append(counts.cpu() / len(mass))
    return {
        "mass": Quantity(torch.stack(masses), ("matrix", "share"), "share", "curvature in that share of the pairs"),
        "pairs": Quantity(torch.stack(kept), ("matrix", "kept"), "share", "pairs that hold that share of curvature"),
        "values_in": Quantity(
            _padded([found[matrix.name].values_in for matrix in matrices]), ("matrix", "number"), "",
            "eigenvalues of E[x xᵀ], falling; NaN beyond the last",
        ),
        "values_out": Quantity(
            _padded([found[matrix.name].values_out for matrix in matrices]), ("matrix", "direction"), "",
            "eigenvalues of E[g gᵀ], falling; NaN beyond the last",
        ),
    }  # fmt: skip


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))


def _loads(
    specimen: Specimen,
    inputs: Mapping[str, Matrix],
    found: Mapping[str, Curvature],
    text: Sequence[Batch],
    passages: Sequence[Batch],
) -> dict[str, Quantity]:
    """How much of the inputs lies in each band, for text and passages, and the ratio of the two (inputs x bands)."""
    bases = {source: found[matrix.name].vectors_in for source, matrix in inputs.items()}
    text_lengths, text_squares = band_loads(specimen, inputs, bases, text)
    lengths, squares = band_loads(specimen, inputs, bases, passages)
    axes = ("input", "band")
    return {
        "load_text": Quantity(text_squares, axes, "share", "the text's inputs: share of the mean square in each band"),
        "load_passages": Quantity(squares, axes, "share", "the same for the passages"),
        "activation_ratio": Quantity(
            lengths / text_lengths, axes, "ratio", "mean length in a band: passages over text"
        ),
    }  # fmt: skip


def band_loads(
    specimen: Specimen, inputs: Mapping[str, Matrix], bases: Mapping[str, Tensor], batches: Sequence[Batch]
) -> tuple[Tensor, Tensor]:
    """Mean length of the inputs in each band, and each band's share of the mean square (inputs x bands), float64.

    inputs: by the name of what they share, a matrix that reads them. bases: their directions V (d x d, in columns),
    sharpest first. One pass without gradients; nothing is kept but the sums.
    """
    lengths = {source: torch.zeros(len(BANDS), dtype=torch.float64) for source in inputs}
    squares = {source: torch.zeros(len(BANDS), dtype=torch.float64) for source in inputs}
    counts = dict.fromkeys(inputs, 0)
    for batch in specimen.shown(batches, "bands"):
        mask = counted_positions(specimen.anatomy, batch)

        def adding(source: str, mask: Tensor | None = mask) -> Callable[[Tensor], None]:
            """What adds the inputs of this batch to the sums of their source."""

            def add(x: Tensor) -> None:
                rows = x.detach().flatten(0, -2)
                rows = rows if mask is None else rows[mask.flatten()]
                parts = (rows.to(bases[source]) @ bases[source]).square().split(_sizes(x.shape[-1]), dim=-1)
                sums = torch.stack([part.sum(-1) for part in parts])  # bands x positions
                lengths[source] += sums.sqrt().sum(1).cpu()
                squares[source] += sums.sum(1).cpu()
                counts[source] += len(rows)

            return add

        with ExitStack() as stack, torch.no_grad():
            for source, matrix in inputs.items():
                stack.callback(Reader(Place(matrix.module, before=True), adding(source)).remove)
            run_body(specimen.model, batch)
    means = torch.stack([lengths[source] / counts[source] for source in inputs])
    total = torch.stack(list(squares.values()))
    return means, total / total.sum(1, keepdim=True)


def _sizes(width: int) -> list[int]:
    """How many of `width` directions each band has."""
    ends = [0, *(round(end * width) for end in BANDS.values())]
    return [end - start for start, end in pairwise(ends)]


def _findings(quantities: Mapping[str, Quantity]) -> list[str]:
    pairs = quantities["pairs"].values
    middle, most = _MASSES.index(0.6), _MASSES.index(0.9)
    found = [
        f"In the median matrix 60 % of the curvature sits in {float(pairs[:, middle].median()):.2%} of the pairs of an "
        f"output and an input direction, and 90 % in {float(pairs[:, most].median()):.2%} (from "
        f"{float(pairs[:, most].min()):.2%} to {float(pairs[:, most].max()):.2%}). On average over the text the loss "
        "hardly notices changes along the other pairs."
    ]
    if "activation_ratio" in quantities:
        ratio = quantities["activation_ratio"].values.mean(0)
        told = ", ".join(f"{float(value):.2f} in the {band}" for band, value in zip(BANDS, ratio, strict=True))
        if float(ratio[-1]) > float(ratio[0]):
            what = "So they lean on the flat directions more than the text does, as the paper found for recited text."
        else:
            what = "So they do not lean on the flat directions, which is what the paper found for recited text."
        found.append(f"Inputs of the passages over those of the text, by band of directions: {told}. {what}")
    return found
