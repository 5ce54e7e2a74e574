"""Dense2MoE (Zheng et al., ICCV 2025, arXiv:2510.09094): a shared expert and many small ones, out of one dense MLP."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ...arguments import Range
from ...errors import TransectError
from ..experts import ExpertsPart, Function, SplitMLP, balance, by_expert, neurons_by_groups
from ..precision import wide


class SharedAndRouted(ExpertsPart):
    """MLP_s(x) + Σ g_i(x) MLP_i(x) over the k experts that score highest; the shared one runs for every position.

    g is the softmax of a linear map of x over all n experts, not normed again over the chosen (whether the softmax is
    before or after the cut is not said; ours). In training it leaves the balance of the experts in `auxiliary`.

    experts: n.
    active: k, how many each position runs besides the shared one; 0 runs that alone.
    shared: neurons of the shared expert; 0 is a quarter of all.
    gates: scaled: g times n, so that even gates leave the plain sum (ours; near 1 / n each, the experts would begin
        with almost nothing to say). softmax: g. one: 1 for each that is chosen.
    hidden: neurons; 0 is the number that the model's config gives.
    function: between up, or gate, and down.
    gated: whether there is a gate beside up.
    bias: of up and gate.
    out_bias: of down; it is added once.
    """

    kind = "mlp.dense2moe"
    paper = "arXiv:2510.09094"
    limit = "with all experts active and gates of one it is the dense MLP"
    least_active = 0

    def __init__(
        self, width: int, neurons: int, *, experts: Annotated[int, Range(1, 2**16)] = 12,
        active: Annotated[int, Range(0, 2**16)] = 2, shared: Annotated[int, Range(0, 2**24)] = 0,
        gates: Literal["scaled", "softmax", "one"] = "scaled", hidden: Annotated[int, Range(0, 2**24)] = 0,
        function: Function = "silu", gated: bool = True, bias: bool = False, out_bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        neurons = hidden or neurons
        shared = shared or max(1, neurons // 4)
        if shared >= neurons:
            raise TransectError(
                f"dense2moe: of {neurons} neurons, {shared} cannot be shared: leave some to the experts"
            )
        size = neurons_by_groups(neurons - shared, 0, experts, active, f"of {neurons} neurons, less {shared} shared,")
        self.experts, self.active, self.gates = experts, active, gates
        self.shared = SplitMLP(width, 1, shared, function, gated, bias)
        self.split = SplitMLP(width, experts, size, function, gated, bias)
        self.router = nn.Linear(width, experts, bias=False)
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
        if self.active == self.experts and self.gates == "one" and not self.training:
            return self.split.all(x)
        probabilities = wide(self.router(x)).softmax(-1)
        values, chosen = probabilities.topk(self.active, dim=-1)
        if self.training:
            self.__dict__["auxiliary"] = balance(probabilities, chosen)
        factor = self.experts if self.gates == "scaled" else 1
        return self.split(x, by_expert(chosen, None if self.gates == "one" else values * factor, self.experts))

    @property
    def flops(self) -> int:
        router = 2 * self.router.weight.numel() if self.active else 0
        return router + self.shared.flops + self.active * self.split.flops
