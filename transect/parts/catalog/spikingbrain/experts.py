"""The MLP as copies of a dense one: some that every position runs, and some of which it chooses (Section 3.2)."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor, nn

from ....arguments import Range
from ...experts import Function, SharedAndRouted, SplitMLP, neurons_by_groups


class Upcycled(SharedAndRouted):
    """Σ MLP_s(x) + Σ p_i MLP_i(x) over the k routed experts of the highest p; p is not normed over the chosen.

    Each expert has all the neurons of a dense MLP. In training it leaves the balance of the experts in `auxiliary`.

    experts: N, that are routed.
    active: k; 0 runs the shared experts alone.
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
        self.scores = scores
        always = SplitMLP(width, shared, size, function, gated, bias)
        self.build(always, SplitMLP(width, experts, size, function, gated, bias), active, out_bias)
        nn.init.normal_(self.router.weight, std=spread)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        p = scores.softmax(-1) if self.scores == "softmax" else scores.sigmoid()
        weights, chosen = p.topk(self.active, dim=-1)
        return p / p.sum(-1, keepdim=True), chosen, weights
