"""Which expert a token takes: chosen once for each MLP and token, shared by its projections, counted for the balance.

The projections of an MLP are wrapped one by one, and know of each other only through their `Mlp`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....errors import TransectError


class Reader(Protocol):
    """A projection that goes by a choice: by adapter its settings, its factors, and a router if it has it."""

    mole_config: Any
    mole_A: Any
    mole_router_weight: Any
    mole_router_bias: Any


class Watch:
    """What the MLPs of a model have to know of its forward pass: whether one is running, and what is padding.

    It hangs on the model by hooks, so that it does not matter who calls the model: PEFT, a training loop, `generate`.
    Layers that gradient checkpointing computes again in the backward pass find no pass running, and count nothing.
    number: of the last pass. mask: its attention mask (sequences, positions), True at tokens; None if it has none.
    """

    def __init__(self) -> None:
        self.running, self.number = False, 0
        self.mask: Tensor | None = None
        self._hooks: list[Any] = []

    def attach(self, model: nn.Module) -> None:
        """Watch this model, from now on."""
        if not self._hooks:
            self._hooks = [
                model.register_forward_pre_hook(self.begin, with_kwargs=True),
                model.register_forward_hook(self.end, always_call=True),
            ]

    def detach(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A forward pass begins."""
        if arguments:
            named = dict(zip(inspect.signature(model.forward).parameters, arguments, strict=False)) | named
        mask = named.get("attention_mask")
        self.mask = mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.running, self.number = True, self.number + 1

    def end(self, *_: Any) -> None:
        """It is over, or has failed."""
        self.running, self.mask = False, None


@dataclass
class Choice:
    """The experts of the n tokens that an MLP reads.

    probabilities: (n, E), with gradient. experts: (n). of: the input, by a weak reference. waiting: the projections
    that have not used it yet.
    """

    probabilities: Tensor
    experts: Tensor
    of: weakref.ref[Tensor]
    waiting: set[Reader]

    @cached_property
    def order(self) -> Tensor:
        """(n): the tokens, those of the first expert before those of the second, and so on."""
        return self.experts.argsort(stable=True)

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of each expert."""
        return self.experts.bincount(minlength=self.probabilities.shape[1]).tolist()

    @property
    def chosen(self) -> Tensor:
        """(n, 1): the probability of each token's expert, with gradient."""
        return self.probabilities.gather(1, self.experts[:, None])


@dataclass(frozen=True)
class Use:
    """What an MLP chose when it was called in a forward pass of the model.

    number: of the pass. probabilities: (n, E), with gradient. experts: (n). kept: (n), False at padding; None if there
    is none. sequences: how many the n tokens belong to, one behind the other.
    """

    number: int
    probabilities: Tensor
    experts: Tensor
    kept: Tensor | None
    sequences: int

    def sums(self) -> Sums:
        """Over each sequence's tokens."""
        kept = torch.ones_like(self.experts, dtype=torch.bool) if self.kept is None else self.kept
        chosen = functional.one_hot(self.experts, self.probabilities.shape[1]).to(self.probabilities)
        shape = self.sequences, len(kept) // self.sequences, -1
        probabilities, chosen = (
            one.masked_fill(~kept[:, None], 0).view(*shape[:2], one.shape[1]).sum(1)
            for one in (self.probabilities, chosen)
        )
        return Sums(probabilities, chosen, kept.view(shape[:2]).sum(1))


def use_of(choice: Choice, shape: Sequence[int], watch: Watch) -> Use:
    """shape: of the MLP's input, (..., D).

    A mask of another number of positions is not this MLP's (but of the text beside an image, say, or of a cache) and is
    left aside. Without one, sequences are told by the input's first dimension if it has three, and are one if not.
    """
    count, mask = len(choice.experts), watch.mask
    if mask is None or mask.numel() != count:
        sequences, kept = shape[0] if len(shape) > 2 and count else 1, None
    else:
        sequences, kept = mask.shape[0], mask.reshape(-1).to(choice.experts.device)
    return Use(watch.number, choice.probabilities, choice.experts, kept, sequences)


class Sums(NamedTuple):
    """Over the tokens of each sequence, padding left out.

    probabilities: (sequences, E), with gradient. chosen: (sequences, E), how many tokens took an expert.
    tokens: (sequences).
    """

    probabilities: Tensor
    chosen: Tensor
    tokens: Tensor

    def whole(self) -> Sums:
        """As of one sequence."""
        return Sums(*(part.sum(0, keepdim=True) for part in self))


