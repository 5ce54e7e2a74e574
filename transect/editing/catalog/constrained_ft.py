"""Fine-tuning of a few down-projections on facts, with every weight kept close to what it was.

The steps are taken here and not by `transect.training`: 25 of them, each followed by a projection into the ball that
the stored, rounded weights must not leave, and ended by the loss of the bare prompts.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch

from ...data import Specimen
from ...parameters import Range, block_numbers
from ..contexts import rows_of
from ..journal import Journal
from ..places import down_of, usual_layer
from ..problems import Problem, requests
from ..registry import editing
from ..scores import measure, probabilities, scores

_STUDIED = 16384  # neurons of GPT-J, for which the bounds below were chosen
_BOUNDS = {  # by problem: for one layer, and for several
    "injection": (1e-4, 5e-5), "reversal": (1e-3, 1e-3), "erasure": (1e-5, 1e-5), "amplification": (5e-5, 1e-5),
    "forcing": (1e-4, 1e-4),
}  # fmt: skip


def bound(problem: Problem, layers: int, neurons: int) -> float:
    """ε: the study's, times 16384 / neurons: an output can then be moved as far as in GPT-J, Σ |k_j| ε (ours)."""
    return _BOUNDS[problem][layers > 1] * _STUDIED / neurons


def chosen(specimen: Specimen, layers: str) -> list[int]:
    return block_numbers(layers or str(usual_layer(specimen)), specimen.anatomy.blocks)


def check(specimen: Specimen, *, problem: Problem, layers: str, noise: float, **others: Any) -> None:
    requests(specimen, problem, noise)
    for layer in chosen(specimen, layers):
        down_of(specimen, layer)


@editing("constrained-ft", paper="arXiv:2012.00363", measure=measure, check=check, of_facts=True)
def constrained_ft(
    specimen: Specimen,
    journal: Journal,
    *,
    problem: Problem = "injection",
    layers: str = "",
    epsilon: Annotated[float, Range(0, 1e9)] = 0.0,
    learning_rate: Annotated[float, Range(0, 1)] = 5e-4,
    steps: Annotated[int, Range(0, 10000)] = 0,
    noise: Annotated[float, Range(0, 100)] = 3.0,
) -> dict[str, Any]:
    """Fine-tune down-projections on all facts together, no entry moving by more than epsilon.

    Adam, and after every step each entry is brought back into [w₀ - ε, w₀ + ε]. It stops once the loss is under 0.01
    after at least 5 steps (but for erasure). The sums are kept in float32; in a coarser model an entry whose rounded
    value would lie outside of the interval stays as it was.

    problem: what is to become of the facts, as in `rome`.
    layers: such as "2" or "1-3", from 0; empty for the one just below a third of the way up.
    epsilon: how far an entry may move; 0 for the study's ε (injection 1e-4 in one layer and 5e-5 in several,
        amplification 5e-5 and 1e-5, erasure 1e-5, forcing 1e-4, reversal 1e-3) times GPT-J's 16384 neurons over the
        model's (ours). A large number is fine-tuning without a bound.
    learning_rate: of Adam.
    steps: at most; 0 for the study's 25 (50 for forcing).
    noise: on the subject, in standard deviations of the embeddings (reversal, forcing).
    """
    span = chosen(specimen, layers)
    matrices = [down_of(specimen, layer) for layer in span]
    wanted = requests(specimen, problem, noise)
    lowers = wanted[0].lowers
    before = probabilities(specimen, wanted)
    rows = rows_of(specimen, wanted, [])
    feed, places = rows.before(specimen, min(span)), rows.answer_places
    epsilon = epsilon or bound(problem, len(span), matrices[0].shape[1])
    for matrix in matrices:
        journal.keep(matrix)
    stored = [matrix.module.weight for matrix in matrices]
    first = [weight.detach().clone() for weight in stored]
    masters = [weight.double() if weight.dtype == torch.float64 else weight.float() for weight in first]
    starts = [master.clone() for master in masters]
    masters = [master.clone().requires_grad_(True) for master in masters]
    optimizer = torch.optim.Adam(masters, lr=learning_rate)
    done = 0
    try:
        for weight in stored:
            weight.requires_grad_(True)
        for step in range(steps or (50 if problem == "forcing" else 25)):
            with torch.enable_grad():
                logits = rows.logits_behind(specimen, feed, min(span), {}, places.flatten())
                total = rows.answer_log_probabilities_at(logits.unflatten(0, places.shape))
                loss = rows.bare(rows.answer_losses(total, lowers)).mean()
                if not lowers and step >= 5 and float(loss.detach()) < 1e-2:
                    break
                gradients = torch.autograd.grad(loss, stored)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient.to(master)
            optimizer.step()
            with torch.no_grad():
                for weight, master, start, was in zip(stored, masters, starts, first, strict=True):
                    master.copy_(master.clamp(start - epsilon, start + epsilon))
                    rounded = master.to(weight)
                    near = (rounded.to(start) - start).abs() <= epsilon * (1 + 1e-6) + 1e-9
                    weight.copy_(torch.where(near, rounded, was))
            done = step + 1
    finally:
        for weight in stored:
            weight.requires_grad_(False)
    told = {"layers": ",".join(map(str, span)), "facts": len(wanted), "epsilon": epsilon, "steps taken": done}
    return {**told, **scores(before, probabilities(specimen, wanted), lowers)}
