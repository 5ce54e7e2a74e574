"""What a model answers: probabilities of given continuations, and greedy ones.

Nothing is padded: prompts of different lengths begin together, and the longer ones are read on, token by token, while
the others are continued.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .head import keeping, last_logits
from .mode import at_rest
from .wide import computing_wide

_APART = 16  # tokens by which prompts that begin together differ at most, each of which is a step of its own


@torch.no_grad()
def answer_log_probabilities(model: Any, pairs: Sequence[tuple[Tensor, Tensor]], batch_size: int = 64) -> Tensor:
    """Log-probability in nats of each answer after its prompt, all of its tokens, teacher-forced (n), float64.

    pairs: token ids (1-D) of the prompt and of the answer, at least one each.
    """
    out = torch.zeros(len(pairs), dtype=torch.float64)
    for numbers in _alike([(len(prompt), len(answer)) for prompt, answer in pairs], batch_size):
        ids = torch.stack([torch.cat(pairs[number]) for number in numbers]).to(model.device)
        length = len(pairs[numbers[0]][1])
        with at_rest(model), computing_wide(model):
            logits = last_logits(model, ids, length + 1)[:, :-1]
        chosen = logits.double().log_softmax(-1).gather(-1, ids[:, -length:, None])[..., 0]
        out[numbers] = chosen.sum(1).cpu()
    return out


@torch.no_grad()
def next_logits(model: Any, prompts: Sequence[Tensor], batch_size: int = 64) -> Tensor:
    """Logits of the token after each prompt (n x V), float32, on the CPU. prompts: token ids (1-D)."""
    out: list[Tensor] = [torch.empty(0)] * len(prompts)
    for numbers in _alike([len(prompt) for prompt in prompts], batch_size):
        ids = torch.stack([prompts[number] for number in numbers]).to(model.device)
        with at_rest(model), computing_wide(model):
            last = last_logits(model, ids)[:, 0]
        for number, logits in zip(numbers, last, strict=True):
            out[number] = logits.float().cpu()
    return torch.stack(out)


@torch.no_grad()
def recitations(model: Any, pairs: Sequence[tuple[Tensor, Tensor]], batch_size: int = 64) -> list[Tensor]:
    """Greedy continuations, each as many tokens as the answer that goes with the prompt, through the model's cache."""
    lengths = [len(answer) for _, answer in pairs]
    prompts = [prompt for prompt, _ in pairs]
    return _continued(model, prompts, lambda number, said: len(said) >= lengths[number], batch_size, None)


@torch.no_grad()
def continuations(
    model: Any, prompts: Sequence[Tensor], enough: Callable[[int, Tensor], bool], batch_size: int = 64
) -> list[Tensor]:
    """Greedy continuations, through the model's cache, each of them until it is enough or the model's context is full.

    prompts: token ids (1-D). enough: asked after every token, with the prompt's number and what was said so far (1-D,
    on the CPU); it has to say yes at some time.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    return _continued(model, prompts, enough, batch_size, context)


def _continued(
    model: Any, prompts: Sequence[Tensor], enough: Callable[[int, Tensor], bool], batch_size: int, context: int | None
) -> list[Tensor]:
    """`continuations` of at most `context` tokens with their prompts; None for no limit."""
    out: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(prompts)
    with at_rest(model), computing_wide(model):
        for numbers in _near([len(prompt) for prompt in prompts], batch_size):
            shortest = len(prompts[numbers[0]])
            room = None if context is None else max(0, context - shortest)
            going = set(range(len(numbers)))
            behind = torch.empty(len(numbers), 0, dtype=torch.long)  # what stands behind the shortest prompt's length
            for tokens in islice(_greedy(model, [prompts[number] for number in numbers]), room):
                behind = torch.cat([behind, tokens.cpu()], 1)
                for row in list(going):
                    said = behind[row, len(prompts[numbers[row]]) - shortest :]
                    if not len(said):
                        continue
                    out[numbers[row]] = said
                    if enough(numbers[row], said):
                        going.remove(row)
                if not going:
                    break
    return out


def _greedy(model: Any, prompts: Sequence[Tensor]) -> Iterator[Tensor]:
    """The tokens (B x 1) behind the first prompt's length, which is the shortest: those of the longer prompts, then the
    most likely ones, one step after another without an end."""
    options = keeping(model, 1)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)[:, None]
    given = pad_sequence(list(prompts), batch_first=True).to(model.device)  # what fills it up is never read
    place, past = len(prompts[0]), None
    tokens = given[:, :place]
    while True:
        output = model(input_ids=tokens, past_key_values=past, use_cache=True, **options)
        tokens, past = output.logits[:, -1:].argmax(-1), output.past_key_values
        if place < given.shape[1]:
            tokens = torch.where(lengths > place, given[:, place : place + 1], tokens)
        place += 1
        yield tokens


def _near(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of prompts by their lengths, shortest first, at most `batch_size` and `_APART` tokens apart at a time."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or lengths[number] - lengths[batch[0]] > _APART):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _alike(shapes: Sequence[Any], batch_size: int) -> Iterator[list[int]]:
    """Numbers of the examples of one shape, at most `batch_size` at a time."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, shape in enumerate(shapes):
        groups[shape].append(number)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
