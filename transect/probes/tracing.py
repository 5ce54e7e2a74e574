"""Causal tracing: which single activations bring a fact back after noise on its subject has destroyed it.

Source: Meng et al., arXiv:2202.05262, section 2, with the settings of Hase et al., arXiv:2301.04213.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..data import Fact, Specimen
from ..errors import BadData, NotApplicable
from ..forward import (
    Behind,
    Point,
    Seen,
    changed,
    put_out,
    recitations,
    run_and_keep,
    watch,
)  # fmt: skip

Kind = Literal["mlp", "attention", "block"]
_TOKENS = 2048  # in one forward pass
_ROWS = 64  # whose logits stand at once


class Trace(NamedTuple):
    """What restoring each site does to the probability of a fact's answer.

    effects: T x L, float64: mean over the noise of p(restored) - p(corrupted), by token of the prompt and layer.
    clean, corrupted: probability of the answer without noise, and its mean with noise. subject: (first, last + 1).
    """

    effects: Tensor
    clean: float
    corrupted: float
    subject: tuple[int, int]

    @property
    def fractions(self) -> Tensor:
        """Share of what the noise destroyed that each site restores (T x L): max(0, effect / |p_corrupted - p_clean|).

        Zero where the noise changes nothing.
        """
        lost = abs(self.corrupted - self.clean)
        return (self.effects / lost).clamp_min(0) if lost > 0 else torch.zeros_like(self.effects)

    @property
    def by_layer(self) -> Tensor:
        """The largest fraction over the tokens from the subject's first on (L): how Hase et al. score a layer."""
        return self.fractions[self.subject[0] :].amax(0)


def trace(
    specimen: Specimen,
    fact: Fact,
    *,
    kind: Kind = "mlp",
    window: int = 1,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    scale: float | None = None,
) -> Trace:
    """Trace one fact: restore each token's activations in a window of layers around each layer.

    kind: what is restored: the outputs of MLPs, of attention, or of whole blocks. window: how many layers at once, see
    `window_of`. noise: its standard deviation, in standard deviations of the embeddings. samples: draws of the
    noise; every site sees the same ones. scale: what `embedding_deviation` gave, if it was asked before.
    Raises BadData where the subject cannot be found among the prompt's tokens.
    """
    deviation = embedding_deviation(specimen) if scale is None else scale
    runs = Runs(specimen, fact, kind, noise * deviation, samples, seed)
    first, length, layers = runs.subject[0], runs.prompt, specimen.layers
    # before the subject, a causal model computes the same with and without the noise: restoring does nothing there
    traced = length - first
    restore = torch.zeros(1 + traced * layers, length, layers, dtype=torch.bool)
    for layer in range(layers):
        span = window_of(layer, window, layers)
        for token in range(first, length):
            restore[1 + (token - first) * layers + layer, token, span.start : span.stop] = True
    mean = runs.probabilities(restore).mean(1)
    effects = torch.zeros(length, layers, dtype=torch.float64)
    effects[first:] = (mean[1:] - mean[0]).view(traced, layers)
    return Trace(effects, runs.clean, float(mean[0]), runs.subject)


