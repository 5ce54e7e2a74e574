"""What it costs to leave void layers out, and what they do (Shemiranifar 2025, arXiv:2505.14467); see `voids`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from ....data import Specimen
from ....forward import Lens, changed
from ...places import wide
from .phases import Texts, differences, frequency, parts_of
from .voids import Skipping, Spread, activity, last_active, norms_of

READINGS = ("plain", "exit", "skip")
CONTROLS = ("length", "random", "cosine")


@dataclass(frozen=True)
class Sweep:
    """One column (last axis) for each alpha.

    profiles: share of active tokens (phases x L x alphas), and share, its mean over layers. difference: as in PAIRS.
    loss: as in READINGS, in nats. executed: share of layers that skip mode does not pass by. agreement: share of
    generated tokens that exit and skip mode predict, too.
    """

    profiles: Tensor
    share: Tensor
    difference: Tensor
    loss: Tensor
    executed: Tensor
    agreement: Tensor


def sweep(
    specimen: Specimen,
    lens: Lens,
    texts: Texts,
    alphas: Sequence[float],
    spread: Spread,
    generator: torch.Generator,
) -> Sweep:
    """Measure every alpha."""
    found = [_at(specimen, lens, texts, alpha, spread, generator) for alpha in alphas]
    return Sweep(*(torch.stack(column, -1) for column in zip(*found, strict=True)))


@torch.no_grad()
def _at(
    specimen: Specimen, lens: Lens, texts: Texts, alpha: float, spread: Spread, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """A column of the sweep."""
    ids, start = texts.ids, texts.start
    active, written = activity(norms_of(texts.states), alpha, spread), activity(texts.norms, alpha, spread)
    parts = parts_of(texts, written, active)
    frequencies = torch.stack([frequency(on, counts) for on, counts in parts])
    difference = differences(frequencies, parts, generator)
    exit_loss = next_token_loss(lens(last_active(texts.states, active)), ids)
    exits = lens(last_active(texts.written_states, written))[:, start:]
    skipping = Skipping(specimen.layers, alpha, spread)
    skip_loss, executed = skipped_loss(specimen, ids, skipping)
    with changed(specimen.anatomy, skipping.changes):
        both = torch.cat([texts.prompts, texts.written], 1)
        skips = specimen.model(input_ids=both, use_cache=False).logits[:, start:]
    best = lens(texts.written_states[specimen.layers])[:, start:].argmax(-1)
    agreement = [(found.argmax(-1) == best)[texts.counted].float().mean().cpu() for found in (exits, skips)]
    losses = torch.tensor([next_token_loss(texts.logits, ids), exit_loss, skip_loss])
    return frequencies, frequencies.mean(1), difference, losses, torch.tensor(executed), torch.stack(agreement)


def movement(states: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Change of length, length of the change, over the length before; cosine of before and after (each L x B x T)."""
    step, turn, cosine = [], [], []
    for layer in range(len(states) - 1):
        before, after = wide(states[layer]), wide(states[layer + 1])
        size = before.norm(dim=-1).clamp_min(1e-6)
        step.append((after.norm(dim=-1) - before.norm(dim=-1)) / size)
        turn.append((after - before).norm(dim=-1) / size)
        cosine.append(cosine_similarity(before, after, dim=-1))
    return torch.stack(step), torch.stack(turn), torch.stack(cosine)


def void_turn(turn: Tensor, active: Tensor) -> Tensor:
    """Mean length of the change where the layer is void, without the first token (L); NaN where it never is."""
    void = ~active[..., 1:]
    return (turn[..., 1:] * void).sum((1, 2)) / void.sum((1, 2))


@torch.no_grad()
def skipped_loss(specimen: Specimen, ids: Tensor, skipping: Skipping) -> tuple[float, float]:
    """Next-token loss in skip mode, and the share of layers that are not passed by, without the first token."""
    with changed(specimen.anatomy, skipping.changes):
        logits = specimen.model(input_ids=ids, use_cache=False).logits
    return next_token_loss(logits, ids), float(torch.stack(skipping.active)[..., 1:].float().mean())


def controls(specimen: Specimen, ids: Tensor, active: Tensor, cosine: Tensor, generator: torch.Generator) -> Tensor:
    """Losses with as many layers of each token passed by, as in CONTROLS. active, cosine: L x P x T."""
    chance = torch.rand(active.shape, generator=generator).to(ids.device)
    chance[0] = -1  # the first layer last of all: a model without it fails, and would decide the comparison alone
    choices = [active] + [as_many(active, score) for score in (chance, cosine)]
    return torch.tensor([skipped_loss(specimen, ids, Skipping(specimen.layers, fixed=one))[0] for one in choices])


def as_many(active: Tensor, score: Tensor) -> Tensor:
    """Activity (L x ...) with as many void layers for each token as `active` has: those with the largest scores."""
    rank = score.argsort(0, descending=True).argsort(0)
    return rank >= (~active).sum(0)


def next_token_loss(logits: Tensor, ids: Tensor) -> float:
    """Mean over all predictions, in nats."""
    return float(cross_entropy(wide(logits[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
