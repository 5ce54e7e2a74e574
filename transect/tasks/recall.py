"""Associative recall of many keys (MQAR; Arora et al., "Zoology", ICLR 2024, arXiv:2312.04927)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..errors import TransectError
from ..parameters import Range
from .registry import Drawn, task


@task("recall", paper="arXiv:2312.04927", over="keys")
def recall(
    count: int, generator: torch.Generator, *, keys: str = "8",
    length: Annotated[int, Range(4, 2**20)] = 64, vocabulary: Annotated[int, Range(4, 2**20)] = 256,
    power: Annotated[float, Range(0, above=True)] = 0.01,
) -> Drawn:  # fmt: skip
    """Pairs of a key and a value, and then each key once more, at random distances: its value is to be said.

    Keys are from the first half of the vocabulary (0 stands for nothing), values from the second, no key twice. The
    distances to the second occurrence follow a power law, as in natural text, so that most are short. The answer is the
    token behind the key; all other places behind the pairs hold 0.

    keys: how many pairs; several counts, such as 4,8,16, are drawn equally often, and each is also judged by itself.
    length: of a sequence; even, and four times the keys at the least.
    vocabulary: how many ids. power: exponent a of the law, p(gap) ~ a gap^(a - 1).
    """
    counts = _counts(keys)
    half, most = vocabulary // 2, max(counts)
    if length % 2 or length < 4 * most:
        raise TransectError(f"recall: {most} keys need an even length of {4 * most} or more, not {length}")
    if most > half - 1:
        raise TransectError(f"recall: {vocabulary} ids have {half - 1} keys, and {most} are wanted")
    tokens = torch.zeros(count, length, dtype=torch.long)
    answers = torch.zeros(count, length, dtype=torch.bool)
    held = torch.tensor(counts).repeat(-(-count // len(counts)))[:count]
    for number in counts:
        rows = (held == number).nonzero()[:, 0]
        if len(rows):
            tokens[rows], answers[rows] = _sequences(len(rows), generator, number, length, vocabulary, power)
    over = held[:, None].expand(count, length) if len(counts) > 1 else None
    return Drawn(tokens, answers, vocabulary, over)


def _counts(keys: str) -> list[int]:
    """The numbers in a setting such as `4,8,16`, each once."""
    try:
        counts = list(dict.fromkeys(int(one) for one in keys.split(",")))
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise TransectError(f"recall: keys={keys[:100]!r} should be whole numbers from 1, separated by commas")
    return counts


def _sequences(
    count: int, generator: torch.Generator, keys: int, length: int, vocabulary: int, power: float
) -> tuple[Tensor, Tensor]:
    """Sequences with so many keys each (count x T), and where the answers stand."""
    half, room = vocabulary // 2, (length - 2 * keys) // 2  # places for a key with the answer behind it
    chances = torch.ones(count, half - 1)
    chosen = 1 + torch.multinomial(chances, keys, generator=generator)  # without replacement
    values = half + torch.randint(vocabulary - half, (count, keys), generator=generator)
    gaps = torch.arange(1, room + 1, dtype=torch.float64).pow(power - 1).expand(count, room)
    places = torch.multinomial(gaps, keys, generator=generator)
    tokens = torch.zeros(count, length, dtype=torch.long)
    tokens[:, : 2 * keys] = torch.stack([chosen, values], dim=-1).flatten(1)
    at = 2 * keys + 2 * places
    tokens.scatter_(1, at, chosen).scatter_(1, at + 1, values)
    return tokens, torch.zeros(count, length, dtype=torch.bool).scatter_(1, at + 1, True)
