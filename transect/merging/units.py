"""What can change places in a transformer without changing its function, as units of two models that fit.

The neurons of every MLP and of every expert; the heads of every attention, key/value heads with their groups and query
heads within a group; the channels within a value head, and within a query-key head where positions are not turned and
queries and keys are not normalised; the channels of the residual stream, one order for the whole model, where all that
touches the stream is known. Not: heads whose number enters what they compute (ALiBi), and experts among themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Attention, Experts, Matrix
from ..anatomy.storage import is_dense
from ..anatomy.surround import Surrounded
from ..errors import TransectError
from .matching import RowUnit, Unit, assign

READERS = ("q", "k", "v", "gate", "up")  # their columns are the stream's channels; rows those of o and down


def refuse_unmatchable(anatomy: Anatomy, name: str) -> None:
    """TransectError where the units of a model cannot be told: parts, or matrices that are not stored as such."""
    for block in anatomy.blocks:
        parts = [unit for unit in ("attention", "mlp") if block.has_part(unit)]
        if parts or isinstance(block.module, Surrounded):
            where = f"in the place of its {parts[0]}" if parts else "around it"
            raise TransectError(
                f"block {block.index} of {name} has a part {where}, of which it is not known what can change places: "
                "models with parts can only be averaged as they are"
            )
        for matrix in block.matrices():
            if not is_dense(matrix.module) and not isinstance(block.mlp, Experts):
                raise TransectError(f"{matrix.name} of {name} is stored as {type(matrix.module).__name__}, not whole")


def units_of(a: Anatomy, b: Anatomy) -> list[Unit]:
    """All units, in which B's things are changed in place and A's are what they are compared with."""
    found: list[Unit] = []
    for one, other in zip(a.blocks, b.blocks, strict=True):
        if isinstance(one.mlp, Experts) and isinstance(other.mlp, Experts):
            pairs: list[Any] = list(zip(one.mlp.experts, other.mlp.experts, strict=True))
            if one.mlp.shared is not None:
                pairs.append((one.mlp.shared, other.mlp.shared))
            found += [Neurons(*pair, place=f"{one.index}.mlp.{number}") for number, pair in enumerate(pairs)]
        elif one.mlp is not None and one.mlp.can_narrow:  # type: ignore[union-attr]
            found.append(Neurons(one.mlp, other.mlp, place=f"{one.index}.mlp"))
        if one.attention is not None and other.attention is not None and not _unknown(a, one.index):
            found += _of_attention(one.attention, other.attention, one.index)
    stream = residual_places(a)
    return found if stream is None else [*found, Stream(a, b, stream)]


def _of_attention(a: Attention, b: Attention, index: int) -> Iterator[Unit]:
    place, block = f"{index}.attention", a.block
    if a.heads > 1 and not block.anatomy.architecture.head_bias:
        yield Heads(a, b, place)
    turned = block.rotary_width > 0 or a.q_norm is not None or a.k_norm is not None
    for head in range(a.key_value_heads):
        yield Channels(a, b, place, head, "value")
        if not turned:
            yield Channels(a, b, place, head, "key")


class Neurons(RowUnit):
    """The hidden units of an MLP or an expert: rows of gate and up with their biases, columns of down."""

    def __init__(self, a: Any, b: Any, place: str) -> None:
        self.a, self.b, self.place = a, b, place

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Each neurons x something."""
        return list(zip(_of_neurons(self.a), _of_neurons(self.b), strict=True))

    def put(self, order: Sequence[int]) -> None:
        """Re-order them in B."""
        self.b.keep(order)


def _of_neurons(mlp: Any) -> list[Tensor]:
    found = [mlp.down.weight.T]
    for matrix in (mlp.up, mlp.gate):
        if matrix is not None:
            found += _with_bias(matrix)
    return found


def _with_bias(matrix: Matrix) -> list[Tensor]:
    bias = None if isinstance(matrix.module, Tensor) else getattr(matrix.module, "bias", None)
    return [matrix.weight] if bias is None else [matrix.weight, matrix.bias[:, None]]  # type: ignore[index]


