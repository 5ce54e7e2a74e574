"""Copying a random sequence, and finishing one that has begun again (induction)."""

from __future__ import annotations

from typing import Annotated

import torch

from ..errors import TransectError
from ..parameters import Range
from .registry import Drawn, task

Ids = Annotated[int, Range(3, 2**20)]
Length = Annotated[int, Range(4, 2**20)]


@task("copying", paper="arXiv:2402.01032")
def copying(count: int, generator: torch.Generator, *, length: Length = 64, vocabulary: Ids = 64) -> Drawn:
    """Random tokens, a separator, and the same tokens again, which are the answers.

    The separator is id 0. Whoever has a state of fixed size cannot copy long sequences (Jelassi et al. 2024).

    length: of the whole, even.
    vocabulary: how many ids.
    """
    if length % 2:
        raise TransectError(f"copying: the length should be even, not {length}")
    tokens = torch.randint(1, vocabulary, (count, length), generator=generator)
    tokens[:, length // 2 - 1] = 0
    tokens[:, length // 2 :] = torch.cat([tokens[:, : length // 2 - 1], tokens[:, :1]], dim=1)
    answers = torch.zeros(count, length, dtype=torch.bool)
    answers[:, length // 2 : -1] = True
    return Drawn(tokens, answers, vocabulary)


@task("induction", paper="arXiv:2209.11895")
def induction(count: int, generator: torch.Generator, *, length: Length = 64, vocabulary: Ids = 64) -> Drawn:
    """Random tokens in which one comes again at the end: what stood behind it the first time is the answer.

    That token is id 0, and stands nowhere else (Olsson et al. 2022; Fu et al. 2023).

    length: of the whole.
    vocabulary: how many ids.
    """
    tokens = torch.randint(1, vocabulary, (count, length), generator=generator)
    first = torch.randint(0, length - 3, (count, 1), generator=generator)
    tokens.scatter_(1, first, 0)
    tokens[:, -2] = 0
    tokens[:, -1:] = tokens.gather(1, first + 1)
    answers = torch.zeros(count, length, dtype=torch.bool)
    answers[:, -1] = True
    return Drawn(tokens, answers, vocabulary)
