"""Questions that need several steps: are their layers deeper? (Csordas et al. 2025, arXiv:2505.13898, depth score.)"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ....data import Specimen
from ....forward import changed, feeds_of, watch
from ....probes.catalog.depth_efficiency.skipping import depth_score, run, skips
from ...context import Context
from ...registry import NotApplicable, Result, Verdict, claim

HOPS, PROMPTS = (1, 2, 3, 4), 32
NAMES = [
    "Anna",
    "Ben",
    "Carl",
    "Dora",
    "Emma",
    "Fred",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Mary",
    "Nick",
    "Olga",
    "Paul",
]


@claim(
    "depth-efficiency/hops",
    method="depth-efficiency",
    paper="arXiv:2505.13898",
    statement="A question that needs more steps is not answered by deeper layers.",
)
def hops(context: Context) -> Result:
    """The depth score of chains of friends, by the number of steps that the question asks for.

    Prompts say who is whose friend, in random order, and then ask for the friend of the friend of ... one of them. The
    depth score of a prompt is the mean layer, weighted by how far skipping it everywhere but at the first token moves
    the probabilities of the answer, which is the last position. It is regressed on the number of steps; the claim
    holds where the slope is not above 0 by two standard errors. The prompts stand for the paper's MQuAKE, and are our
    design. Whether the model answers is shown beside it: where it guesses, the claim says little.
    """
    specimen = context.specimen
    specimen.require_causal()
    if specimen.layers < 4:
        raise NotApplicable(f"a depth needs at least 4 layers, the model has {specimen.layers}")
    generator = random.Random(specimen.seed)
    rows, scores, steps = [], [], []
    for count in HOPS:
        asked = [question(generator, count) for _ in range(PROMPTS)]
        effects, right = answered(specimen, asked)
        found = depth_score(effects)
        found = found[torch.isfinite(found)]
        scores.append(found)
        steps.append(torch.full_like(found, count))
        rows.append({
            "steps": count,
            "depth score": float(found.mean()),
            "standard error": float(found.std() / len(found) ** 0.5),
            "right, of the names in the prompt": right,
        })  # fmt: skip
    slope, error = line(torch.cat(steps), torch.cat(scores))
    told = (
        f"The depth score is {rows[0]['depth score']:.2f} of {specimen.layers - 1} layers for one step and "
        f"{rows[-1]['depth score']:.2f} for {HOPS[-1]}; the slope is {slope:+.3f} layers a step (standard error "
        f"{error:.3f}). The right name comes first of the names in {rows[0]['right, of the names in the prompt']:.0%} "
        f"and {rows[-1]['right, of the names in the prompt']:.0%} of the prompts."
    )
    return Result(Verdict.of(slope <= 2 * error), told, rows)


def question(generator: random.Random, steps: int) -> tuple[str, list[str]]:
    """A prompt and the names in its chain, the right one first."""
    chain = generator.sample(NAMES, HOPS[-1] + 2)
    said = [f"{one}'s friend is {other}." for one, other in pairwise(chain)]
    generator.shuffle(said)
    asked = "The friend of " + "the friend of " * (steps - 1) + f"{chain[0]} is"
    right = chain[steps]
    return " ".join([*said, asked]), [right, *(name for name in chain if name != right)]


@torch.no_grad()
def answered(specimen: Specimen, asked: Sequence[tuple[str, list[str]]]) -> tuple[Tensor, float]:
    """How far skipping each layer moves the last position's probabilities (L x prompts); how often the right name wins.

    Prompts of equal length run together.
    """
    encoded = [specimen.encode(prompt) for prompt, _ in asked]
    effects, right = [], 0
    for length in sorted({len(ids) for ids in encoded}):
        numbers = [number for number, ids in enumerate(encoded) if len(ids) == length]
        ids = torch.stack([encoded[number] for number in numbers]).to(specimen.model.device)
        (feed,) = feeds_of(specimen.anatomy, [{"input_ids": ids}])
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True
        with watch(specimen.anatomy, ["residual"]) as clean:
            logits = run(specimen, feed, 0, feed.hidden, last).logits
        where = torch.ones_like(ids, dtype=torch.bool)
        where[:, 0] = False
        moved = []
        for layer in specimen.shown(range(specimen.layers), "skipped layers"):
            with changed(specimen.anatomy, skips(specimen.anatomy, layer, where, ("attention", "mlp"))):
                now = run(specimen, feed, layer, clean.residual[layer], last).logits
            moved.append((now.softmax(-1) - logits.softmax(-1)).norm(dim=-1).cpu())
        effects.append(torch.stack(moved))
        for number, scores in zip(numbers, logits, strict=True):
            prompt, names = asked[number]
            firsts = [int(specimen.continuation(prompt, name)[0]) for name in names]
            right += int(scores[firsts].argmax()) == 0
    return torch.cat(effects, 1), right / len(asked)


def line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope of the least-squares line, and its standard error."""
    centred = x - x.mean()
    slope = (centred * y).sum() / centred.square().sum()
    rest = y - y.mean() - slope * centred
    return float(slope), float((rest.square().sum() / (len(x) - 2) / centred.square().sum()).sqrt())
