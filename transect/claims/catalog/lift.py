"""Claims of LIFT (Liu et al., ICML 2025, arXiv:2506.00772)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ...adaptation import adapter_named
from ...anatomy.storage import is_dense, read_weight
from ...data import Specimen
from ...forward import at_rest, backpropagate, summed_loss
from ...spectra import singular_values
from ..context import Context, Measured
from ..controls import mean_of
from ..registry import NotApplicable, Result, Verdict, claim

DENSITY = 0.05  # of the entries of each matrix
DRAWS = 3  # of the noise
BATCHES = 8  # of calibration data, for the gradients
_NARROWER = 32  # the published filter ranks are about a 32nd of the smaller side
SHARE = 0.5  # the noise's deviation, of each matrix's root mean square
_THEIRS = ("magnitude", "gradient", "random")  # what the paper sets it against; movement is our addition

Positions = list[Tensor]  # flat ones, a tensor a matrix


@claim(
    "lift/perturbation",
    method="lift",
    paper="arXiv:2506.00772",
    statement="Noise on the 5 % of each weight's entries that are largest in its low-rank approximation raises the "
    "loss more than the same noise on as many of the largest entries, of those with the largest gradients, or of "
    "random ones.",
)
def perturbation(context: Context) -> Result:
    """Gaussian noise of half of each matrix's root mean square (in the paper 0.01 for all of Llama-2-7B).

    On all linear layers of the blocks, as they are stored (a fused one is one matrix). Filter rank: a 32nd of the
    smaller side. Gradients: of eight batches of calibration data, at the trained weights. Means over three draws, the
    same for every selection; errors over held-out sequences, in pairs. It holds if all three differences to the
    selections of the paper have the claimed sign. The largest singular value of the noise alone, a mean over the
    matrices of the middle block, shows whether the entries lie together in few rows and columns.
    """
    context.require_language_model()
    specimen = context.fresh()
    paths = dict.fromkeys(matrix.path for matrix in specimen.anatomy.matrices())
    hosts = {path: module for path in paths if is_dense(module := specimen.model.get_submodule(path))}
    if not hosts:
        raise NotApplicable("the model stores none of its matrices as a linear layer")
    chosen = _selections(context, specimen, list(hosts.values()))
    weights = [read_weight(host) for host in hosts.values()]
    sizes = [SHARE * float(weight.square().mean().sqrt()) for weight in weights]
    middle = specimen.anatomy.blocks[len(specimen.anatomy.blocks) // 2]
    watched = [number for number, path in enumerate(hosts) if path in {one.path for one in middle.matrices()}]
    found = {name: _noised(context, specimen, weights, where, sizes) for name, where in chosen.items()}
    rows = []
    for name, measured in found.items():
        difference, error = found["lift"].minus(measured)
        places = chosen[name]
        norms = [_norm(weights[n], places[n], _noise(len(places[n]), sizes[n], n, 0)) for n in watched]
        rows.append({
            "entries": name, "loss": measured.loss, "rise": measured.minus(context.dense)[0],
            "lift minus this": difference, "standard error": error, "norm of the noise": sum(norms) / len(norms),
        })  # fmt: skip
    above = [row["entries"] for row in rows if row["entries"] in _THEIRS and row["lift minus this"] <= 0]
    told = ", ".join(f"{row['entries']} {row['rise']:+.4f}" for row in rows)
    against = f" LIFT's do not raise it more than: {', '.join(above)}." if above else ""
    return Result(
        Verdict.DOES_NOT_HOLD if above else Verdict.HOLDS,
        f"The loss of {context.dense.loss:.4f} rises, by entries with noise: {told}.{against}",
        rows,
    )


def _selections(context: Context, specimen: Specimen, hosts: list[Any]) -> dict[str, Positions]:
    """As many entries of every matrix by each rule."""
    adapter_named("lift")  # the reason, where there is no PEFT for the catalog
    from ...adaptation.catalog.lift.masks import at_random, by_gradient, by_magnitude, by_movement, principal

    rules: dict[str, Positions] = {name: [] for name in ("lift", *_THEIRS, "movement")}
    for host, gradient in zip(hosts, _gradients(context, specimen, hosts), strict=True):
        weight = read_weight(host)
        count, rank = max(1, round(DENSITY * weight.numel())), max(1, min(weight.shape) // _NARROWER)
        rules["lift"].append(principal(weight, count, rank))
        rules["magnitude"].append(by_magnitude(weight, count))
        rules["gradient"].append(by_gradient(gradient, count))
        rules["random"].append(at_random((weight.shape[0], weight.shape[1]), count, specimen.seed))
        rules["movement"].append(by_movement([(weight, gradient)], count))
    return rules


def _gradients(context: Context, specimen: Specimen, hosts: list[Any]) -> Iterator[Tensor]:
    """Of the summed loss on some calibration data, a matrix at a time (d_out x d_in)."""
    specimen.model.requires_grad_(False)
    for host in hosts:
        host.weight.requires_grad_(True)
    with at_rest(specimen.model):
        for batch in list(context.calibration)[:BATCHES]:
            backpropagate(specimen.model, batch, summed_loss)
    for host in hosts:
        gradient, host.weight.grad = host.weight.grad, None
        host.weight.requires_grad_(False)
        yield gradient.T if isinstance(host, Conv1D) else gradient


def _noised(
    context: Context, specimen: Specimen, weights: list[Tensor], where: Positions, sizes: list[float]
) -> Measured:
    """The held-out loss with noise at these positions: the mean over draws."""
    found = []
    for draw in range(DRAWS):
        with _noisy(weights, where, sizes, draw):
            found.append(context.evaluate(specimen.model, 1.0))
    return mean_of(found)


@contextmanager
def _noisy(weights: list[Tensor], where: Positions, sizes: list[float], draw: int) -> Iterator[None]:
    """The weights with noise at some positions; they are as before at the end of the `with`."""
    before = []
    for number, (weight, flat, size) in enumerate(zip(weights, where, sizes, strict=True)):
        place = flat // weight.shape[1], flat % weight.shape[1]
        before.append((place, weight[place]))
        weight[place] += _noise(len(flat), size, number, draw).to(weight)
    try:
        yield
    finally:
        for weight, (place, values) in zip(weights, before, strict=True):
            weight[place] = values


def _noise(count: int, size: float, number: int, draw: int) -> Tensor:
    """Gaussian, by the number of the matrix and the draw: the same for every selection."""
    generator = torch.Generator().manual_seed(1000 * draw + number)
    return size * torch.randn(count, generator=generator)


def _norm(weight: Tensor, where: Tensor, noise: Tensor) -> float:
    """The largest singular value of the noise alone."""
    alone = torch.zeros(weight.numel()).index_put((where.cpu(),), noise)
    return float(singular_values(alone.view(weight.shape))[0])
