"""A mixture of experts as a unit of a block: a router, experts with gate, up and down, and one that all tokens pass."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotApplicable, TransectError
from .banks import hand_over_banks
from .experts import EXPERT_ROLES, SeparateExperts, SkipExperts, apart, check_layout, expert_view, separate
from .matrix import Matrix
from .record import record_of
from .storage import describe, is_dense, select
from .surgery import set_attribute


@dataclass(frozen=True)
class ExpertMatrix(Matrix):
    """A matrix of one expert. Its input is that of the positions which the router sends to the expert, and no others.

    path: of the module that holds all experts. expert: its number.
    """

    expert: int = 0

    @property
    def unit(self) -> str:
        return f"mlp.experts.{self.expert}"

    @property
    def module(self) -> Any:
        """The module that holds this matrix alone; made for the occasion where it is stored with others."""
        host = self.host
        if isinstance(host, SeparateExperts):
            return host.each[self.expert][self.role]  # type: ignore[index]
        return expert_view(host, self.expert, self.role)

    def place(self, operator: nn.Module) -> None:
        host = self.host
        if not isinstance(host, SeparateExperts):
            host = separate(host, activation_of(self.block))
            self.block.model.set_submodule(self.path, host)
        host.each[self.expert][self.role] = operator  # type: ignore[index]


@dataclass(frozen=True)
class SharedExpertMatrix(Matrix):
    """A matrix of the expert that every token passes."""

    @property
    def unit(self) -> str:
        return "mlp.shared"


def activation_of(block: Any) -> str:
    """Transformers' name of the function between an expert's gate and down."""
    return getattr(block.anatomy.config, block.anatomy.architecture.experts.activation)


def experts_apart(matrices: Iterable[Matrix]) -> AbstractContextManager[None]:
    """Inside the `with`, the modules of those matrices that belong to experts can be listened to."""
    found = [matrix for matrix in matrices if isinstance(matrix, ExpertMatrix)]
    hosts = {matrix.path: activation_of(matrix.block) for matrix in found}
    return apart(found[0].block.model if found else nn.Module(), hosts)


class Expert:
    """One expert of a mixture: down(activation(gate x) * up x). Its hidden units are neurons.

    gate, up, down: its matrices.
    """

    def __init__(self, gate: Matrix, up: Matrix, down: Matrix) -> None:
        self.gate, self.up, self.down = gate, up, down

    @property
    def neurons(self) -> int:
        """Number of hidden units."""
        return self.up.shape[0]

    def keep(self, neurons: Iterable[int]) -> None:
        """Keep these neurons, in this order (so a permutation is a special case).

        Experts that are stored in one tensor have equally many: where some go, every expert of the block gets modules
        of its own.
        """
        kept = torch.as_tensor(list(neurons), dtype=torch.long)
        if kept.numel() == 0:
            raise TransectError("at least one neuron must be kept; to remove an expert use experts.keep()")
        if kept.unique().numel() != kept.numel() or int(kept.min()) < 0 or int(kept.max()) >= self.neurons:
            raise TransectError(f"neurons to keep must be distinct numbers from 0 to {self.neurons - 1}")
        cut = {
            matrix: (None, kept) if matrix is self.down else (kept, None) for matrix in (self.gate, self.up, self.down)
        }
        if len(kept) == self.neurons and all(is_dense(matrix.module) for matrix in cut):
            for matrix, (rows, columns) in cut.items():
                matrix.write(matrix.weight[:, columns] if rows is None else matrix.weight[rows])
            return
        for matrix, (rows, columns) in cut.items():
            matrix.place(select(matrix.module, rows, columns))
            record_of(matrix.block.model).set_module(matrix.path, describe(matrix.host))


class Experts:
    """An MLP sublayer that is a mixture of experts: a router sends every token to some of them.

    It has no gate, up, down and neurons of its own: asking for them raises NotApplicable.
    """

    def __init__(self, block: Any) -> None:
        self.block = block
        self.paths = block.anatomy.architecture.experts
        self.path = f"{block.path}.{self.paths.experts}"
        if not isinstance(self.host, SeparateExperts):
            check_layout(self.host, self.path)

    @property
    def name(self) -> str:
        """Such as `blocks.3.mlp.experts`."""
        return f"blocks.{self.block.index}.mlp.experts"

    @property
    def experts(self) -> list[Expert]:
        """Those that the router chooses from."""
        return [
            Expert(*(ExpertMatrix(self.block, role, self.path, expert=number) for role in EXPERT_ROLES))
            for number in range(self.host.num_experts)
        ]

    @property
    def shared(self) -> Expert | None:
        """The one that every token passes too, or None."""
        paths = {role: f"{self.block.path}.{path}" for role, path in self.paths.shared.items()}
        if not paths or not has_module(self.block.model, paths["up"]):
            return None
        return Expert(*(SharedExpertMatrix(self.block, role, paths[role]) for role in EXPERT_ROLES))

    @property
    def module(self) -> nn.Module:
        """The model's own module of the sublayer: what it puts out is added to the residual stream."""
        return self.block.module.get_submodule(self.paths.module)

    @property
    def router(self) -> Any:
        """The module that chooses experts; row e of its weight (experts x d) speaks for expert e."""
        return self.block.module.get_submodule(self.paths.router)

    @property
    def host(self) -> Any:
        """The module that holds the experts: called with the positions, their experts, and the weights of these."""
        return self.block.model.get_submodule(self.path)

    @property
    def chosen(self) -> int:
        """How many experts a token is sent to."""
        return self.router.top_k

    def matrices(self) -> list[Matrix]:
        """Gate, up and down of every expert, the shared one last."""
        every = [*self.experts, *([] if self.shared is None else [self.shared])]
        return [matrix for expert in every for matrix in (expert.gate, expert.up, expert.down)]

    def keep(self, experts: Iterable[int]) -> None:
        """Keep these experts, in this order (so a permutation is a special case); the router forgets the others.

        A token that is sent to more experts than there are left is sent to all of them.
        """
        kept = torch.as_tensor(list(experts), dtype=torch.long)
        count = len(self.experts)
        if kept.numel() < self.paths.least:
            raise TransectError(
                f"at least {self.paths.least} of the experts must be kept here, got {kept.tolist()}; to remove the "
                "sublayer use mlp.drop()"
            )
        if kept.unique().numel() != kept.numel() or int(kept.min()) < 0 or int(kept.max()) >= count:
            raise TransectError(f"experts to keep must be distinct numbers from 0 to {count - 1}, got {kept.tolist()}")
        router = f"{self.block.path}.{self.paths.router}"
        odd = [name for name, tensor in self.router.named_buffers() if tensor.shape[:1] == (count,)]
        if odd:
            raise TransectError(f"{router} keeps {odd[0]} for every expert: experts cannot be removed here")
        self._keep_modules(kept)
        for name, _ in self.router.named_parameters():
            _keep_rows(self.block.model, f"{router}.{name}", kept)
        chosen = min(self.chosen, len(kept))
        for path in (router, self.path, f"{self.block.path}.{self.paths.module}"):
            module = self.block.model.get_submodule(path)
            for attribute, value in (("num_experts", len(kept)), ("out_features", len(kept)), ("top_k", chosen)):
                if isinstance(module.__dict__.get(attribute), int):
                    set_attribute(self.block.model, path, attribute, value)

    def _keep_modules(self, kept: Tensor) -> None:
        host = self.host
        if not isinstance(host, SeparateExperts):
            for tensor in ("gate_up_proj", "down_proj"):
                _keep_rows(self.block.model, f"{self.path}.{tensor}", kept)
            return
        stay = [host.each[number] for number in kept.tolist()]
        leaving = [expert for number, expert in enumerate(host.each) if number not in kept.tolist()]
        hand_over_banks(self.block.model, nn.ModuleList(leaving))
        host.each = nn.ModuleList(stay)
        record_of(self.block.model).set_module(self.path, host.describe())

    def drop(self) -> None:
        """Remove the sublayer, router and all: it adds nothing."""
        self.block.refuse_dropping_sublayers()
        path = f"{self.block.path}.{self.paths.module}"
        skip = SkipExperts(self.path.removeprefix(path + ".")).to(self.router.weight)
        hand_over_banks(self.block.model, self.block.model.get_submodule(path))
        self.block.model.set_submodule(path, skip)
        record = record_of(self.block.model)
        for table in (record.attributes, record.parameters):
            for key in [key for key in table if (key + ".").startswith(path + ".")]:
                del table[key]
        record.set_module(path, skip.describe())

    def __getattr__(self, name: str) -> Any:
        if name in ("gate", "up", "down", "neurons", "activation"):
            raise NotApplicable(one_mlp_needed(self.block))
        raise AttributeError(name)


def one_mlp_needed(block: Any) -> str:
    """Why something that wants the neurons of one MLP has none here."""
    return (
        f"the MLP of block {block.index} is a mixture of experts, which has no neurons that every token passes; this "
        "needs one ordinary MLP a block"
    )


def renumber_blocks(anatomy: Any) -> None:
    """After a block was dropped, say in the config of a Qwen mixture which of the blocks left have no experts."""
    config = anatomy.config
    if getattr(config, "mlp_only_layers", None) is not None:
        config.mlp_only_layers = [block.index for block in anatomy.blocks if not block.has_experts]
        config.decoder_sparse_step = 1


def _keep_rows(model: nn.Module, path: str, kept: Tensor) -> None:
    """Restrict a parameter's first axis, in the order given; its new size is recorded."""
    parent, _, name = path.rpartition(".")
    old = model.get_parameter(path)
    rows = old.detach()[kept.to(old.device)].clone()
    setattr(model.get_submodule(parent), name, nn.Parameter(rows, old.requires_grad))
    if len(rows) != len(old):
        record_of(model).parameters[path] = list(rows.shape)


def has_module(model: nn.Module, path: str) -> bool:
    """Whether the model has a module at that path."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
