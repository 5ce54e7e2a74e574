"""What a part is: a module that stands in a slot of a block, and says what it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import TransectError
from ..operators.base import Described


class Part(Described):
    """A module that stands in a slot.

    A subclass has a `kind` ("SLOT.NAME"), a `paper`, and a `limit`: in a sentence, when it is the standard part, or
    that it never is. Its `__init__` takes the sizes that it needs by name (see `Sizes` for those there are) and,
    keyword-only and with a default, its settings, which its docstring lists as `name: text`. They are what it is
    described by.
    """

    slot: ClassVar[str]
    paper: ClassVar[str]
    limit: ClassVar[str]
    # Role (q, k, v, o, gate, up, down) -> path of a linear layer in it that does what such a matrix does: q, k, v, gate
    # and up read the part's input, and nothing else; o's and down's output is the part's.
    roles: ClassVar[dict[str, str]] = {}
    images: ClassVar[bool] = False  # whether it stands in models of images alone

    made_with: dict[str, Any]

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "__init__" in vars(cls):
            cls.__init__ = _noting(cls.__init__)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.made_with}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Part:
        return cls(**{key: value for key, value in description.items() if key != "kind"})

    @property
    def acts_behind(self) -> int:
        """How many first positions of a sequence need not show what it does to those behind them, such as a window."""
        return 0

    @property
    def flops(self) -> int:
        """Floating point operations (a multiply-add counts 2) for one position, but for those that depend on length."""
        return sum(2 * module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))


def _noting(init: Any) -> Any:
    """The constructor, which also keeps what the part was made with."""

    @functools.wraps(init)
    def noting(self: Part, *args: Any, **kwargs: Any) -> None:
        if "made_with" not in self.__dict__:  # not of a class that this one derives from
            bound = inspect.signature(init).bind(self, *args, **kwargs)
            bound.apply_defaults()
            self.__dict__["made_with"] = {name: value for name, value in bound.arguments.items() if name != "self"}
        init(self, *args, **kwargs)

    return noting


@dataclass
class Around:
    """What a mixer may know besides its input x (B x N x d).

    real: (B x N), false at padding; None where there is none. rotary: cos and sin (B x N x head size, or the part of it
    that is turned) of the model's own rotary positions, or None. past: positions before these. state: what the mixer
    keeps from call to call in generation, tensors by name with the batch in their first dimension, empty at the
    beginning; None where nothing is generated.
    """

    real: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    past: int = 0
    state: dict[str, Tensor] | None = None


class Mixer(Part):
    """A token mixer: x (B x N x d) -> (B x N x d). What is at padding comes out of it as anything, and goes nowhere.

    causal: whether position i must not see what is behind it. A subclass says which of both it can be (`causal`,
    `bidirectional`), its `cost` in the number of positions N, and defines `mix`; one that can go on from a state of its
    own, in cost constant in N, sets `recurrent` and reads and writes `around.state`. For the others the inputs so far
    are the state, and are mixed again in each call.
    """

    slot = "mixer"
    can_be: ClassVar[tuple[str, ...]] = ("causal", "bidirectional")
    cost: ClassVar[str]
    recurrent: ClassVar[bool] = False

    def __init__(self, causal: bool) -> None:
        super().__init__()
        kind = "causal" if causal else "bidirectional"
        if kind not in self.can_be:
            raise TransectError(f"{self.kind} cannot be {kind}, which this model needs; it is {self.can_be[0]}")
        self.causal = causal

    @property
    def acts_behind(self) -> int:
        return int(self.made_with.get("window", 0))

    def mix(self, x: Tensor, around: Around) -> Tensor:
        """What is added to the stream (B x N x d)."""
        raise NotImplementedError

    def forward(self, x: Tensor, around: Around) -> Tensor:
        if around.state is None or self.recurrent:
            return self.mix(x, around)
        return self.mix(*self._with_past(x, around))[:, -x.shape[1] :]

    def mixing_flops(self, length: int) -> int:
        """Floating point operations for a sequence of that length besides `flops` for each of its positions."""
        raise NotImplementedError

    def _with_past(self, x: Tensor, around: Around) -> tuple[Tensor, Around]:
        """All inputs so far, which are kept, with what is around them."""
        state = around.state
        assert state is not None
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if around.real is None else around.real
        new = {"inputs": x, "real": real}
        if around.rotary is not None:
            new |= {"cos": _for_each(around.rotary[0], x), "sin": _for_each(around.rotary[1], x)}
        for name, tensor in new.items():
            state[name] = torch.cat([state[name], tensor], dim=1) if name in state else tensor
        rotary = (state["cos"], state["sin"]) if around.rotary is not None else None
        seen = state["real"]
        return state["inputs"], Around(None if bool(seen.all()) else seen, rotary)


def _for_each(angles: Tensor, x: Tensor) -> Tensor:
    """Angles (1 or B x N x ...) for each sequence of the batch."""
    return angles.expand(x.shape[0], *angles.shape[1:])


class MLPPart(Part):
    """A channel mixer: x (..., d) -> (..., d), each position by itself."""

    slot = "mlp"


class Activation(Part):
    """A function between up and down: (..., neurons) -> (..., neurons)."""

    slot = "activation"
    of_neurons: ClassVar[bool] = False  # whether it depends on which neurons are there, so that none can be taken away


class Norm(Part):
    """A norm: x (..., d) -> (..., d)."""

    slot = "norm"


class MatrixPart(Part):
    """A map of vectors: x (..., inputs) -> (..., outputs). One that is a matrix is an operator instead.

    bias: whether the matrix that it stands for has one.
    """

    slot = "matrix"

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.has_bias = inputs, outputs, bias
        self.register_buffer("weight", torch.empty(0))  # under the name of the matrix that is gone: see Operator


@dataclass
class Inside:
    """What a part around a block may call, each with the block's own further arguments (masks, positions, cache).

    block: the stream (B x N x d) -> the stream behind the block. attention, mlp: what these modules make of an input,
    without norms and sums; None where the block has no such module. norms: the block's, in order. real: (B x N), false
    at padding, or None where there is none, when called. masked: as `block`, but positions that are false in its second
    argument (B x N) are seen by none.

    For a part that `routes` also: on: the stream, which positions of each sequence the block is run on (B x N), and
    perhaps by what is multiplied what its MLP adds at each position (B x N) -> the stream, elsewhere as it came;
    padding is never run. Called once at most in a call. state: what the part keeps from call to call in generation, as
    a mixer's (see `Around`). past: positions before these. forget: drops what the block has cached of some
    sequences (B).
    """

    block: Callable[[Tensor], Tensor]
    attention: Callable[[Tensor], Tensor] | None
    mlp: Callable[[Tensor], Tensor] | None
    norms: list[nn.Module]
    real: Callable[[], Tensor | None]
    masked: Callable[[Tensor, Tensor], Tensor]
    on: Callable[..., Tensor] | None = None
    state: dict[str, Tensor] | None = None
    past: int = 0
    forget: Callable[[Tensor], None] | None = None


class BlockPart(Part):
    """Stands around a whole block: x (B x N x d) -> (B x N x d), with the block at hand in any way it likes.

    `limit` says what it does when all is routed through the block, or its memory is zero. Positions must not be mixed
    but by the block itself, so that generation with a cache stays what it is.
    """

    slot = "block"
    # Whether it runs attention and MLP in the block's place, with norms where it wants them, and does nothing else. It
    # fits blocks that norm once in front of each of both and add what they give; and may be named as a norm is.
    places_norms: ClassVar[bool] = False
    # Whether it calls attention and MLP behind the block's norms by itself, and does more; it fits the same blocks.
    runs_sublayers: ClassVar[bool] = False
    post_norm: ClassVar[bool] = False  # whether its norms stand behind the residual sum, so that the stream is normed
    # Whether it runs the block on some positions only (`Inside.on`) or keeps a state; it does not call `Inside.block`.
    routes: ClassVar[bool] = False

    def placed(self, norms: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """The norms by their places (see `Block.norms`) with this part around, from the block's own."""
        return norms

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        """The stream behind the block."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sizes:
    """What a part may ask for by name.

    width: d of the stream. heads, key_value_heads, head_size: of the attention that the config describes.
    neurons: of the MLP. length: the most positions that the model takes. causal: whether it predicts the next token.
    layer: number of the block, from 0. layers: how many there are. place, places: number of the part's block among
    those that get it together, from 0, and how many they are; first: the number in the model of the first of them.
    eps: of the model's norms. inputs, outputs, bias: of the matrix that the part stands for, where it stands for one.
    """

    width: int
    heads: int
    key_value_heads: int
    head_size: int
    neurons: int
    length: int
    causal: bool
    layer: int = 0
    layers: int = 1
    place: int = 0
    places: int = 1
    first: int = 0
    eps: float = 1e-6
    inputs: int = 0
    outputs: int = 0
    bias: bool = False
