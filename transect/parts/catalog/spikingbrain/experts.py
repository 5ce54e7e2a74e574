"""The MLP as copies of a dense one: some that every position runs, and some of which it chooses (Section 3.2)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ....arguments import Range
from ...experts import ExpertsPart, Function, SplitMLP, balance, by_expert, neurons_by_groups
from ...precision import wide


class Upcycled(ExpertsPart):
    """Σ MLP_s(x) + Σ p_i MLP_i(x) over the k routed experts of the highest p; p is not normed over the chosen.

    Each expert has all the neurons of a dense MLP. In training it leaves the balance of the experts in `auxiliary`.

    experts: N, that are routed.
    active: k.
    shared: S, that run for every position.
    scores: p is the softmax of the router's scores, or the sigmoid of each.
    spread: standard deviation of the router's first numbers; 0 gives all experts the same p.
    hidden: neurons of each expert; 0 is the number that the model's config gives.
    function: between up, or gate, and down.
    gated: whether there is a gate beside up.
    bias: of up and gate.
    out_bias: of down; it is added once, whatever experts run.
    """

    kind = "mlp.spikingbrain-experts"
    paper = "arXiv:2509.05276"
    limit = "with one shared expert and routed ones that give nothing it is the dense MLP"
    least_active = 0

    def __init__(
        self, width: int, neurons: int, *, experts: Annotated[int, Range(1, 2**16)] = 16,
        active: Annotated[int, Range(0, 2**16)] = 1, shared: Annotated[int, Range(1, 2**16)] = 1,
        scores: Literal["softmax", "sigmoid"] = "softmax", spread: Annotated[float, Range(0, 1)] = 0.02,
        hidden: Annotated[int, Range(0, 2**24)] = 0, function: Function = "silu", gated: bool = True,
        bias: bool = False, out_bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        size = hidden or neurons
        neurons_by_groups(size * experts, 0, experts, active, "neurons")
        self.experts, self.active, self.scores = experts, active, scores
        self.shared = SplitMLP(width, shared, size, function, gated, bias)
        self.split = SplitMLP(width, experts, size, function, gated, bias)
        self.router = nn.Linear(width, experts, bias=False)
        nn.init.normal_(self.router.weight, std=spread)
        self.out_bias = nn.Parameter(torch.zeros(width)) if out_bias else None
        self.__dict__["auxiliary"] = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        y = self.shared.all(flat)
        if self.active:
            y = y + self._routed(flat)
        if self.out_bias is not None:
            y = y + self.out_bias
        return y.view(x.shape).to(x.dtype)

    def _routed(self, x: Tensor) -> Tensor:
        """What the chosen experts add: (T x d) -> (T x d)."""
        scores = wide(self.router(x))
        p = scores.softmax(-1) if self.scores == "softmax" else scores.sigmoid()
        weights, chosen = p.topk(self.active, dim=-1)
        if self.training:
            self.__dict__["auxiliary"] = balance(p / p.sum(-1, keepdim=True), chosen)
        return self.split(x, by_expert(chosen, weights, self.experts))

    @property
    def flops(self) -> int:
        router = 2 * self.router.weight.numel() if self.active else 0
        return router + self.shared.groups * self.shared.flops + self.active * self.split.flops
