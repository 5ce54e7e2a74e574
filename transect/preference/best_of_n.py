"""Best of n: the answer with the highest reward among n that a model gives; and what that is worth as n grows.

A reward that is not the true one is believed too much by a large n: the true reward of what it picks rises, and at
some n may fall (Gao et al. 2023, arXiv:2210.10760).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TransectError
from ..forward import at_rest

Sampler = Callable[[str, int], Sequence[str]]  # prompt, n -> n answers
Scorer = Callable[[Sequence[str], Sequence[str]], Tensor]  # prompts, answers -> a reward for each


def best_of_n(score: Scorer, prompt: str, sample: Sampler, n: int) -> tuple[str, Tensor]:
    """The answer of n with the highest reward, of equal ones the first, and the rewards of all (n).

    score: such as `RewardModel.score`. sample: such as `sampler(model, tokenizer)`.
    """
    if n < 1:
        raise TransectError(f"best of n needs at least one answer, got n={n}")
    answers = list(sample(prompt, n))
    if len(answers) != n:
        raise TransectError(f"the sampler gave {len(answers)} answers where {n} were asked for")
    rewards = score([prompt] * n, answers)
    return answers[int(rewards.argmax())], rewards


def sampler(model: Any, tokenizer: Any, *, new_tokens: int = 64, temperature: float = 1.0, seed: int = 0) -> Sampler:
    """Answers of a Hugging Face model that generates: each call for the same prompt and n gives the same ones."""

    def sample(prompt: str, n: int) -> list[str]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        with torch.no_grad(), at_rest(model):
            torch.manual_seed(seed)
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=temperature, top_k=0,
                num_return_sequences=n, max_new_tokens=new_tokens,
            )  # fmt: skip
        return tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)

    return sample


@dataclass(frozen=True)
class Point:
    """n: answers to choose from. kl: of that choice from the sampler, in nats: log n - (n - 1) / n.

    proxy, true: expected reward of the answer that the proxy picks, by the proxy and by the true reward.
    """

    n: int
    kl: float
    proxy: float
    true: float


def curve(proxy: Tensor, true: Tensor, sizes: Sequence[int]) -> list[Point]:
    """What best of n gets by each n, expected over all choices of n of the N answers of each prompt, and over prompts.

    proxy, true: rewards (prompts x N). No sampling: with answers ordered by the proxy, the i-th smallest of N is the
    best of C(i - 1, n - 1) of all C(N, n) choices (Nakano et al. 2021, appendix).
    Raises TransectError for an n below 1 or above N.
    """
    count = proxy.shape[1]
    if wrong := [n for n in sizes if not 1 <= n <= count]:
        raise TransectError(f"best of {wrong[0]} cannot be taken from {count} answers: give 1 to {count}")
    order = proxy.argsort(dim=1, stable=True)
    sorted_proxy, sorted_true = (rewards.double().gather(1, order) for rewards in (proxy, true))
    made = []
    for n in sizes:
        chances = torch.tensor(
            [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)],
            dtype=torch.float64, device=proxy.device,
        )  # fmt: skip
        made.append(
            Point(
                n,
                math.log(n) - (n - 1) / n,
                (sorted_proxy @ chances).mean().item(),
                (sorted_true @ chances).mean().item(),
            )
        )
    return made
