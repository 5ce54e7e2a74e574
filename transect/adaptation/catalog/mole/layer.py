"""A linear layer with low-rank updates, of which each token uses one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....errors import TransectError
from ...tuner import UpdateLayer
from .routing import Choice, Mlp, balance

_SMALL = 0.02  # of a router's weights at the start: with zeros, every token would go to the first expert
NO_MERGE = (
    "which expert a token takes depends on the token, so that no one weight does the same: a mixture of {} experts "
    "cannot be merged (one expert can). Keep the adapter, or train `lora`"
)


@dataclass(frozen=True)
class Place:
    """Of a projection: its MLP, and whether it reads the MLP's input."""

    mlp: Mlp
    reads: bool


def one_of_each(x: Tensor, down: Tensor, up: Tensor, choice: Choice) -> Tensor:
    """B_k A_k x, k the expert of each token: tokens are gathered by expert, and put back (sparse; the paper's).

    x (n, d_in), down: A (E, rank, d_in), up: B (E, d_out, rank) -> (n, d_out).
    """
    parts = x.index_select(0, choice.order).split(choice.counts)
    made = [functional.linear(functional.linear(part, a), b) for part, a, b in zip(parts, down, up, strict=True)]
    gathered = torch.cat(made)
    return torch.empty_like(gathered).index_copy(0, choice.order, gathered)


def all_by_probability(x: Tensor, down: Tensor, up: Tensor, choice: Choice) -> Tensor:
    """Σ_e p_e B_e A_e x, shapes as above: every expert is computed, and the router learns from the loss."""
    experts, rank, d_in = down.shape
    inner = functional.linear(x, down.reshape(experts * rank, d_in)).view(-1, experts, rank)
    weighed = (inner * choice.probabilities.to(inner.dtype)[..., None]).flatten(1)
    return functional.linear(weighed, up.transpose(0, 1).reshape(-1, experts * rank))


