"""The curvature of a loss around a model: products of its Hessian with vectors, largest eigenvalue, trace.

The Hessian H (p x p) is that of the mean loss over the given batches, in the p numbers that ask for gradients, and is
never written out. H v comes of two passes back (Pearlmutter 1994, doi:10.1162/neco.1994.6.1.147), a batch at a time: in
memory are one batch's graph and a few vectors of p numbers. The model is in evaluation mode: norms use their
running statistics and nothing is dropped; in training mode the Hessian is another. Attention is computed by the plain
kernel, as the others have no second derivative. Numbers of 16 bits are held as 32 meanwhile on a CPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ....errors import TransectError
from ....forward import at_rest, computing_wide
from .losses import Loss

Product = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Estimate:
    """value: in units of the loss over those of the numbers squared. steps: products with H that it took.

    settled: whether the stop rule ended it, not the limit. error: standard error over probes; NaN where there is none.
    """

    value: float
    steps: int
    settled: bool
    error: float = math.nan


def hessian_vector_product(
    model: Any, loss: Loss, batches: Sequence[Any], vector: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """H v by parameter name. vector: v, a tensor for each parameter that asks for gradients, of its name and shape.

    Raises TransectError where names or shapes are not the parameters', and where no parameter asks for gradients.
    """
    with _multiplying(model, loss, batches) as (product, parameters):
        shapes = [{name: tuple(one.shape) for name, one in each.items()} for each in (vector, parameters)]
        if shapes[0] != shapes[1]:
            wrong = sorted({name for one, other in (shapes, shapes[::-1]) for name, shape in one.items()
                            if other.get(name) != shape})  # fmt: skip
            raise TransectError(
                f"the vector should have a tensor for each trained parameter, of its shape; not so: {', '.join(wrong)}"
            )
        found = product([vector[name].to(one) for name, one in parameters.items()])
        return dict(zip(parameters, found, strict=True))


def top_eigenvalue(
    model: Any,
    loss: Loss,
    batches: Sequence[Any],
    *,
    tolerance: float = 1e-3,
    steps: int = 100,
    seed: int = 0,
) -> Estimate:
    """The eigenvalue of H that is largest in magnitude, with its sign, by power iteration.

    v starts as a random direction; v <- H v / ‖H v‖, and the value is vᵀ H v. It ends when that changes by no more than
    `tolerance` of itself, or after so many steps (1e-3 and 100 as in the model zoo, arXiv:2504.18072). It may be
    negative: away from a minimum the steepest bend can point down. Where two eigenvalues are close the rule ends early,
    and the value is between them. seed: of the direction.
    Raises TransectError where the loss is not finite, or nothing asks for gradients.
    """
    with _multiplying(model, loss, batches) as (product, parameters):
        generator = torch.Generator().manual_seed(seed)
        vector = [torch.randn(one.shape, generator=generator).to(one) for one in parameters.values()]
        vector = _scaled(vector, _dot(vector, vector) ** -0.5)
        value, settled, done = math.nan, False, 0
        while done < steps and not settled:
            image = product(vector)
            before, value = value, _dot(vector, image)
            length, done = _dot(image, image) ** 0.5, done + 1
            settled = length == 0 or abs(value - before) <= tolerance * abs(before)
            vector = image if length == 0 else _scaled(image, 1 / length)
    return Estimate(value, done, settled)


def hessian_trace(
    model: Any,
    loss: Loss,
    batches: Sequence[Any],
    *,
    tolerance: float = 1e-3,
    probes: int = 100,
    seed: int = 0,
) -> Estimate:
    """The trace of H by Hutchinson's estimator: the mean of vᵀ H v over random signs v; exact if H is diagonal.

    It ends when a further probe changes the running mean by no more than `tolerance` of its magnitude, or after so many
    probes (1e-3 and 100 as in the model zoo). The magnitude, since the released code divides by the mean itself: a
    negative one ends there at once. Two probes may agree by chance: look at the standard error, which is NaN for one.
    Raises TransectError as `top_eigenvalue`.
    """
    with _multiplying(model, loss, batches) as (product, parameters):
        generator = torch.Generator().manual_seed(seed)
        values: list[float] = []
        mean, settled = math.nan, False
        while len(values) < probes and not settled:
            signs = [
                (2 * torch.randint(2, one.shape, generator=generator) - 1).to(one) for one in parameters.values()
            ]  # fmt: skip
            values.append(_dot(signs, product(signs)))
            before, mean = mean, statistics.fmean(values)
            settled = abs(mean - before) <= tolerance * abs(before)
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return Estimate(mean, len(values), settled, error)


@contextmanager
def _multiplying(
    model: Any, loss: Loss, batches: Sequence[Any]
) -> Iterator[tuple[Product, dict[str, torch.nn.Parameter]]]:
    """The product with H, of vectors in the order of the parameters, which are given with it by name."""
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if not parameters:
        raise TransectError("no parameter of the model asks for gradients: there is no Hessian; call requires_grad_()")
    if not len(batches):
        raise TransectError("a Hessian needs a batch or more of data, and none came")

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        total, count = [torch.zeros_like(one) for one in parameters.values()], 0.0
        for batch in batches:
            summed, terms = loss(model, batch)
            if not torch.isfinite(summed):
                raise TransectError(f"the loss is {float(summed.detach())}: a Hessian needs a finite one")
            count += terms
            for into, one in zip(total, _of_batch(summed, list(parameters.values()), vector), strict=True):
                into.add_(one)
        return _scaled(total, 1 / count)

    with at_rest(model), computing_wide(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield product, parameters


def _of_batch(summed: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> Sequence[Tensor]:
    """The Hessian of one batch's summed loss, times the vector."""
    gradients = torch.autograd.grad(summed, parameters, create_graph=True, materialize_grads=True)
    slope = torch.stack([(one * other).sum() for one, other in zip(gradients, vector, strict=True)]).sum()
    if not slope.requires_grad:  # a loss that is linear in the numbers
        return [torch.zeros_like(one) for one in parameters]
    return torch.autograd.grad(slope, parameters, materialize_grads=True)


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))


def _scaled(vector: Sequence[Tensor], factor: float) -> list[Tensor]:
    return [factor * one for one in vector]
