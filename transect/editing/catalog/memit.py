"""MEMIT: many facts at once, spread over the down-projections of several layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from ...anatomy import Block
from ...data import Specimen
from ...forward.lens import norm_gain
from ...parameters import Range, block_numbers
from ..closed_form import refuse_short_text, ridge, second_moments
from ..contexts import LONG, prefixes_of, rows_of
from ..journal import Journal
from ..places import down_of, usual_layer
from ..problems import Problem, Request, requests
from ..registry import editing
from ..scores import measure, probabilities, scores
from ..values import Search, values

LENGTHS = (LONG,)  # of contexts: one type, as in the released code


def chosen(specimen: Specimen, layers: str) -> list[int]:
    """The layers, by default up to five that end one above ROME's."""
    if layers:
        return block_numbers(layers, specimen.anatomy.blocks)
    last = min(usual_layer(specimen) + 1, specimen.layers - 1)
    return list(range(max(0, last - 4), last + 1))


def check(specimen: Specimen, *, problem: Problem, layers: str, noise: float, **others: Any) -> None:
    requests(specimen, problem, noise)
    specimen.require_contributions()
    for layer in chosen(specimen, layers):
        refuse_short_text(specimen, down_of(specimen, layer))


@editing("memit", paper="arXiv:2210.07229", measure=measure, check=check, of_facts=True)
def memit(
    specimen: Specimen,
    journal: Journal,
    *,
    problem: Problem = "injection",
    layers: str = "",
    weight: Annotated[float, Range(1e-9, 1e9)] = 0.5,
    contexts: Annotated[int, Range(0, 200)] = 5,
    steps: Annotated[int, Range(1, 1000)] = 40,
    learning_rate: Annotated[float, Range(1e-6, 10)] = 0.1,
    drift: Annotated[float, Range(0, 100)] = 0.0625,
    decay: Annotated[float, Range(0, 100)] = 0.5,
    longest: Annotated[float, Range(0.01, 100)] = 1.25,
    noise: Annotated[float, Range(0, 100)] = 3.0,
) -> dict[str, Any]:
    """Rewrite all facts together, by a ridge regression in each of several layers' down-projections.

    For every fact a state z of the residual stream behind the last of the layers is searched, at the subject's last
    token, at which the model gives the wanted answer in all contexts alike. Then, layer by layer, with K the keys
    (d_ff x N) of the model as edited so far, and R the part of z - h that falls to this layer, 1 / (layers left):
    W becomes W + R Kᵀ (λ C + K Kᵀ)⁻¹. A key is half that of the prompt alone and half the mean over the other contexts.
    C = E[k kᵀ] is that of the model before, over the specimen's text.

    Where the contexts come from is as in `rome` (ours), and so is what stands for them with noise on the subject. Where
    a norm stands between the down-projection and the stream (Gemma 2, OLMo 2), R is divided by what the norm multiplies
    by, as it stands (ours): a norm fixes the length of what a layer adds, so R is then reached in direction rather than
    in size.

    problem: what is to become of the facts, as in `rome`.
    layers: such as "1-3", from 0; empty for up to five that end a third of the way up (ours): about where MEMIT has
        its five (13-17 of GPT-2 XL's 48) and six (3-8 of GPT-J's 28).
    weight: λ, how much inputs on the text count against the facts, in units of the number of neurons (ours, and so is
        the default): MEMIT's 15000 for GPT-J is 0.9 of its 16384, and its 20000 for GPT-2 XL is 3.1 of its 6400.
    contexts: texts of ten tokens that are put before the prompt, beside the prompt alone; MEMIT's five.
    steps: of Adam in search of z (ours; MEMIT takes 20 for GPT-2 XL and 25 for GPT-J).
    learning_rate: of Adam, in root mean squares of h's entries (ours). The papers take steps of 0.5 without a unit,
        which in a small model leads at once to the longest change that is allowed.
    drift: weight of KL(edited || original) of what the model says after the subject alone; MEMIT's.
    decay: weight of the length of z - h over the square of h's; MEMIT's.
    longest: how long z - h may be, in lengths of h (ours; MEMIT takes 0.75).
    noise: on the subject, in standard deviations of the embeddings (reversal, forcing); three, as in ROME's tracing.
    """
    span = chosen(specimen, layers)
    matrices = [down_of(specimen, layer) for layer in span]
    wanted = requests(specimen, problem, noise)
    search = Search(steps, learning_rate, drift, decay, longest, problem == "erasure")
    prefixes = prefixes_of(specimen, contexts, LENGTHS)
    moments = second_moments(specimen, matrices)
    before = probabilities(specimen, wanted)
    share = spread(specimen, journal, wanted, span, moments, prefixes, search, weight)
    told = {"layers": ",".join(map(str, span)), "facts": len(wanted), "share of the wanted change": round(share, 4)}
    return {**told, **scores(before, probabilities(specimen, wanted), search.lowers)}


def spread(
    specimen: Specimen, journal: Journal, wanted: Sequence[Request], span: Sequence[int], moments: Sequence[Tensor],
    prefixes: Sequence[str], search: Search, weight: float,
) -> float:  # fmt: skip
    """Write all requests into several layers; returns the share of the wanted change of the states that was reached.

    moments: C of each layer's down-projection. prefixes: contexts.
    """
    rows = rows_of(specimen, wanted, prefixes, essence=search.drift > 0)
    behind = span[-1] + 1
    change, start = values(specimen, rows, "residual", behind, search)
    goal = start + change
    for left, layer, moment in zip(range(len(span), 0, -1), span, moments, strict=True):
        matrix = down_of(specimen, layer)
        keys, state, output = rows.at_edit(specimen, [("neurons", layer), ("residual", behind), ("down", layer)])
        missing = (goal - rows.bare(state)) / left
        asked = missing / gain(specimen.anatomy.blocks[layer], rows.bare(output))
        journal.add(matrix, *ridge(asked.T, rows.by_kind(keys).T, moment, weight * matrix.shape[1]))
    (state,) = rows.at_edit(specimen, [("residual", behind)])
    return float(1 - (goal - rows.bare(state)).norm() / change.norm().clamp_min(1e-30))


def gain(block: Block, output: Tensor) -> Tensor:
    """What a small change of down's output (N x d) is multiplied by before it enters the stream."""
    norm: Any = block.norms.get("mlp_output")
    if norm is None:
        return torch.full_like(output, block.residual_multiplier)
    scale = output.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    factor = block.residual_multiplier * norm_gain(norm).double() / scale
    return torch.where(
        factor.abs() > 1e-6, factor, torch.inf
    )  # a coordinate that the norm switches off cannot be moved