class Heads:
    """The heads of an attention: key/value heads with the query heads that use them, and those within each group.

    For every pair of key/value heads of A and B the best order of their query heads is an assignment; with these sums
    the order of the key/value heads is one too, so that both together are at their best.
    """

    def __init__(self, a: Attention, b: Attention, place: str) -> None:
        self.a, self.b, self.place = a, b, place

    @property
    def count(self) -> int:
        """Query heads."""
        return self.a.heads

    def best(self) -> tuple[list[int], float]:
        """See `Unit`; an order of query heads."""
        groups = self.a.key_value_heads
        size = self.a.heads // groups
        queries = _rows_of(self.a, "qo", self.a.heads) @ _rows_of(self.b, "qo", self.a.heads).T
        keys = _rows_of(self.a, "kv", groups) @ _rows_of(self.b, "kv", groups).T  # groups x groups
        table = queries.view(groups, size, groups, size).transpose(1, 2)  # groups of A x groups of B x size x size
        before = float(keys.trace() + queries.trace())
        inner = {}
        total = keys.clone()
        for i in range(groups):
            for j in range(groups):
                order, gain = assign(table[i, j])
                inner[i, j] = order
                total[i, j] += table[i, j].trace() + gain
        outer, gain = assign(total)
        heads = [j * size + member for i, j in enumerate(outer) for member in inner[i, j]]
        if heads == list(range(len(heads))):
            return heads, 0.0
        return heads, float(total.trace()) + gain - before

    def put(self, order: Sequence[int]) -> None:
        """Re-order them in B."""
        self.b.keep(order)


def _rows_of(attention: Attention, which: str, heads: int) -> Tensor:
    """All numbers of each head, in float64 (heads x numbers): of q and o, or of k and v."""
    found = []
    for role in which:
        matrix: Matrix = getattr(attention, role)
        tensors = [matrix.weight.T] if role == "o" else _with_bias(matrix)
        norm = {"q": attention.q_norm, "k": attention.k_norm}.get(role)
        scale: Any = getattr(norm, "weight", None)
        if scale is not None and scale.numel() == matrix.shape[0] != attention.head_size:
            tensors = [*tensors, scale.detach().reshape(-1, 1)]  # a norm over all heads, or one for each
        found += [tensor.double().reshape(heads, -1) for tensor in tensors]
    return torch.cat(found, dim=1)


class Channels(RowUnit):
    """The channels within one key/value head: of its values (v's rows, o's columns), or its keys (k's and q's rows)."""

    def __init__(self, a: Attention, b: Attention, place: str, head: int, kind: str) -> None:
        self.a, self.b, self.place, self.head, self.kind = a, b, place, head, kind

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Each head size x something."""
        return list(zip(self._tensors(self.a), self._tensors(self.b), strict=True))

    def _places(self) -> dict[str, Tensor]:
        """Role -> numbers of the head's rows (of o, columns): heads that have this role x head size."""
        size = self.a.head_size
        group = self.a.heads // self.a.key_value_heads
        of_queries = torch.arange(self.head * group * size, (self.head + 1) * group * size).view(group, size)
        own = torch.arange(self.head * size, (self.head + 1) * size).view(1, size)
        return {"v": own, "o": of_queries} if self.kind == "value" else {"k": own, "q": of_queries}

    def _tensors(self, attention: Attention) -> list[Tensor]:
        found = []
        for role, places in self._places().items():
            matrix: Matrix = getattr(attention, role)
            for tensor in [matrix.weight.T] if role == "o" else _with_bias(matrix):
                found.append(tensor[places].transpose(0, 1).flatten(1))  # head size x (heads x rest)
        return found

    def put(self, order: Sequence[int]) -> None:
        """Re-order them in B."""
        for role, places in self._places().items():
            matrix: Matrix = getattr(self.b, role)
            index = torch.arange(matrix.shape[1 if role == "o" else 0])
            index[places] = places[:, torch.as_tensor(order)]
            if role == "o":
                matrix.write(matrix.weight[:, index])
            else:
                matrix.write(matrix.weight[index], None if matrix.bias is None else matrix.bias[index])


@dataclass(frozen=True)
class Place:
    """A tensor that has the stream's channels on an axis.

    read: its values with that axis first, of a model. write: put them in an order, in a model.
    """

    read: Callable[[Anatomy], Tensor]
    write: Callable[[Anatomy, Tensor], None]