class MoleLayer(UpdateLayer):
    """W x + (alpha / rank) B_k A_k x, with k the expert of the token; k is the only one where the layer is in no MLP.

    By adapter: `mole_A` (E, rank, d_in) and `mole_B` (E, d_out, rank); in the first projection of an MLP that reads the
    MLP's input also the router, `mole_router_weight` (E, D) and `mole_router_bias` (E), never below 32 bits. A single
    expert has no router.
    """

    adapter_layer_names = ("mole_A", "mole_B", "mole_router_weight", "mole_router_bias")
    other_param_names = ("mole_config", "mole_dropout")

    def __init__(
        self, base_layer: nn.Module, name: str, config: Any, inference_mode: bool = False, place: Place | None = None
    ) -> None:
        self.place = place  # before all else, since making the adapter asks for it
        super().__init__(base_layer, name, config, inference_mode)

    def prepare(self) -> None:
        self.mole_config: dict[str, Any] = {}
        self.mole_dropout = nn.ModuleDict()
        self.mole_A, self.mole_B = nn.ParameterDict(), nn.ParameterDict()
        self.mole_router_weight, self.mole_router_bias = nn.ParameterDict(), nn.ParameterDict()
        if self.place is not None:
            self.place.mlp.layers.append(self)

    def build(self, name: str, config: Any) -> None:
        d_out, d_in, rank = self.out_features, self.in_features, config.rank
        experts, device = 1 if self.place is None else config.experts, self.weight.device
        down = torch.empty(experts, rank, d_in, device=device)
        for one in down:  # each by itself: the bound follows from d_in
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))
        self.mole_config[name] = config
        self.mole_dropout[name] = nn.Dropout(config.dropout)
        self.mole_A[name] = nn.Parameter(down)
        self.mole_B[name] = nn.Parameter(torch.zeros(experts, d_out, rank, device=device))
        reads = self.place is not None and self.place.reads
        if experts > 1 and reads and self.place.mlp.owner(name) in (None, self):  # type: ignore[union-attr]
            as_fine = {"device": device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
            weight = nn.init.normal_(torch.empty(experts, d_in, **as_fine), std=_SMALL)
            self.mole_router_weight[name] = nn.Parameter(weight)
            self.mole_router_bias[name] = nn.Parameter(torch.zeros(experts, **as_fine))

    def experts(self, name: str) -> int:
        """How many the adapter has in this layer."""
        return self.mole_A[name].shape[0]

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        if self.place is not None and self.place.reads and not self.disable_adapters and not self.merged:
            for name in self.adapters():
                if self.experts(name) > 1:
                    self.place.mlp.read(name, x, self)
        return super().forward(x, *arguments, **named)

    def added(self, name: str, x: Tensor) -> Tensor:
        config, down, up = self.mole_config[name], self.mole_A[name], self.mole_B[name]
        tokens = self.mole_dropout[name](x).reshape(-1, self.in_features)
        if self.place is None or self.experts(name) == 1:
            change = functional.linear(functional.linear(tokens, down[0]), up[0])
        else:
            choice = self.place.mlp.take(name, self)
            if len(choice.experts) != len(tokens):
                raise TransectError(
                    f"{self.place.mlp.path}: experts were chosen for {len(choice.experts)} tokens, and a projection "
                    f"reads {len(tokens)}: the projections do not belong to one MLP. Name them by reads= and writes="
                )
            change = (all_by_probability if config.soft else one_of_each)(tokens, down, up, choice)
            if config.gate_scale:
                change = change * choice.chosen.to(change.dtype)
        return config.alpha / config.rank * change.view(*x.shape[:-1], self.out_features)

    def delta(self, name: str) -> Tensor:
        if self.experts(name) > 1:
            raise TransectError(NO_MERGE.format(self.experts(name)))
        config = self.mole_config[name]
        return config.alpha / config.rank * self.mole_B[name][0] @ self.mole_A[name][0]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT gives everything the weight's type, and so again after it has loaded; a router keeps its own."""
        held = [one for one in (self.mole_router_weight, self.mole_router_bias) if adapter_name in one]
        before = [one[adapter_name] for one in held]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for one, kept in zip(held, before, strict=True):
            moved = kept.detach().to(one[adapter_name].device)
            one[adapter_name] = nn.Parameter(moved, requires_grad=kept.requires_grad)

    @staticmethod
    def penalty_of(model: nn.Module, adapter_name: str = "default") -> Tensor | None:
        """w times the balance of the last forward pass, to be added to its mean loss before the backward pass.

        A scalar with gradient; None where nothing is to be added: without a router, at w = 0, or with the adapter off.
        The training loop here asks for it. For Hugging Face's Trainer:

            class Balanced(Trainer):
                def compute_loss(self, model, inputs, return_outputs=False, **more):
                    loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
                    penalty = MoleLayer.penalty_of(model)
                    if penalty is not None:  # the Trainer sums over the batches of a step
                        loss = loss + penalty / self.args.gradient_accumulation_steps
                    return (loss, outputs) if return_outputs else loss

        Raises TransectError before the first forward pass, and for one that kept no gradient though one is wanted.
        """
        mlps = _routed(model, adapter_name)
        if not mlps:
            return None
        owner = mlps[0].owner(adapter_name)
        assert owner is not None
        config = owner.mole_config[adapter_name]
        if config.balance == 0:
            return None
        layers = [sums for mlp in mlps if (sums := mlp.sums(adapter_name)) is not None]
        if not layers:
            raise TransectError("the balance is that of a forward pass of the whole model, and there was none yet")
        wanted = torch.is_grad_enabled() and owner.mole_router_weight[adapter_name].requires_grad
        if wanted and not all(sums.probabilities.requires_grad for sums in layers):
            raise TransectError(
                "the last forward pass kept no gradient for the routers. Under gradient checkpointing pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}; otherwise run it without torch.no_grad()'
            )
        return config.balance * balance(layers, config.pooled)

    @staticmethod
    def shares_of(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
        """By MLP, the share of the last forward pass's tokens that each expert got (E), padding left out."""
        found = {mlp.path: mlp.sums(adapter_name) for mlp in _routed(model, adapter_name)}
        return {path: sums.chosen.sum(0) / sums.tokens.sum() for path, sums in found.items() if sums is not None}


def _routed(model: nn.Module, name: str) -> list[Mlp]:
    """The MLPs in which the adapter is at work with a router, in the model's order."""
    layers = [module for module in model.modules() if isinstance(module, MoleLayer)]
    return [
        layer.place.mlp
        for layer in layers
        if layer.place is not None
        and name in layer.mole_router_weight
        and name in layer.active_adapters
        and not layer.disable_adapters
    ]
