"""The MLP of a union of experts (Yang et al. 2025, arXiv:2503.02495): all experts together are one dense MLP."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ....arguments import Range
from ....errors import TransectError
from ...experts import ExpertsPart, Function, Sent, SplitMLP, best_experts, by_expert, neurons_by_groups
from ...precision import wide

Gates = Literal["scaled", "rank"]
Selection = Literal["token", "expert", "sequence"]


class UnionMLP(ExpertsPart):
    """The neurons in groups, of which each position runs the k that a linear gate scores highest.

    The authors' language model lets each expert take the positions of a sequence that score highest: whether a position
    is computed then depends on what is behind it, so that it must not be used to write text. So that, and a choice for
    a whole sequence, are for models that see all of it anyway; and padding would be chosen, too.

    experts: E; it divides the neurons.
    active: k, how many each position runs.
    gates: scaled multiplies an expert's output by k times its share in the softmax over the chosen, so that the gate
        learns (but not with k = 1, where that is 1); rank only chooses, as in the authors' language model, so that the
        gate has no gradient and all experts together are the dense MLP whatever it says.
    compensate: multiply the sum by E / k, which is what the others would have added were all alike.
    selection: token: each position chooses k experts. expert: each expert takes the N k / E positions of a sequence of
        N that score highest with it. sequence: the mean position chooses k experts for all. The latter two read all
        positions, and are refused in a causal model.
    hidden: neurons; 0 is the number that the model's config gives.
    function: between up, or gate, and down.
    gated: whether there is a gate beside up.
    bias: of up and gate.
    out_bias: of down; it is added once, also where no expert is chosen.
    """

    kind = "mlp.uoe"
    paper = "arXiv:2503.02495"
    limit = "with all experts active and gates that only rank it is the dense MLP"

    def __init__(
        self, width: int, neurons: int, causal: bool, *, experts: Annotated[int, Range(1, 2**16)] = 4,
        active: Annotated[int, Range(1, 2**16)] = 2, gates: Gates = "scaled", compensate: bool = False,
        selection: Selection = "token", hidden: Annotated[int, Range(0, 2**24)] = 0, function: Function = "silu",
        gated: bool = True, bias: bool = False, out_bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if causal and selection != "token":
            raise TransectError(
                f"uoe: selection={selection!r} reads what is behind a position to choose what it runs, which a model "
                "that predicts the next token must not: take selection='token'"
            )
        size = neurons_by_groups(neurons, hidden, experts, active, "neurons")
        self.experts, self.active, self.scaled, self.selection = experts, active, gates == "scaled", selection
        self.compensate = compensate
        self.split = SplitMLP(width, experts, size, function, gated, bias)
        self.router = nn.Linear(width, experts)
        self.out_bias = nn.Parameter(torch.zeros(width)) if out_bias else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        whole = self.active == self.experts and not self.scaled
        y = self.split.all(flat) if whole else self.split(flat, self.sent(x))
        if self.compensate:
            y = y * (self.experts / self.active)
        if self.out_bias is not None:
            y = y + self.out_bias
        return y.view(x.shape).to(x.dtype)

    def sent(self, x: Tensor) -> Sent:
        """Which of the positions (... x d, flattened) go to which expert."""
        if self.selection == "expert":
            return self._taken(x)
        scores = self.router(x.mean(-2, keepdim=True) if self.selection == "sequence" else x)
        chosen, weights = best_experts(scores, self.active, self.scaled)
        if self.selection == "sequence":
            shape = (*x.shape[:-1], self.active)
            chosen, weights = chosen.expand(shape), None if weights is None else weights.expand(shape)
        return by_expert(
            chosen.flatten(0, -2), None if weights is None else weights.flatten(0, -2), self.experts
        )  # fmt: skip

    def _taken(self, x: Tensor) -> Sent:
        """Each expert takes its best positions of each sequence. x: (B x N x d)."""
        batch, count = x.shape[0], x.shape[1]
        gates = wide(self.router(x)).softmax(-1)  # B x N x E
        take = -(-count * self.active // self.experts)
        at = gates.topk(take, dim=1).indices.sort(dim=1).values  # B x n x E, in their order
        positions = (at + count * torch.arange(batch, device=x.device)[:, None, None]).permute(2, 0, 1).flatten()
        weights = gates.gather(1, at).permute(2, 0, 1).flatten() * self.experts if self.scaled else None
        return Sent(positions, [batch * take] * self.experts, weights)

    @property
    def flops(self) -> int:
        return super().flops + self.active * self.split.flops