class Stream(RowUnit):
    """The channels of the residual stream: one order for everything that reads from it or adds to it."""

    place = ""

    def __init__(self, a: Anatomy, b: Anatomy, places: Sequence[Place]) -> None:
        self.a, self.b, self.places = a, b, places

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Each hidden x something."""
        return [(place.read(self.a), place.read(self.b)) for place in self.places]

    @property
    def count(self) -> int:
        """Channels."""
        return len(self.places[0].read(self.a))

    def put(self, order: Sequence[int]) -> None:
        """Re-order them in B."""
        for place in self.places:
            place.write(self.b, torch.as_tensor(order))


def residual_places(anatomy: Anatomy) -> list[Place] | None:
    """Everything that has the stream's channels on an axis; None where there is a tensor of which that is not known.

    The stream can be re-ordered where its norms scale channel by channel, as LayerNorm and RMSNorm do, no map of the
    stream into itself stands outside the blocks, and no position is encoded by the number of a channel.
    """
    hidden = anatomy.config_value("hidden")
    blocks = {id(module) for module in anatomy.block_list.modules()}
    found: list[Place] = []
    for block in anatomy.blocks:
        if _unknown(anatomy, block.index) or isinstance(block.mlp, Experts):
            return None
        for matrix in block.matrices():
            found.append(_of_matrix(block.index, matrix.role))
            if matrix.role in ("o", "down") and matrix.bias is not None:
                found.append(_of_bias(block.index, matrix.role))
    names = {id(tensor): name for name, tensor in anatomy.model.named_parameters()}
    norms = {
        id(norm): norm for block in anatomy.blocks for norm in block.norms.values()
    }  # one may serve both sublayers
    for norm in norms.values():
        for tensor in norm.parameters():
            if tuple(tensor.shape) != (hidden,):
                return None
            found.append(_of_parameter(names[id(tensor)], 0))
    done: set[int] = set()
    for module in anatomy.model.modules():
        if id(module) in blocks:
            continue
        if any(hidden in tensor.shape for tensor in module.buffers(recurse=False)):
            return None  # positions that are sines of the channel's number
        for tensor in module.parameters(recurse=False):
            if id(tensor) in done:
                continue
            done.add(id(tensor))
            axis = _axis(anatomy, module, tensor, hidden)
            if axis is None:
                return None
            if axis >= 0:
                found.append(_of_parameter(names[id(tensor)], axis))
    return found


def _axis(anatomy: Anatomy, module: nn.Module, tensor: Tensor, hidden: int) -> int | None:
    """On which axis of a tensor outside the blocks the stream's channels are; -1 for none, None if it is not known."""
    if isinstance(module, nn.Embedding) or module is anatomy.unembedding:
        if tensor.dim() == 2:
            return 1 if tensor.shape[1] == hidden else None
        return -1  # a bias of the logits
    return 0 if tuple(tensor.shape) == (hidden,) and not isinstance(module, nn.Linear) else None


def _unknown(anatomy: Anatomy, index: int) -> bool:
    """Whether a block, but for a mixture of experts, has parameters that belong to no matrix and no norm."""
    block, architecture = anatomy.blocks[index], anatomy.architecture
    known = {id(tensor) for matrix in block.matrices() for tensor in getattr(matrix.module, "parameters", list)()}
    norms = list(block.norms.values())
    if block.attention is not None:
        norms += [norm for norm in (block.attention.q_norm, block.attention.k_norm) if norm is not None]
    known |= {id(tensor) for norm in norms for tensor in norm.parameters()}
    names = {f"{architecture.attention}.{name}" for name in architecture.head_parameters}
    mixture = "" if architecture.experts is None else architecture.experts.module + "."
    for name, tensor in block.module.named_parameters():
        inside = mixture and name.startswith(mixture) and block.has_experts
        if id(tensor) not in known and name not in names and not inside:
            return True
    return False


def _of_matrix(index: int, role: str) -> Place:
    def read(anatomy: Anatomy) -> Tensor:
        weight = anatomy.blocks[index].matrix(role).weight
        return weight.T if role in READERS else weight

    def write(anatomy: Anatomy, order: Tensor) -> None:
        matrix = anatomy.blocks[index].matrix(role)
        matrix.write(matrix.weight[:, order] if role in READERS else matrix.weight[order])

    return Place(read, write)


def _of_bias(index: int, role: str) -> Place:
    def read(anatomy: Anatomy) -> Tensor:
        bias = anatomy.blocks[index].matrix(role).bias
        assert bias is not None
        return bias[:, None]

    def write(anatomy: Anatomy, order: Tensor) -> None:
        matrix = anatomy.blocks[index].matrix(role)
        assert matrix.bias is not None
        matrix.write(matrix.weight, matrix.bias[order])

    return Place(read, write)


def _of_parameter(name: str, axis: int) -> Place:
    def read(anatomy: Anatomy) -> Tensor:
        tensor = anatomy.model.get_parameter(name).detach().movedim(axis, 0)
        return tensor.reshape(len(tensor), -1)

    def write(anatomy: Anatomy, order: Tensor) -> None:
        tensor = anatomy.model.get_parameter(name)
        with torch.no_grad():
            tensor.copy_(tensor.index_select(axis, order.to(tensor.device)))

    return Place(read, write)
