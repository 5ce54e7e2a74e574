"""The memory, and how it stands in a model: an ordinary checkpoint, whose logits are those of the mixture.

Three modules of the model are led by one beside them, so that nothing else moves. The last MLP's input is noted; behind
the last hidden states the body puts what the memory makes of it, so that both reach the head for the same positions;
the head takes them apart again, and mixes the two distributions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..anatomy import Anatomy
from ..anatomy.banks import link_banks
from ..anatomy.record import record_around
from ..anatomy.surround import AROUND, Surrounded, surround
from ..errors import TransectError
from ..forward.lens import Lens
from ..operators.base import Described
from .datastore import last_mlp

GROUP = "mlp-memory"


class Memory(nn.Module):
    """x <- x + down(gelu(up(norm x))), block by block, and a norm: a state (... x d) to the memory's own (... x d).

    Position by position: there is no attention. Its head is `head` (V x d), without a bias.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.ups = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(blocks))
        self.downs = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(blocks))
        self.final = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * blocks) if name.startswith("downs") else 1))
        self.noted: Tensor | None = None  # the last MLP's input of the pass that is under way

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(functional.gelu(up(norm(x))))
        return self.final(x)


class Noting(Described):
    """Leads the last block's MLP, and notes its input."""

    kind = "memory.noting"
    bank: Any

    def __init__(self) -> None:
        super().__init__()
        self.bank_group, self.owns_bank = GROUP, False

    def use_bank(self, bank: Any) -> None:
        """Refer to the memory that the body's leader owns."""
        self.__dict__["bank"] = bank

    def forward(self, module: nn.Module, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.bank.noted = args[0] if args else kwargs["hidden_states"]
        return own(*args, **kwargs)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Noting:
        return cls()


class Remembering(Described):
    """Leads the model's body, and puts the memory's states behind the last hidden ones: (... x 2d)."""

    kind = "memory.remembering"

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.width, self.blocks = width, blocks
        self.bank_group, self.owns_bank = GROUP, True
        self.bank: Any = Memory(width, blocks)

    def forward(self, module: nn.Module, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = own(*args, **kwargs)
        state, self.bank.noted = self.bank.noted, None
        if state is None:
            raise TransectError("the last block's MLP, whose input the memory reads, did not run: was it dropped?")
        y = output[0]
        both = torch.cat([y, self.bank(state.view(*y.shape[:-1], -1)).to(y.dtype)], dim=-1)
        if isinstance(output, tuple):
            return (both, *output[1:])
        output.last_hidden_state = both
        return output

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "width": self.width, "blocks": self.blocks}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Remembering:
        return cls(description["width"], description["blocks"])


class Mixing(Described):
    """Leads the model's head: log((1 - share) p_model + share p_memory), in the place of logits.

    With share 0 they are the model's own logits.
    """

    kind = "memory.mixing"

    def __init__(self, width: int, vocabulary: int, share: float) -> None:
        super().__init__()
        self.width, self.vocabulary, self.share = width, vocabulary, share
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, module: nn.Module, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = args[0]
        own_logits = own(x[..., : -self.width])
        if not self.share:
            return own_logits
        ours, memory = (
            (one if one.dtype == torch.float64 else one.float()).log_softmax(-1)
            for one in (own_logits, self.head(x[..., -self.width :]))
        )
        return mixed(ours, memory, self.share).to(own_logits.dtype)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "width": self.width, "vocabulary": self.vocabulary, "share": self.share}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Mixing:
        return cls(description["width"], description["vocabulary"], float(description["share"]))


def mixed(ours: Tensor, memory: Tensor, share: float) -> Tensor:
    """log((1 - share) exp(ours) + share exp(memory)), of log-probabilities."""
    if share == 1:
        return memory
    return torch.logaddexp(ours + math.log1p(-share), memory + math.log(share)) if share else ours


def mixed_loss(ours: Tensor, memory: Tensor, least: int = 0) -> tuple[float, float]:
    """The least mean loss of the mixture, and the share at which it is reached, in hundredths.

    ours, memory: log-probabilities (N) of the token that came next. The loss is convex in the share. least: hundredths
    of the smallest share that is tried.
    """
    shares = torch.arange(least, 101, dtype=torch.float64) / 100
    losses = torch.stack([-mixed(ours.double(), memory.double(), float(share)).mean() for share in shares])
    best = int(losses.argmin())
    return float(losses[best]), float(shares[best])


def check(anatomy: Anatomy) -> None:
    """TransectError, before any work, for a model that cannot have a memory."""
    last_mlp(anatomy)
    name, lens = type(anatomy.model).__name__, Lens(anatomy)
    if lens.multiplier != 1 or lens.softcap is not None:
        raise TransectError(f"{name} changes its logits behind the head, so that distributions cannot be mixed there")
    if isinstance(lens.head, Surrounded):
        raise TransectError("the model has a memory already: take it without one")


def attach(anatomy: Anatomy, memory: Memory, head: Tensor, share: float) -> None:
    """Let the model predict with the memory, in place. head: (V x d). share: of the memory in the mixture, 0 to 1."""
    check(anatomy)
    if not 0 <= share <= 1:
        raise TransectError(f"share={share} of the memory should be from 0 to 1")
    model = anatomy.model
    unembedding: Any = anatomy.unembedding
    remembering = Remembering(memory.final.normalized_shape[0], len(memory.ups))
    remembering.bank = memory
    mixing = Mixing(head.shape[1], head.shape[0], share)
    mixing.head.weight.data = head.detach()
    paths = {module: path for path, module in model.named_modules()}
    for led, leader, record in (
        (model.get_submodule(last_mlp(anatomy)), Noting(), anatomy.record),
        (model.base_model, remembering, record_around(model)),
        (unembedding, mixing, record_around(model)),
    ):
        surround(led, leader.to(unembedding.weight).train(led.training))
        record.set_module(f"{paths[led]}.{AROUND}", leader.describe())
    link_banks(model)


def memory_of(model: nn.Module) -> tuple[Memory, Mixing]:
    """The memory of a model and what mixes it in; set `share` of the latter to change how much it counts."""
    found = [next((m for m in model.modules() if isinstance(m, kind)), None) for kind in (Memory, Mixing)]
    if None in found:
        raise TransectError("the model has no memory: transect.memorize makes one")
    return found[0], found[1]  # type: ignore[return-value]
