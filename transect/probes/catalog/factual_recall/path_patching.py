"""Path patching at the last token: what one head or MLP tells the logits, or other receivers, by a direct path.

Source: the official code of Lv et al., arXiv:2403.19521, after Wang et al., arXiv:2211.00593, appendix B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ....anatomy import Anatomy
from ....data import Specimen
from ....forward import Behind, changed, last_logits, put_out, run_and_keep, watch
from .last_token import States, Task, by_length

Variant = Literal["mean", "example"]
Metric = Literal["difference", "answer"]
Receiver = tuple[str, int, slice]
_TOKENS = 2048  # in one forward pass


def senders_of(states: States, other: Tensor, variant: Variant) -> States:
    """What the senders are to say instead: their outputs on other prompts.

    variant: `mean`, the mean over the prompts, as in the official code of Lv et al.; `example`, what they say on each
    prompt's counterfactual, as in Wang et al. other: numbers of the counterfactuals (N).
    """

    def swapped(point: dict[int, Tensor]) -> dict[int, Tensor]:
        if variant == "mean":
            return {layer: x.mean(0, keepdim=True).expand_as(x) for layer, x in point.items()}
        return {layer: x[other] for layer, x in point.items()}

    return States(heads=swapped(states.heads), mlp=swapped(states.mlp))


@torch.no_grad()
def path_patched(
    specimen: Specimen,
    task: Task,
    states: States,
    new: States,
    metric: Callable[[Tensor, Tensor], Tensor],
    *,
    freeze_mlps: bool = False,
    receivers: Sequence[Receiver] = (),
) -> tuple[Tensor, Tensor]:
    """The metric after patching each sender: heads (L x most heads x N) and MLPs (L x N), float64, NaN where none is.

    The last token of the original prompts is run with every head's output as it was, and that of the sender from `new`.
    Earlier tokens do not see it. MLPs answer to the change on the way unless they are frozen too.

    states: of the original prompts. metric: from logits (B x V) and the prompts' numbers (B) to one number each.
    receivers: points whose values then go, alone, into a run of the original prompts, as (point, layer, which of its
    entries). Default: the stream before the final norm, which gives the logits of the first run.
    """
    anatomy, layers = specimen.anatomy, specimen.layers
    sizes = {layer: x.shape[1] // anatomy.head_size for layer, x in states.heads.items()}
    heads = torch.full((layers, max(sizes.values(), default=0), len(task.prompts)), torch.nan, dtype=torch.float64)
    mlps = torch.full((layers, len(task.prompts)), torch.nan, dtype=torch.float64)
    for numbers in by_length(task.prompts):
        whole = _Whole(anatomy, torch.stack([task.prompts[number] for number in numbers]))
        count = max(1, _TOKENS // whole.tokens)  # senders at a time
        for layer in range(layers):
            senders: list[int | None] = [*range(sizes.get(layer, 0)), *([None] if layer in states.mlp else [])]
            for start in range(0, len(senders), count):
                some = senders[start : start + count]
                values = _values(states, new, numbers, layer, some, anatomy.head_size, freeze_mlps)
                logits = _received(whole, layer, len(some), values, receivers)
                found = metric(logits, torch.tensor(numbers).repeat(len(some))).view(len(some), -1)
                for sender, row in zip(some, found, strict=True):
                    (mlps[layer] if sender is None else heads[layer, sender])[numbers] = row
    return heads, mlps


def _values(
    states: States, new: States, numbers: list[int], layer: int, senders: list[int | None], size: int, freeze_mlps: bool
) -> dict[tuple[str, int], Any]:
    """Changes that freeze the last token's heads (and MLPs) for each sender and prompt, but for the sender."""
    count = len(numbers)
    changes: dict[tuple[str, int], Any] = {}
    for point, present, others in (("heads", states.heads, new.heads), ("mlp", states.mlp, new.mlp)):
        for number, kept in present.items():
            which = torch.zeros(len(senders), 1, kept.shape[1], dtype=torch.bool)  # entries of the sender
            if number == layer:
                for row, sender in enumerate(senders):
                    if sender is None and point == "mlp":
                        which[row] = True
                    elif sender is not None and point == "heads":
                        which[row, :, sender * size : (sender + 1) * size] = True
            value = torch.where(which, others[number][numbers], kept[numbers]).flatten(0, 1)
            if point == "heads" or freeze_mlps:
                changes[point, number] = at_the_end(value)
            elif which.any():
                changes[point, number] = at_the_end(value, which.expand(-1, count, -1).flatten(0, 1))
    return changes


