"""Dense2MoE (Zheng et al., ICCV 2025, arXiv:2510.09094): a shared expert and many small ones, out of one dense MLP."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from ...arguments import Range
from ...errors import TransectError
from ..experts import Function, SharedAndRouted, SplitMLP, neurons_by_groups


class Dense2MoE(SharedAndRouted):
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
        self.gates = gates
        always = SplitMLP(width, 1, shared, function, gated, bias)
        self.build(always, SplitMLP(width, experts, size, function, gated, bias), active, out_bias)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        probabilities = scores.softmax(-1)
        values, chosen = probabilities.topk(self.active, dim=-1)
        if self.gates == "one":
            return probabilities, chosen, None
        return probabilities, chosen, values * (self.experts if self.gates == "scaled" else 1)
