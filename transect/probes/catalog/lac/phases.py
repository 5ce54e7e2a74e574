"""Prompts, what a model writes after them, and what the text says there instead: which layers their tokens use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....data import Specimen
from ....errors import NotApplicable
from ....forward import watch
from ...excerpts import excerpt
from .voids import norms_of

PHASES = ("prompt", "generated", "text")
PAIRS = ("prompt and generated", "prompt and text", "generated and text", "halves of prompts", "halves of generated")
DRAWS = 200

Part = tuple[Tensor, Tensor]  # activity (L x P x n), and which of the tokens count (P x n)


@dataclass(frozen=True)
class Texts:
    """P beginnings of the text, and what the model writes in place of their second part.

    ids: tokens (P x T); the first `start` of each are its prompt. logits: of them. states: of them, by layer.
    written: the model's own tokens (P x T - start). counted: which of these count, likewise. written_states: of prompts
    with the written tokens, in one pass. norms: lengths of these states (L + 1 x P x T), seen one token at a time.
    """

    ids: Tensor
    start: int
    logits: Tensor
    states: dict[int, Tensor]
    written: Tensor
    counted: Tensor
    written_states: dict[int, Tensor]
    norms: Tensor

    @property
    def prompts(self) -> Tensor:
        return self.ids[:, : self.start]


@torch.no_grad()
def read(specimen: Specimen, prompts: int, length: int, generate: int) -> Texts:
    """Run the text and let the model go on after its prompts.

    Raises NotApplicable for fewer than four sequences, or where the model ends every one of them at once.
    """
    ids = excerpt(specimen, prompts, length + generate, 8)
    if len(ids) < 4:
        raise NotApplicable(
            f"it compares halves of the prompts and needs a text of at least 4 sequences, got {len(ids)}"
        )
    new = min(generate, ids.shape[1] // 2)
    start = ids.shape[1] - new
    written, norms, counted = generated(specimen, ids[:, :start], new)
    if not bool(counted.any()):
        raise NotApplicable(
            "the model ends every text of the excerpt at once: there are no generated tokens to look at"
        )
    with watch(specimen.anatomy, ["residual"]) as seen:
        logits = specimen.model(input_ids=ids, use_cache=False).logits
    states = dict(seen.residual)
    with watch(specimen.anatomy, ["residual"]) as seen:
        specimen.model.base_model(input_ids=torch.cat([ids[:, :start], written], 1), use_cache=False)
    return Texts(ids, start, logits, states, written, counted, dict(seen.residual), norms)


@torch.no_grad()
def generated(specimen: Specimen, prompts: Tensor, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy continuation (P x new), lengths of all states (L + 1 x P x T + new), and which new tokens count (P x new).

    One pass over the prompts, then one token a pass through the key/value cache. An end of text, and what follows it,
    does not count.
    """
    tokens, past = prompts, None
    chosen: list[Tensor] = []
    lengths: list[Tensor] = []
    for _ in range(new + 1):
        with watch(specimen.anatomy, ["residual"]) as seen:
            output = specimen.model(input_ids=tokens, past_key_values=past, use_cache=True)
        lengths.append(norms_of(seen.residual))
        tokens, past = output.logits[:, -1:].argmax(-1), output.past_key_values
        chosen.append(tokens)
    written = torch.cat(chosen[:new], 1)
    return written, torch.cat(lengths, 2), ~ended(specimen, written)


def ended(specimen: Specimen, tokens: Tensor) -> Tensor:
    """Where an end of text stands or has gone before (P x N)."""
    config = getattr(specimen.model, "generation_config", None) or specimen.anatomy.config
    ends = config.eos_token_id
    if ends is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    numbers = torch.as_tensor(ends, device=tokens.device).reshape(-1)
    return torch.isin(tokens, numbers).cumsum(1) > 0


def parts_of(texts: Texts, active: Tensor, text: Tensor) -> list[Part]:
    """As in PHASES: prompts without their first token, generated tokens, and the text's own in their place.

    active: activity on prompts with the written tokens, text: on the text (both L x P x T).
    """
    everything, start = torch.ones_like(text[0]), texts.start
    return [
        (active[:, :, 1:start], everything[:, 1:start]), (active[:, :, start:], texts.counted),
        (text[:, :, start:], everything[:, start:]),
    ]  # fmt: skip


def frequency(active: Tensor, counts: Tensor) -> Tensor:
    """Share of the tokens that count for which each layer is active (L)."""
    return (active & counts).sum((1, 2)).cpu() / counts.sum().cpu()


def differences(frequencies: Tensor, parts: list[Part], generator: torch.Generator) -> Tensor:
    """As in PAIRS: mean over layers of |f - g|, of two phases; for halves, what 95 % of random halves stay below."""
    prompt, written, text = frequencies
    found = [(prompt - written).abs().mean(), (prompt - text).abs().mean(), (written - text).abs().mean()]
    found += [halves_difference(*part, generator) for part in parts[:2]]
    return torch.stack(found)


def halves_difference(active: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """95 % quantile, over random halves of the sequences, of the difference of their profiles."""
    sums, sizes = (active & counts).sum(2).float().cpu(), counts.sum(1).float().cpu()  # L x P, P
    prompts = len(sizes)
    order = torch.rand(DRAWS, prompts, generator=generator).argsort(1)
    first = (order < prompts // 2).float()  # DRAWS x P
    f, g = (sums @ half.T / (sizes @ half.T) for half in (first, 1 - first))
    return (f - g).abs().mean(0).nanquantile(0.95)