def window_of(layer: int, window: int, layers: int) -> range:
    """The layers restored together around one, cut off at both ends: l - floor(w/2) to l + ceil(w/2) - 1."""
    return range(max(0, layer - window // 2), min(layers, layer + (window + 1) // 2))


class Runs:
    """The clean run of one fact, and corrupted runs in which some activations are the clean ones again.

    noise: standard deviation of what is added to each entry of the subject's embeddings. prompt: number of tokens T of
    the prompt. subject: (first, last + 1) of its tokens. clean: probability of the answer, the product over its tokens.
    corrupted: what enters each block in the noisy runs, and last what leaves the last (samples x tokens x d). A run
    differs from those only behind the first block and the first token at which something is restored, and only that
    is computed.
    """

    def __init__(self, specimen: Specimen, fact: Fact, kind: Kind, noise: float, samples: int, seed: int) -> None:
        specimen.require_causal()
        prompt, answer = specimen.encode(fact.text), specimen.continuation(fact.text, fact.answer)
        self.specimen, self.kind = specimen, kind
        self.subject, self.prompt = subject_span(specimen, fact), len(prompt)
        self.ids = torch.cat([prompt, answer]).to(specimen.model.device)
        self.noise = subject_noise(specimen, fact, noise, samples, seed).to(specimen.model.device)
        self.point: Point = "residual" if kind == "block" else kind
        self.after = 1 if kind == "block" else 0  # what block l puts out is what enters l + 1
        self._behind: dict[int, Behind] = {}
        clean, _ = self._seen({})
        self.clean = float(self._answer(clean.residual[specimen.layers]))
        activations: dict[int, Tensor] = getattr(clean, self.point)
        self.activations = {layer - self.after: tensor for layer, tensor in activations.items() if layer >= self.after}
        noisy, self._cache = self._seen({("residual", 0): corrupting(self.noise, self.subject)}, samples)
        self.corrupted = [noisy.residual[layer] for layer in range(specimen.layers + 1)]

    @torch.no_grad()
    def probabilities(self, restore: Tensor) -> Tensor:
        """Probability of the answer in n corrupted runs under each draw of the noise (n x samples), float64.

        restore: n x T x L, True where a token's activation of a layer is set to its value in the clean run.
        """
        layers, draws = restore.any(1), len(self.noise)
        token = _first(restore.any(2), self.prompt - 1)
        block = _first(layers, self.specimen.layers)
        out = torch.empty(len(restore), draws, dtype=torch.float64)
        for start in token.unique().tolist():
            behind = self._behind_token(start)
            runs = (token == start).nonzero()[:, 0]
            runs = runs[block[runs].argsort(stable=True)]
            for some in runs.split(max(1, _TOKENS // (draws * (len(self.ids) - 1 - behind.start)))):
                hidden = self._restored(behind, block[some].tolist(), restore[some])
                out[some] = self._answer(hidden).view(len(some), draws).cpu()
        return out

    @torch.no_grad()
    def _seen(self, changes: dict[tuple[str, int], Any], rows: int = 1) -> tuple[Seen, Any]:
        """One pass of the whole body, copies of the fact in a batch, and the cache that it leaves."""
        anatomy = self.specimen.anatomy
        with changed(anatomy, changes), watch(anatomy, ["residual", self.point]) as seen:
            cache = run_and_keep(self.specimen.model, self._batch(rows))
        return seen, cache

    def _restored(self, behind: Behind, blocks: list[int], restore: Tensor) -> Tensor:
        """What the last block leaves (n samples x tokens x d) in noisy runs, every draw in turn.

        blocks: where each run begins to differ, in ascending order: it joins the batch there. restore: n x T x L.
        """
        layers, draws = self.specimen.layers, len(self.noise)
        where = restore[:, behind.start :].repeat_interleave(draws, 0).to(self.ids.device)
        changes = {
            (self.point, layer + self.after): _restoring(where[..., layer], clean[:, behind.start :])
            for layer, clean in self.activations.items()
            if where[..., layer].any()
        }
        last = changes.pop(("residual", layers), None)  # the blocks alone run, no norm behind them
        hidden = self.corrupted[0][:0, behind.start :]
        with changed(self.specimen.anatomy, changes):
            for layer in range(blocks[0], layers + 1):
                joining = self.corrupted[layer][:, behind.start :].repeat(blocks.count(layer), 1, 1)
                hidden = torch.cat([hidden, joining])
                if layer < layers:
                    hidden = behind.run(layer, hidden)
        return hidden if last is None else last(hidden)

    @torch.no_grad()
    def _behind_token(self, start: int) -> Behind:
        """The blocks on the tokens from `start` on, as they are in the noisy runs."""
        if start not in self._behind:
            ids, noisy = self._batch(len(self.noise))["input_ids"], dict(enumerate(self.corrupted))
            self._behind[start] = Behind(self.specimen.anatomy, ids, start, self._cache, noisy)
        return self._behind[start]

    def _batch(self, rows: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[:-1].expand(rows, -1)}

    @torch.no_grad()
    def _answer(self, hidden: Tensor) -> Tensor:
        """Probability of the answer (B), its tokens given one after the other. hidden: what the last block leaves."""
        return torch.cat([self._answer_of(rows) for rows in hidden.split(_ROWS)])

    def _answer_of(self, hidden: Tensor) -> Tensor:
        answer = self.ids[self.prompt :]
        batch = {"input_ids": self.ids[self.prompt - 1 : -1].expand(len(hidden), -1)}
        with put_out(self.specimen.anatomy, hidden[:, -len(answer) :]):
            logits = self.specimen.model(**batch, use_cache=False).logits
        chosen = answer.expand(len(hidden), -1)[..., None]
        return logits.double().log_softmax(-1).gather(-1, chosen)[..., 0].sum(1).exp()


def _first(marked: Tensor, none: int) -> Tensor:
    """Where in each row (n x places) the first mark is; `none` in a row without."""
    return torch.where(marked.any(1), marked.int().argmax(1), none)


def corrupting(noise: Tensor, subject: tuple[int, int]) -> Any:
    """A change of ("residual", 0) that adds noise (B or 1 x subject tokens x d) to the subject's embeddings.

    For whole sequences: with a key/value cache, only to the first pass, which holds the subject.
    """
    first, last = subject

    def corrupt(x: Tensor) -> Tensor:
        if x.shape[1] < last:
            return x
        return torch.cat([x[:, :first], x[:, first:last] + noise.to(x), x[:, last:]], 1)

    return corrupt


def _restoring(where: Tensor, clean: Tensor) -> Any:
    """A change that sets tokens (B x T, True) to their clean activations (1 x at least T x d), of the first rows."""

    def restore(x: Tensor) -> Tensor:
        more = x.shape[1] - where.shape[1]  # the answer's tokens stay as they are
        mask = torch.nn.functional.pad(where[: len(x)], (0, more))
        return torch.where(mask[..., None], clean, x)

    return restore


def subject_noise(specimen: Specimen, fact: Fact, deviation: float, samples: int, seed: int) -> Tensor:
    """Draws of the noise on a subject's embeddings (samples x its tokens x d), float32, the same for the same seed."""
    first, last = subject_span(specimen, fact)
    generator = torch.Generator().manual_seed(seed)
    width = specimen.anatomy.config_value("hidden")
    return deviation * torch.randn(samples, last - first, width, generator=generator)


def subject_span(specimen: Specimen, fact: Fact) -> tuple[int, int]:
    """Which tokens of the prompt hold the subject, as (first, last + 1).

    Raises BadData where they cannot be found, or do not spell the subject.
    """
    if not fact.subject.strip():
        raise BadData(f"the subject of {fact.prompt!r} is empty")
    start = fact.prompt.index("{}")
    span = specimen.span_of(fact.text, start, start + len(fact.subject))
    spelled = specimen.decode(specimen.encode(fact.text)[span[0] : span[1]])
    if _letters(fact.subject) not in _letters(spelled):
        raise BadData(
            f"the subject {fact.subject!r} is not found in the prompt {fact.text!r} after tokenization: the tokens at "
            f"its place spell {spelled!r}"
        )
    return span


def _letters(text: str) -> str:
    return "".join(text.casefold().split())


@torch.no_grad()
def embedding_deviation(specimen: Specimen) -> float:
    """Standard deviation of the entries of the token embeddings, as the first block reads them.

    That of the table, times what the model multiplies embeddings by (Gemma: the square root of the width). The factor
    is measured on a few tokens, at one position, so that embeddings of positions do not count.
    """
    table: Any = specimen.anatomy.embedding.weight
    total, squares = (torch.zeros((), dtype=torch.float64, device=table.device) for _ in range(2))
    for rows in table.split(4096):
        total += rows.double().sum()
        squares += rows.double().square().sum()
    deviation = (squares / table.numel() - (total / table.numel()).square()).sqrt()
    tokens = torch.linspace(0, len(table) - 1, min(64, len(table)), device=table.device).long()
    with watch(specimen.anatomy, ["residual"], [0]) as seen:
        specimen.model(input_ids=tokens[:, None], use_cache=False)
    stored, read = (x - x.mean(0) for x in (table[tokens].double(), seen.residual[0][:, 0].double()))
    return float(deviation * read.norm() / stored.norm())


def answered(specimen: Specimen, facts: Iterable[Fact], count: int) -> list[Fact]:
    """The first `count` facts that the model completes correctly, greedily; fewer where there are fewer.

    Raises NotApplicable where there is none.
    """
    facts, kept = list(facts), []
    for start in range(0, len(facts), 64):
        some = facts[start : start + 64]
        pairs = [(specimen.encode(one.text), specimen.continuation(one.text, one.answer)) for one in some]
        said = recitations(specimen.model, pairs)
        kept += [one for one, (_, right), it in zip(some, pairs, said, strict=True) if torch.equal(right, it)]
        if len(kept) >= count:
            break
    if not kept:
        raise NotApplicable(
            f"the model completes none of the {len(facts)} facts correctly, so there is no knowledge to look for"
        )
    return kept[:count]
