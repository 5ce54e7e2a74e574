"""What a reward is trained and judged by: of two answers to a prompt, the better one should get more.

A reward is one number for a prompt with its answer; only differences count.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pairwise_loss(better: Tensor, worse: Tensor) -> Tensor:
    """-log σ(r_better - r_worse) of each pair, in nats (Bradley and Terry; the paper's equation for all phases).

    log 2 for equal rewards; its slope in r_better is -(1 - σ(r_better - r_worse)). Linear, not infinite, where the
    wrong answer is far ahead.
    """
    return -functional.logsigmoid(better - worse)


def pair_accuracy(better: Tensor, worse: Tensor) -> float:
    """Share of the pairs in which the better answer gets more. A tie is wrong."""
    return (better > worse).double().mean().item()


def last_states(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Of each sequence the state at its last real token (B x D), on whichever side it is padded.

    hidden: B x T x D. mask: B x T, not 0 where a token is real; None where all are.
    """
    if mask is None:
        return hidden[:, -1]
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (mask.bool() * places).amax(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
