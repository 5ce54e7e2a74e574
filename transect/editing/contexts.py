"""The prompts of edits in several contexts, as one batch, and what the model computes at their edit tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data import Fact, Specimen
from ..errors import TransectError
from ..forward import (
    Feed,
    Point,
    agree,
    changed,
    feeds_of,
    first_of,
    logits_at,
    put_out,
    run_and_keep,
    run_blocks,
    stopping_behind,
    watch,
)  # fmt: skip
from ..forward.objective import run_body
from ..probes.tracing import subject_span
from .problems import Request

BARE, PREFIXED, ESSENCE = range(3)
SHORT, LONG = 5, 10  # tokens of a prefix


@dataclass(frozen=True)
class Rows:
    """n prompts, each with its target, of N requests; the subject's last token is the edit token.

    ids: n x T, a prompt and its target but for the last token, from which nothing is read; filled up on the right,
    which no earlier token of a causal model can see. targets: n x longest target, filled up on the right. owner: which
    request (n). edit: position of the edit token (n). last: position of the prompt's last token (n). tokens: number of
    target tokens (n), 0 for a row without one. kind: BARE (the prompt itself), PREFIXED, or ESSENCE (the subject alone)
    (n). noise: n x T x d, added to the embeddings, or None.
    """

    ids: Tensor
    targets: Tensor
    owner: Tensor
    edit: Tensor
    last: Tensor
    tokens: Tensor
    kind: Tensor
    noise: Tensor | None

    @property
    def requests(self) -> int:
        return int(self.owner.max()) + 1

    @property
    def places(self) -> Tensor:
        """Where the edit tokens are (n), in activations laid out as (n T) x d."""
        return torch.arange(len(self.ids), device=self.ids.device) * self.ids.shape[1] + self.edit

    def mean(self, values: Tensor, rows: Tensor) -> Tensor:
        """Mean by request (N x ...) of values by row (n x ...), over the rows that are True."""
        share = torch.zeros(self.requests, len(rows), dtype=values.dtype, device=values.device)
        share[self.owner[rows], rows.nonzero()[:, 0]] = 1
        return (share @ values) / share.sum(1).clamp_min(1).view(-1, *[1] * (values.dim() - 1))

    def of(self, requests: Tensor) -> Rows:
        """The rows of some requests (n of them, in ascending order), which are numbered anew."""
        number = torch.full((self.requests,), -1, device=self.ids.device)
        number[requests] = torch.arange(len(requests), device=self.ids.device)
        chosen = number[self.owner] >= 0
        tokens = self.tokens[chosen]
        return Rows(
            self.ids[chosen], self.targets[chosen, : int(tokens.max())], number[self.owner][chosen], self.edit[chosen],
            self.last[chosen], tokens, self.kind[chosen], None if self.noise is None else self.noise[chosen],
        )  # fmt: skip

    def parts(self, tokens: int) -> Iterator[Rows]:
        """Whole requests, some at a time, at most about `tokens` positions together."""
        step = max(1, tokens // max(1, int(self.owner.bincount().max()) * self.ids.shape[1]))
        for some in torch.arange(self.requests, device=self.ids.device).split(step):
            yield self.of(some)

    def logits(self, specimen: Specimen, changes: Mapping[tuple[str, int], Any] | None = None) -> Tensor:
        """Logits (n x T x V) of the model, with the rows' noise and under other changes."""
        with self._changed(specimen, changes or {}):
            return specimen.model(input_ids=self.ids, use_cache=False).logits

    def _changed(self, specimen: Specimen, changes: Mapping[tuple[str, int], Any]) -> AbstractContextManager[None]:
        whole, noise = dict(changes), self.noise
        if noise is not None:
            whole[("residual", 0)] = lambda x: x + noise.to(x)
        return changed(specimen.anatomy, whole)

    @torch.no_grad()
    def behind(self, specimen: Specimen, layer: int) -> tuple[Rows, Feed]:
        """The rows from their edit tokens on, with their noise in what they read, as they stand before a block.

        A change at the edit token leaves what is in front of it as it is, so that need not run again. Whole rows where
        the model has no cache of keys and values that gives the same.
        """
        anatomy, layers = specimen.anatomy, len(specimen.anatomy.block_list)
        with self._changed(specimen, {}), watch(anatomy, ["residual"], [layer, layers]) as seen:
            cache = run_and_keep(specimen.model, {"input_ids": self.ids})
        ends = self.last + self.tokens.clamp_min(1)
        at = self.edit[:, None] + torch.arange(int((ends - self.edit).max()), device=self.ids.device)
        inside, at = at < ends[:, None], at.clamp_max(self.ids.shape[1] - 1)
        cut = replace(self, ids=self.ids.gather(1, at), edit=0 * self.edit, last=self.last - self.edit, noise=None)
        past = first_of(cache, self.edit, self.ids.shape[1])
        if past is not None:
            front = torch.arange(int(self.edit.max()), device=self.ids.device)
            mask = torch.cat([front >= front.numel() - self.edit[:, None], torch.ones_like(inside)], 1)
            (feed,) = feeds_of(anatomy, [{"input_ids": cut.ids, "attention_mask": mask.long()}], past)
            feed.batch, feed.hidden = {"input_ids": cut.ids}, seen.residual[layer].take_along_dim(at[..., None], 1)
            expected = seen.residual[layers].take_along_dim(at[..., None], 1)[inside]
            found = run_blocks(anatomy, feed, layer, feed.hidden)[inside]
            if agree(found, expected):
                return cut, feed
        return self, self._whole(specimen, seen.residual[layer])

    @torch.no_grad()
    def before(self, specimen: Specimen, layer: int) -> Feed:
        """The whole rows, with their noise, as they stand before a block: what training of that block on starts at."""
        anatomy = specimen.anatomy
        with (
            self._changed(specimen, {}),
            stopping_behind(anatomy, layer),
            watch(anatomy, ["residual"], [layer]) as seen,
        ):
            run_body(specimen.model, {"input_ids": self.ids})
        return self._whole(specimen, seen.residual[layer])

    def _whole(self, specimen: Specimen, hidden: Tensor) -> Feed:
        (feed,) = feeds_of(specimen.anatomy, [{"input_ids": self.ids}])
        feed.hidden = hidden
        return feed

    def logits_behind(
        self, specimen: Specimen, feed: Feed, layer: int, changes: Mapping[tuple[str, int], Any], places: Tensor
    ) -> Tensor:
        """Logits (m x V) at m of the places, under changes in block `layer` or behind it. feed: as it stands `behind`,
        or `before`, that block."""
        where = torch.zeros(self.ids.numel(), dtype=torch.bool, device=self.ids.device)
        where[places] = True
        with changed(specimen.anatomy, changes):
            hidden = run_blocks(specimen.anatomy, feed, layer, feed.hidden)
            with put_out(specimen.anatomy, hidden):
                parts = list(logits_at(specimen.model, feed.batch, where.view_as(self.ids)))
        return torch.cat(parts)[(where.cumsum(0) - 1)[places]]

    def bare(self, values: Tensor) -> Tensor:
        """Mean by request of values by row, over its bare prompts: one, or one a draw of the noise."""
        return self.mean(values, self.kind == BARE)

    def in_context(self, values: Tensor) -> Tensor:
        """Mean by request of values by row, over all its contexts alike."""
        return self.mean(values, self.kind != ESSENCE)

    def by_kind(self, values: Tensor) -> Tensor:
        """The same with the bare prompt weighing as much as all contexts with a prefix together, if there are any."""
        prefixed = self.kind == PREFIXED
        both = torch.zeros(self.requests, dtype=torch.bool, device=values.device)
        both[self.owner[prefixed]] = True
        bare, behind = self.bare(values), self.mean(values, prefixed)
        return torch.where(both.view(-1, *[1] * (values.dim() - 1)), (bare + behind) / 2, bare)

    @property
    def answer_places(self) -> Tensor:
        """Where each row's target is predicted (n x longest target), laid out as `places` are.

        Behind the end of a shorter target the places mean nothing.
        """
        offsets = torch.arange(int(self.tokens.max()), device=self.ids.device)
        rows = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        return rows * self.ids.shape[1] + (self.last[:, None] + offsets).clamp_max(self.ids.shape[1] - 1)

    def answer_losses(self, total: Tensor, lowers: bool) -> Tensor:
        """Negative log-probability a token of each row's target (n), or where it is to fall, the probability itself.

        total: log-probability of each target (n).
        """
        return total.exp() if lowers else -total / self.tokens.clamp_min(1)

    def answer_log_probabilities(self, logits: Tensor) -> Tensor:
        """Log-probability of each row's target (n), 0 where it has none. logits: n x T x V."""
        return self.answer_log_probabilities_at(logits.flatten(0, 1)[self.answer_places])

    def answer_log_probabilities_at(self, logits: Tensor) -> Tensor:
        """The same from the logits at `answer_places` (n x longest target x V)."""
        inside = torch.arange(logits.shape[1], device=self.ids.device) < self.tokens[:, None]
        return (wide(logits).log_softmax(-1).gather(-1, self.targets[..., None])[..., 0] * inside).sum(1)

    @torch.no_grad()
    def at_edit(self, specimen: Specimen, wanted: Sequence[tuple[Point, int]]) -> list[Tensor]:
        """Activations (n x width, float64) at the edit tokens, of each (point, layer). No block behind them runs."""
        anatomy, last = specimen.anatomy, max(layer for _, layer in wanted)
        with ExitStack() as stack:
            stack.enter_context(stopping_behind(anatomy, last))
            stack.enter_context(self._changed(specimen, {}))
            seen = [stack.enter_context(watch(anatomy, [point], [layer])) for point, layer in wanted]
            run_body(specimen.model, {"input_ids": self.ids})
        return [
            self.pick(getattr(one, point)[layer]).double() for one, (point, layer) in zip(seen, wanted, strict=True)
        ]

    def pick(self, activation: Tensor) -> Tensor:
        """The edit tokens' part (n x width) of an activation of the whole batch, whether or not it is n x T x width."""
        return activation.reshape(-1, activation.shape[-1])[self.places]

    def adding(self, values: Tensor) -> Any:
        """A change that adds its request's vector (of N x d) at each row's edit token."""
        places, owner = self.places, self.owner

        def add(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            return flat.index_add(0, places, values[owner].to(x)).view_as(x)

        return add


def rows_of(specimen: Specimen, wanted: Sequence[Request], prefixes: Sequence[str], essence: bool = False) -> Rows:
    """The requests' prompts: bare and behind each prefix; or, where a request has noise, bare under each draw of it.

    prefixes: texts; where prefix, prompt and target are longer than the model's context, that row is left out.
    essence: also a row with the subject alone.
    """
    context = getattr(specimen.anatomy.config, "max_position_embeddings", None)
    made: list[tuple[int, int, Tensor, int, Tensor, Tensor | None]] = []
    nothing = torch.empty(0, dtype=torch.long)
    for number, request in enumerate(wanted):
        fact, target = request.fact, request.target
        span = subject_span(specimen, fact)
        for draw in [None] if request.noise is None else request.noise:
            placed = None if draw is None else torch.nn.functional.pad(draw, (0, 0, span[0], 0))
            made.append((number, BARE, request.prompt, span[1] - 1, target, placed))
        for prefix in prefixes if request.noise is None else ():
            behind = Fact(f"{prefix} {fact.prompt}", fact.subject, fact.answer)
            try:
                prompt = specimen.encode(behind.text)
            except TransectError:
                continue  # longer than the context
            if context is None or len(prompt) + len(target) <= context:
                made.append((number, PREFIXED, prompt, subject_span(specimen, behind)[1] - 1, target, None))
        if essence:
            alone = Fact("{}", fact.subject, fact.answer)
            edit = subject_span(specimen, alone)[1] - 1
            made.append((number, ESSENCE, specimen.encode(alone.text), edit, nothing, None))
    numbers, kinds, prompts, edits, targets, noises = zip(*made, strict=True)
    ids = [torch.cat([prompt, target[:-1]]) for prompt, target in zip(prompts, targets, strict=True)]
    length, device = max(map(len, ids)), specimen.model.device

    def column(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=device)

    noise = None
    if any(one is not None for one in noises):
        width = next(one for one in noises if one is not None).shape[1]
        noise = torch.zeros(len(made), length, width, device=device)
        for row, one in enumerate(noises):
            if one is not None:
                noise[row, : len(one)] = one
    filled, behind = (pad_sequence(list(each), batch_first=True).to(device) for each in (ids, targets))
    lasts, tokens = column([len(prompt) - 1 for prompt in prompts]), column(list(map(len, targets)))
    return Rows(filled, behind, column(numbers), column(edits), lasts, tokens, column(kinds), noise)


def prefixes_of(specimen: Specimen, count: int, lengths: Sequence[int] = (SHORT, LONG)) -> list[str]:
    """Beginnings of the specimen's text, as long as `lengths` say in turn, in tokens, each as a sentence of its own.

    ROME and MEMIT let the model generate them; pieces of real text need no sampling and are as natural (ours).
    """
    if count == 0:
        return []
    special = set(getattr(specimen.tokenizer, "all_special_ids", ()))
    found: list[str] = []
    pool = specimen.sequences(4 * count, max(lengths))
    for ids in pool.tolist():
        length = lengths[len(found) % len(lengths)]
        words = specimen.decode([token for token in ids[:length] if token not in special]).strip()
        text = words if words.endswith((".", "?", "!")) else f"{words}."
        if words and "{" not in text and text not in found:
            found.append(text)
        if len(found) == count:
            break
    return found


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
