"""The constrained transformer (Friedman et al. 2023, Section 3): a stream of variables, each read and written whole.

Shapes: variables first, so that a choice among them is one product. The categorical stream is (m, B, T, v), the
numerical one (n, B, T); every module puts its variables behind those that are there, which never change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from ....errors import TransectError
from .sampling import Sample, largest

UNIT = 10_000  # a hardened classifier's weights are whole numbers of so many to a nat
_HIDES = -1e30  # logit of a position that is not to be seen


@dataclass(frozen=True)
class Sizes:
    """vocabulary, labels: how many words and labels there are; word 0 is padding. length: of the longest sequence.

    values: v, how many values a categorical variable has. layers: each with so many categorical `heads`,
    `numerical_heads`, `mlps` of two categorical and `numerical_mlps` of two numerical variables, of `hidden` neurons.
    causal: whether a position sees only itself and those before it.
    """

    vocabulary: int
    labels: int
    length: int
    values: int
    layers: int = 2
    heads: int = 4
    numerical_heads: int = 4
    mlps: int = 2
    numerical_mlps: int = 2
    hidden: int = 64
    causal: bool = False

    def __post_init__(self) -> None:
        least = max(self.vocabulary, self.length)
        if self.values < least:
            raise TransectError(
                f"a variable of {self.values} values cannot hold each of {self.vocabulary} words and {self.length} "
                f"positions: values must be {least} or more"
            )

    @property
    def added(self) -> int:
        """Categorical variables that a layer adds."""
        return self.heads + self.mlps + self.numerical_mlps

    @property
    def categorical(self) -> int:
        """Categorical variables in the end: word, position, and what the layers add."""
        return 2 + self.layers * self.added

    @property
    def numerical(self) -> int:
        """Numerical variables in the end: the ones, and a count a numerical head."""
        return 1 + self.layers * self.numerical_heads


class Lookups(nn.Module):
    """MLPs side by side, each from two variables of the stream to a new categorical one: a table, once hardened.

    variables: how many there are to read; width: numbers of each, v or 1.
    """

    def __init__(self, count: int, variables: int, width: int, hidden: int, values: int) -> None:
        super().__init__()
        self.reads = nn.Parameter(torch.randn(count, 2, variables) / variables**0.5)
        self.into = nn.Parameter(torch.randn(count, 2 * width, hidden) / hidden**0.5)
        self.into_bias = nn.Parameter(torch.zeros(count, 1, hidden))
        self.out = nn.Parameter(torch.randn(count, hidden, values) / values**0.5)
        self.out_bias = nn.Parameter(torch.zeros(count, 1, values))

    def forward(self, stream: Tensor, sample: Sample) -> Tensor:
        """stream: (variables, B, T, width). The new variables (count, B, T, v)."""
        shape = stream.shape[1:3]
        read = (sample(self.reads) @ stream.flatten(1)).unflatten(-1, (-1, stream.shape[3]))  # (count, 2, BT, width)
        return sample(self.logits(read.transpose(1, 2).flatten(2))).unflatten(1, shape)

    def logits(self, read: Tensor, which: int | slice = slice(None)) -> Tensor:
        """Of each value of the new variables (count, N, v), from both variables side by side (count, N, 2 width).

        which: an index for one of them alone, without the first dimension.
        The paper's log-softmax behind it is left out: no sample depends on what is added to all logits.
        """
        hidden = torch.relu_(read @ self.into[which] + self.into_bias[which])
        return hidden @ self.out[which] + self.out_bias[which]


class Block(nn.Module):
    """One layer. categorical, numerical: how many variables there are before it."""

    def __init__(self, sizes: Sizes, categorical: int, numerical: int) -> None:
        super().__init__()
        self.heads, self.both = sizes.heads, sizes.heads + sizes.numerical_heads
        v = sizes.values
        # a row a read variable: the queries of all heads, their keys, the values of the categorical ones
        self.reads = nn.Parameter(torch.randn(2 * self.both + self.heads, categorical) / categorical**0.5)
        self.predicates = nn.Parameter(torch.randn(self.both, v, v) / v**0.5)  # of a query's value, the key's
        self.counted = nn.Parameter(torch.randn(sizes.numerical_heads, numerical) / numerical**0.5)
        self.mlps = Lookups(sizes.mlps, categorical + sizes.heads, v, sizes.hidden, v)
        self.numerical_mlps = Lookups(
            sizes.numerical_mlps, numerical + sizes.numerical_heads, 1, sizes.hidden, v
        )  # fmt: skip

    def forward(
        self, categorical: Tensor, numerical: Tensor, visible: Tensor, bias: Tensor, sample: Sample
    ) -> tuple[Tensor, Tensor]:
        """Both streams with the layer's variables behind. visible: (B, T, T), queries by keys; bias: (T, T)."""
        shape = categorical.shape[1:]
        read = (sample(self.reads) @ categorical.flatten(1)).unflatten(1, shape)
        queries, keys, values = read.split([self.both, self.both, self.heads])
        wanted = (queries.flatten(1, 2) @ sample(self.predicates)).unflatten(1, shape[:2])
        matches = wanted @ keys.mT  # (heads, B, T, T)
        found = sample(nearest(matches[: self.heads], visible, bias) / shape[-1] ** 0.5) @ values
        counted = (sample(self.counted) @ numerical.flatten(1)).unflatten(1, shape[:2])
        sums = (matches[self.heads :].masked_fill(~visible, 0) @ counted[..., None])[..., 0]
        categorical, numerical = torch.cat([categorical, found]), torch.cat([numerical, sums])
        new = self.mlps(categorical, sample), self.numerical_mlps(numerical[..., None], sample)
        return torch.cat([categorical, *new]), numerical