def added_up(sums: Sequence[Sums]) -> Sums:
    """Sequence by sequence; as of one sequence where their numbers differ."""
    if len({len(one.tokens) for one in sums}) > 1:
        sums = [one.whole() for one in sums]
    place = sums[0].tokens.device
    return Sums(*(torch.stack([part.to(place) for part in parts]).sum(0) for parts in zip(*sums, strict=True)))


def balance(layers: Sequence[Sums], pooled: bool = False) -> Tensor:
    """Σ_e c_e p_e: c_e the share of tokens sent to expert e, without gradient, p_e its mean probability. A scalar.

    By default of each layer, over all tokens, and averaged over layers (the paper's form, with means for its sums).
    pooled: of each sequence, over the tokens of all layers, and averaged over sequences (the released code's form); a
    layer may then collapse onto one expert as long as others make up for it. 1 / E at uniform use, 1 at the most.
    """
    means = [_product(added_up(layers))] if pooled else [_product(one.whole()) for one in layers]
    place = means[0].device
    return torch.stack([mean.to(place) for mean in means]).mean()


def _product(sums: Sums) -> Tensor:
    """The mean over sequences, without those that are nothing but padding."""
    probabilities, chosen, tokens = (part[sums.tokens > 0] for part in sums)
    products = (probabilities * chosen.detach()).sum(1) / tokens.square()
    return products.sum() / max(1, len(tokens))


@dataclass(eq=False)
class Mlp:
    """What the wrapped projections of one MLP share. Everything in it is by adapter.

    path: of the MLP, or of the block that it is in. uses: of the last forward pass that went through it; one, unless
    the model calls it more than once.
    """

    path: str
    watch: Watch
    layers: list[Reader] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)
    uses: dict[str, list[Use]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a model have layers, and nothing of its last forward pass."""
        return {**self.__dict__, "choices": {}, "uses": {}}

    def owner(self, name: str) -> Reader | None:
        """The projection that holds the adapter's router."""
        return next((layer for layer in self.layers if name in layer.mole_router_weight), None)

    def read(self, name: str, x: Tensor, reader: Reader) -> None:
        """Choose for x (..., D), which `reader` is about to read, unless another projection has for the same x.

        What a pass that failed or was cut short has left is not taken for it: there the reader has used its choice, or
        the input is another.
        """
        held = self.choices.get(name)
        if held is None or held.of() is not x or reader not in held.waiting:
            self.choices[name] = self.choose(name, x)

    def take(self, name: str, layer: Reader) -> Choice:
        """The choice that a projection goes by; once all have it, it is dropped."""
        held = self.choices.get(name)
        if held is None or layer not in held.waiting:
            raise TransectError(
                f"{self.path}: a projection that reads what the MLP has computed is called before those that read its "
                "input, so that no expert is chosen yet: name the projections by reads= and writes="
            )
        held.waiting.discard(layer)
        if not held.waiting:
            del self.choices[name]
        return held

    def choose(self, name: str, x: Tensor) -> Choice:
        """p = softmax(R x + b), in float32 at least: in bfloat16 near ties would fall one way or the other.

        Of equal ones the first expert is taken.
        """
        owner = self.owner(name)
        assert owner is not None  # the tuner has seen to it
        weight, bias = (held[name].to(x.device) for held in (owner.mole_router_weight, owner.mole_router_bias))
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.reshape(-1, x.shape[-1]).to(wide)
            logits = functional.linear(tokens, weight.to(wide), bias.to(wide))
            waiting = {layer for layer in self.layers if name in layer.mole_A}
            choice = Choice(logits.softmax(-1), logits.argmax(-1), weakref.ref(x), waiting)
        if self.watch.running:
            before = [use for use in self.uses.get(name, []) if use.number == self.watch.number]
            self.uses[name] = [*before, use_of(choice, x.shape, self.watch)]
        return choice

    def sums(self, name: str) -> Sums | None:
        """Of the model's last forward pass; None if it did not go through here."""
        found = [use.sums() for use in self.uses.get(name, []) if use.number == self.watch.number]
        return added_up(found) if found else None
