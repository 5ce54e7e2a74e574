"""AlgoFormer (Gao et al., 2024, arXiv:2402.13572): a model before a loop, the loop, and a model behind it.

The loop is written down, not trained: one head of linear attention that is one step of gradient descent on the least
squares of the examples in its prompt (a known identity; the paper's own theorems could not be read, so this is ours).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...errors import TransectError


class AlgoFormer(nn.Module):
    """post(loopᵀ(pre(P))): P (B x n x d) -> what `post` puts out.

    pre, loop, post: modules; `nn.Identity` before and behind leave the plain looped transformer. times: T. inject:
    whether what `pre` gave is added again before each turn, as plain looped transformers do (whether the paper does is
    not known to us).
    """

    def __init__(self, pre: nn.Module, loop: nn.Module, post: nn.Module, times: int, inject: bool = True) -> None:
        super().__init__()
        self.pre, self.loop, self.post, self.times, self.inject = pre, loop, post, times, inject

    def forward(self, prompt: Tensor, times: int | None = None) -> Tensor:
        """times: in place of the model's own number of turns."""
        start = state = self.pre(prompt)
        for _ in range(self.times if times is None else times):
            state = self.loop(state + start if self.inject else state)
        return self.post(state)


class GradientStep(nn.Module):
    """One step of gradient descent on (1/2N) Σ (y_i - w · x_i)², in the space of predictions, by linear attention.

    Tokens are (x_j, r_j, ŷ_j): the input (d), what is left of the answer (0 of the query, which is the last token), and
    the prediction so far, 0 at the beginning. With queries and keys x and values (0, -η r, η r) / N, the head adds
    η/N Σ_i r_i (x_i · x_j) over the N examples to ŷ_j, and takes it from r_j: ŷ = w · x for the w of as many steps from
    w = 0. No softmax, which cannot give this.

    size: d. rate: η. causal: whether a token sees the examples before it alone; N is then that of all, and it is no
    descent on one objective any more.
    """

    def __init__(self, size: int, rate: float, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.k = (nn.Linear(size + 2, size, bias=False, dtype=torch.float64) for _ in range(2))
        self.v = nn.Linear(size + 2, size + 2, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for reading in (self.q, self.k):
                reading.weight.copy_(torch.eye(size, size + 2))
            self.v.weight.zero_()
            self.v.weight[size:, size] = torch.tensor([-rate, rate], dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B x (N + 1) x (d + 2)), the query last, after the step."""
        count = tokens.shape[1] - 1
        scores = self.q(tokens) @ self.k(tokens).mT / count  # B x (N + 1) x (N + 1)
        scores = scores[:, :, :count]  # the query is nobody's example
        if self.causal:
            scores = scores.tril(-1)
        return tokens + scores @ self.v(tokens[:, :count])


class _ReadIn(nn.Module):
    """Inputs with answers (B x (N + 1) x (d + 1)) -> tokens (Φ(x), y, 0); the last answer is not looked at."""

    def __init__(self, features: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.features = features

    def forward(self, prompt: Tensor) -> Tensor:
        x, y = prompt[..., :-1], prompt[..., -1:]
        y = torch.cat([y[:, :-1], torch.zeros_like(y[:, -1:])], dim=1)
        return torch.cat([x if self.features is None else self.features(x), y, torch.zeros_like(y)], dim=-1)


class _ReadOut(nn.Module):
    """Tokens -> predictions (B x (N + 1)) of all examples and, the last, of the query."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[..., -1]


def gradient_descent(
    size: int, rate: float, times: int, features: Callable[[Tensor], Tensor] | None = None, causal: bool = False
) -> AlgoFormer:
    """An AlgoFormer, in float64, whose answers are those of `times` steps of gradient descent from w = 0.

    It reads inputs with their answers behind them (B x (N + 1) x (d + 1)), the query last, and gives predictions
    (B x (N + 1)). size: of what the loop descends on: d, or of the features. rate: below 2 / λ_max of the mean of x xᵀ
    it comes to the least squares' answers, above it grows without bound. features: Φ, which `pre` computes once.
    TransectError for sizes and rates that mean nothing.
    """
    if size < 1 or times < 0 or not 0 < rate < float("inf"):
        raise TransectError(
            f"size should be at least 1, times at least 0, and rate above 0, not {size}, {times} and {rate}"
        )
    return AlgoFormer(_ReadIn(features), GradientStep(size, rate, causal), _ReadOut(), times, inject=False)