class _Whole:
    """One pass over the original prompts (n x T), and runs of copies of them that differ at the last token alone."""

    def __init__(self, anatomy: Anatomy, ids: Tensor) -> None:
        self.anatomy, self.ids = anatomy, ids.to(anatomy.model.device)
        with watch(anatomy, ["residual"]) as seen:
            cache = run_and_keep(anatomy.model, {"input_ids": self.ids})
        self.behind = Behind(anatomy, self.ids, ids.shape[1] - 1, cache, seen.residual)
        self.streams = {layer: x[:, self.behind.start :] for layer, x in seen.residual.items()}

    @property
    def tokens(self) -> int:
        """How many are run for one copy."""
        return self.streams[0].shape[0] * self.streams[0].shape[1]

    def logits(self, first: int, copies: int) -> Tensor:
        """Of the last token (B x V), from the first block on that differs."""
        hidden = self.streams[first].repeat(copies, 1, 1)
        for layer in range(first, len(self.anatomy.block_list)):
            hidden = self.behind.run(layer, hidden)
        with put_out(self.anatomy, hidden[:, -1:]):
            return last_logits(self.anatomy.model, self.ids[:, -1:].repeat(copies, 1))[:, 0]


def _received(
    whole: _Whole, first: int, copies: int, changes: Mapping[tuple[str, int], Any], receivers: Sequence[Receiver]
) -> Tensor:
    """Logits of the last token (B x V) once the receivers have got what the changes send them.

    first: the layer of the senders, of which there are so many copies.
    """
    anatomy = whole.anatomy
    points: Any = list(dict.fromkeys(point for point, _, _ in receivers))
    at = dict.fromkeys((point, layer) for point, layer, _ in receivers)
    layers = sorted({layer for _, layer in at})
    with changed(anatomy, changes), watch(anatomy, points, layers) as seen:
        logits = whole.logits(min([first, *layers]), copies)
    if receivers:
        passed: dict[tuple[str, int], Any] = {}
        for point, layer in at:
            value = getattr(seen, point)[layer][:, -1]
            which = torch.zeros_like(value, dtype=torch.bool)
            for name, number, entries in receivers:
                if (name, number) == (point, layer):
                    which[:, entries] = True
            passed[point, layer] = at_the_end(value, which)
        with changed(anatomy, passed):
            logits = whole.logits(layers[0], copies)
    return logits.double().cpu()


def at_the_end(value: Tensor, which: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A change that sets the last tokens' activations to `value` (B x d, or B x P x d for the last P tokens).

    which: the entries to set (as `value`); default: all.
    """
    tokens = value[:, None] if value.dim() == 2 else value
    mask = None if which is None else (which[:, None] if which.dim() == 2 else which)

    def replace(x: Tensor) -> Tensor:
        count = tokens.shape[1]
        new = tokens.to(x)
        if mask is not None:
            new = torch.where(mask.to(x.device), new, x[:, -count:])
        return torch.cat([x[:, :-count], new], 1)

    return replace


def answer_metric(task: Task, metric: Metric) -> Callable[[Tensor, Tensor], Tensor]:
    """From logits (B x V) and the prompts' numbers (B): the answer's logit, or that less the counterfactual's.

    A logit alone has no zero of its own; the difference has.
    """

    def measured(logits: Tensor, numbers: Tensor) -> Tensor:
        answer = logits.gather(1, task.answers[numbers, None])[:, 0]
        if metric == "answer":
            return answer
        return answer - logits.gather(1, task.answers[task.other[numbers], None])[:, 0]

    return measured


def percent(patched: Tensor, original: Tensor) -> Tensor:
    """100 (patched - original) / |original|, of means over the prompts (the last axis)."""
    return 100 * (patched.mean(-1) - original.mean()) / original.mean().abs()