def nearest(matches: Tensor, visible: Tensor, bias: Tensor) -> Tensor:
    """Logits by which a query attends to the nearest key that matches, and to position 0 where none does.

    matches: (heads, B, T, T), 1 where the key is what the query's predicate wants. visible: (B, T, T). bias: (T, T).
    A query that may see nothing, as padding, has equal logits everywhere, of which the first is the largest.
    """
    total = matches.masked_fill(~visible, 0).sum(-1, keepdim=True)
    fallback = torch.relu(1 - total / (total + 1e-10))
    matches = torch.cat([matches[..., :1] + fallback, matches[..., 1:]], -1)
    return ((matches + 1e-20).log() + bias).masked_fill(~visible, _HIDES)


def relative_bias(length: int) -> Tensor:
    """What a query at i adds to the logit of a key at j (length, length); the nearer the more.

    -2 for itself; for a later key -(d - 1)/(n - 2), for an earlier one -(d - 1)/(n - 1) at distance d: 0 for both
    neighbours, of which the first is then taken, and from d = 2 on the earlier of two is the nearer.
    """
    place = torch.arange(length, dtype=torch.float64)
    ahead = place - place[:, None]
    behind = (ahead.abs() - 1) / max(1, length - 1)
    return torch.where(ahead > 0, (1 - ahead) / max(1, length - 2), -behind).fill_diagonal_(-2)


class ProgramModel(nn.Module):
    """Labels for words. seed: of its random numbers.

    In its first categorical variables are the word and the position, in its first numerical one the number 1.
    """

    bias: Tensor
    embedding: Tensor
    sizes_stored: Tensor
    unit: Tensor

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        super().__init__()
        self.sizes = sizes
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(
                Block(sizes, 2 + i * sizes.added, 1 + i * sizes.numerical_heads) for i in range(sizes.layers)
            )
            scale = sizes.labels**-0.5
            self.classifier = nn.Parameter(torch.randn(sizes.categorical, sizes.values, sizes.labels) * scale)
            self.numerical_classifier = nn.Parameter(torch.randn(sizes.numerical, sizes.labels) * scale)
        for one in self.parameters():
            one.requires_grad_(one.numel() > 0)  # where there are no heads or MLPs of a kind
        self.register_buffer("embedding", 20 * torch.eye(sizes.vocabulary, sizes.values) - 10, persistent=False)
        self.register_buffer("bias", relative_bias(sizes.length).float(), persistent=False)
        self.register_buffer("sizes_stored", torch.tensor([int(one) for one in astuple(sizes)]))
        self.register_buffer("unit", torch.tensor(1.0))  # of the classifier's weights, to a nat

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ProgramModel:
        """The model whose `state_dict` is among these tensors, such as those of a file in a study's `made`.

        Raises TransectError where it is not.
        """
        if "sizes_stored" not in tensors:
            raise TransectError(f"these tensors are of no transformer program: {', '.join(tensors)[:200]}")
        *numbers, causal = tensors["sizes_stored"].tolist()
        model = cls(Sizes(*numbers, causal=bool(causal)))
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
        return model

    def stream(self, ids: Tensor, sample: Sample = largest) -> tuple[Tensor, Tensor]:
        """All variables behind the last layer: (m, B, T, v) and (n, B, T). ids: (B, T), 0 for padding."""
        count, length = ids.shape
        if length > self.sizes.length:
            raise TransectError(f"a sequence has {length} words, and this model has {self.sizes.length} positions")
        words = sample(self.embedding)[ids]
        places = torch.eye(self.sizes.length, self.sizes.values).to(words)[:length].expand(count, -1, -1)
        categorical, numerical = torch.stack([words, places]), torch.ones_like(words[None, ..., 0])
        real = ids != 0
        visible = real[:, :, None] & real[:, None]
        if self.sizes.causal:
            visible = visible.tril()
        for block in self.blocks:
            bias = self.bias[:length, :length]
            categorical, numerical = block(categorical, numerical, visible, bias, sample)
        return categorical, numerical

    def forward(self, ids: Tensor, sample: Sample = largest) -> Tensor:
        """Logits of the labels (B, T, labels) in nats: linear in all variables. sample: how every choice is made."""
        categorical, numerical = self.stream(ids, sample)
        summed = torch.einsum("mbtv,mvc->btc", categorical, self.classifier)
        return (summed + torch.einsum("nbt,nc->btc", numerical, self.numerical_classifier)) / self.unit


def hardened(model: ProgramModel) -> ProgramModel:
    """A copy to be run with every choice its largest: in float64, and the classifier in whole `UNIT`s of a nat.

    So sums of weights are exact in any order, and a program that adds the same whole numbers decides as the model does,
    also where two labels are equal.
    """
    made = copy.deepcopy(model).cpu().double()
    with torch.no_grad():
        for weights in (made.classifier, made.numerical_classifier):
            weights.mul_(UNIT / made.unit).round_()
        made.unit.fill_(UNIT)
    return made.eval().requires_grad_(False)


@torch.no_grad()
def predicted(model: ProgramModel, ids: Tensor, sample: Sample = largest, batch: int = 1024) -> Tensor:
    """The label of every position (N, T), on the CPU; at padding it means nothing."""
    rows = [model(part.to(model.unit.device), sample).argmax(-1).cpu() for part in ids.split(batch)]
    return torch.cat(rows)


def agreement(one: Tensor, other: Tensor, where: Tensor) -> float:
    """The share of the places that `where` (N, T) holds at which two predictions are the same."""
    return float((one == other)[where].double().mean())
