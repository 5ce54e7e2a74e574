"""One view of any transformer: Anatomy -> Block -> Attention and MLP -> Matrix, and the structural changes on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import NotApplicable, TransectError
from ..parameters import listed
from .architecture import MATRIX_ROLES, Architecture, architecture_of, verify
from .arrangement import arrange, tie_blocks
from .attention import Attention
from .body import body_of, model_in, path_of, submodule, text_config_of
from .experts import SkipExperts
from .finite import all_finite
from .guard import refuse_other_than_plain_weights
from .matrix import Matrix
from .mixture import Experts, has_module, one_mlp_needed
from .mlp import MLP
from .record import StructureRecord, record_of
from .storage import weight_tensors
from .surgery import SkipAttention
from .surround import Surrounded
from .ties import untie


class Anatomy:
    """A transformer laid open. Works on the user's own Hugging Face module, in place; holds no weights.

    model: a `PreTrainedModel` (with or without its task head).
        `torch.compile`, DataParallel and their like are looked through; of a vision-language model, the blocks are
        those of its language model.
    architecture: a description for it, where none is built in or registered: an `Architecture`, a dict of its
        fields, or a JSON file. Default: looked up by the `model_type` of the model's (text) config.
    weights: False for a skeleton, of which only the structure is wanted.

    Raises TransectError for encoder-decoders, and where a weight is not stored as the ordinary matrix that it seems to
    be (see `guard`).
    """

    def __init__(
        self,
        model: Any,
        architecture: Architecture | Mapping[str, Any] | str | Path | None = None,
        *,
        weights: bool = True,
    ) -> None:
        model = model_in(model)
        self.config = text_config_of(model)
        if architecture is None:
            architecture = architecture_of(self.config.model_type)
        elif not isinstance(architecture, Architecture):
            from .architecture import register_architecture

            architecture = register_architecture(architecture)
        self.model = model
        self.architecture = architecture
        for key, value in architecture.only_if.items():
            if getattr(self.config, key, value) != value:
                raise TransectError(
                    f"the architecture description {architecture.name!r} holds for models with {key} = {value} only, "
                    f"and this one has {key} = {getattr(self.config, key)}"
                )
        self.body = body_of(model)
        self._prefix = path_of(model, self.body)
        try:
            self.block_list: Any = self.body.get_submodule(architecture.blocks)
        except AttributeError as error:
            raise TransectError(
                f"{type(model).__name__} has no blocks at {self._prefix}{architecture.blocks!r}, where the "
                f"architecture description {architecture.name!r} puts them: {error}"
            ) from None
        if weights:
            refuse_other_than_plain_weights(model, self.block_list, architecture)
        verify(model, architecture)

    @property
    def blocks(self) -> list[Block]:
        """The blocks that the model has now, in order."""
        return [Block(self, index) for index in range(len(self.block_list))]

    @property
    def record(self) -> StructureRecord:
        """What differs from the model that the config alone describes."""
        return record_of(self.model)

    @property
    def embedding(self) -> nn.Module:
        """The input embedding: token embedding, or the patch embedding of a vision model."""
        return self.model.get_input_embeddings()

    @property
    def unembedding(self) -> nn.Module | None:
        """The module from the last hidden state to logits, or None in a model without a language-model head."""
        return self.model.get_output_embeddings()

    @property
    def embeddings_tied(self) -> bool:
        """Whether embedding and unembedding are one tensor."""
        head = self.unembedding
        return head is not None and getattr(head, "weight", None) is getattr(self.embedding, "weight", 0)

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block, or None."""
        path = self.architecture.final_norm
        return None if path is None else self.body.get_submodule(path)

    def matrices(self, roles: Iterable[str] | None = None) -> list[Matrix]:
        """Every weight matrix of every block, block by block; `roles` (q, k, v, o, gate, up, down) restricts them.

        In a mixture of experts gate, up and down are those of every expert.
        """
        wanted = tuple(MATRIX_ROLES if roles is None else listed(roles))
        unknown = set(wanted) - set(MATRIX_ROLES)
        if unknown:
            raise TransectError(f"unknown matrix roles {sorted(unknown)}; known: {', '.join(MATRIX_ROLES)}")
        return [matrix for block in self.blocks for matrix in block.matrices() if matrix.role in wanted]

    def matrix_bytes(self, roles: Iterable[str] | None = None) -> int:
        """Bytes of the matrices as they are stored now, with every factor, index and scale: what a budget counts.

        Biases are not counted. A tensor that serves several matrices (fused ones, shared factors) counts once.
        """
        modules = [matrix.module for matrix in self.matrices(roles)]
        tensors = {id(tensor): tensor for module in modules for tensor in weight_tensors(module)}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def check_finite(self) -> None:
        """Raise an error that names the first parameter that holds NaN or infinity."""
        for name, parameter in self.model.named_parameters():
            if parameter.is_floating_point() and not all_finite(parameter):
                raise TransectError(f"the weight {name} holds NaN or infinite values; repair the model first")

    @property
    def can_drop_blocks(self) -> bool:
        """Whether the other blocks of the model stay the same when one is dropped."""
        return "blocks" in self.architecture.config and not self._holds(self.architecture.fixed_blocks)

    def _holds(self, condition: bool | str | tuple[str, ...]) -> bool:
        """A condition of the description: itself, or whether one of the config's entries of these names is true."""
        if isinstance(condition, bool):
            return condition
        names = (condition,) if isinstance(condition, str) else condition
        return any(bool(getattr(self.config, name)) for name in names)

    def refuse_dropping_blocks(self) -> None:
        """Raise an error where no block can be dropped."""
        if not self.can_drop_blocks:
            raise TransectError(
                "in this model a block's place enters what it computes, or its config does not count blocks: dropping "
                "a block would change others"
            )

    def drop_block(self, index: int) -> None:
        """Remove a whole block. The config follows, so that the result is still an ordinary model of its class."""
        if len(self.block_list) == 1:
            raise TransectError("the last block of a model cannot be dropped")
        if not 0 <= index < len(self.block_list):
            raise TransectError(f"block {index} does not exist: the model has blocks 0 to {len(self.block_list) - 1}")
        self.refuse_dropping_blocks()
        arrange(self, [number for number in range(len(self.block_list)) if number != index])

    def arrange(self, order: Iterable[int], *, tied: bool = True) -> None:
        """Let the model consist of its blocks of these numbers, repeats included: [0, 1, 2, 1, 2, 3].

        A block that is left out is dropped. One that is repeated is at each of its places a block of its own, with its
        own place in the cache, and the config follows.
        tied: whether a repeated block's parameters are those of its first place, stored once; else they are copies.
        Raises TransectError, before any change, where a block's place enters what it computes.
        """
        arrange(self, order, tied)

    def tie(self, numbers: Sequence[int], chosen: Callable[[str], bool] = lambda name: True) -> None:
        """Let the blocks of these numbers hold the parameters of the first of them: one tensor each, stored once.

        chosen: of a parameter's name within its block, whether it is shared.
        Raises TransectError, before any change, where another block has parameters of other names or shapes.
        """
        tie_blocks(self, numbers, chosen)

    def untie(self) -> None:
        """Give every place its own copy of what it shares with others, so that each can be changed by itself."""
        untie(self.model)

    def config_value(self, name: str) -> Any:
        """A config entry under our name (`heads`, `neurons` ...), or None where the config does not have it."""
        key = self.architecture.config.get(name)
        return None if key is None else getattr(self.config, key, None)

    @property
    def head_size(self) -> int:
        """Numbers in one attention head."""
        return self.config_value("head_size") or self.config_value("hidden") // self.config_value("heads")

    @property
    def post_norm(self) -> bool:
        """Whether the architecture's own norms stand after the residual sum."""
        post_norm = self.architecture.post_norm
        return not getattr(self.config, post_norm) if isinstance(post_norm, str) else post_norm

    @property
    def residual_multiplier(self) -> float:
        """What a sublayer's output is multiplied by where it enters the residual stream."""
        key = self.architecture.residual_multiplier
        return 1.0 if key is None else float(getattr(self.config, key))


class Block:
    """One transformer block: an attention sublayer, an MLP sublayer (either may have been dropped), and norms."""

    def __init__(self, anatomy: Anatomy, index: int) -> None:
        self.anatomy = anatomy
        self.index = index
        self.model = anatomy.model
        self.path = f"{anatomy._prefix}{anatomy.architecture.blocks}.{index}"

    @property
    def module(self) -> nn.Module:
        """The model's own module of this block."""
        return submodule(self.model, self.path)

    @property
    def head_size(self) -> int:
        """Numbers in one attention head."""
        return self.anatomy.head_size

    @property
    def attention(self) -> Attention | None:
        """The attention sublayer; None if it was dropped, or a part stands there."""
        return Attention(self) if self._has("attention") else None

    @property
    def mlp(self) -> MLP | Experts | None:
        """The MLP sublayer, which may be a mixture of experts; None if it was dropped, or a part stands there."""
        if not self._has("mlp"):
            return None
        return Experts(self) if self.has_experts else MLP(self)

    @property
    def has_experts(self) -> bool:
        """Whether the MLP is, or was before it was dropped, a mixture of experts."""
        paths = self.anatomy.architecture.experts
        return paths is not None and has_module(self.module, paths.experts)

    @property
    def norms(self) -> dict[str, nn.Module]:
        """Name -> norm, for the norms between this block's sublayers; without those that the config switched off.

        Where a part around the block places them anew, by the places that they have there.
        """
        found: dict[str, nn.Module] = {}
        for name, paths in self.anatomy.architecture.norms.items():
            *options, last = (paths,) if isinstance(paths, str) else paths
            path = next((path for path in options if _exists(self.module, path)), last)
            norm = self.module.get_submodule(path)
            if not isinstance(norm, nn.Identity):
                found[name] = norm
        return self.module.leading.placed(found) if isinstance(self.module, Surrounded) else found

    def slot_path(self, unit: str) -> str | None:
        """The path of what `attention` or `mlp` consists of, if it is one module; None for an MLP that is not."""
        if unit == "attention":
            return f"{self.path}.{self.anatomy.architecture.attention}"
        architecture = self.anatomy.architecture
        stored = {role: path for path, fused in architecture.fused.items() for role in fused.parts}
        paths = {**stored, **architecture.matrices}
        owners = {paths.get(role, "").rpartition(".")[0] for role in ("up", "down")}
        return f"{self.path}.{owners.pop()}" if len(owners) == 1 and "" not in owners else None

    @property
    def attention_adds(self) -> tuple[str, int] | None:
        """Name and position of the argument that the attention module adds to its output itself, if it does."""
        name = self.anatomy.architecture.attention_adds
        module = self.model.get_submodule(str(self.slot_path("attention")))
        if name is None or hasattr(module, "adds"):  # what stands in its place knows
            return getattr(module, "adds", None)
        return name, list(inspect.signature(module.forward).parameters).index(name)

    def part(self, unit: str) -> Any:
        """The part (see `transect.parts`) that stands in the place of `attention` or `mlp`; None if there is none."""
        path = self.slot_path(unit)
        standing: Any = None if path is None else self.model.get_submodule(path)
        return getattr(standing, "part", standing) if hasattr(standing, "slot") else None

    def has_part(self, unit: str) -> bool:
        """Whether a part stands in the place of `attention` or `mlp`, or of a matrix in it."""
        if self.part(unit) is not None:
            return True
        if self._is_dropped(unit) or (unit == "mlp" and self.has_experts):
            return False
        roles = MATRIX_ROLES[:4] if unit == "attention" else ("up", "down")
        return any(hasattr(self.find(role).host, "slot") for role in roles)

    def _has(self, unit: str) -> bool:
        """Whether the unit stands as the architecture has it, with matrices only where it has matrices."""
        return not self.has_part(unit) and not self._is_dropped(unit)

    def _is_dropped(self, unit: str) -> bool:
        """Whether `attention` or `mlp` was dropped."""
        if unit == "attention":
            return isinstance(submodule(self.module, self.anatomy.architecture.attention), SkipAttention)
        if self.has_experts:
            return isinstance(self._experts_module, SkipExperts)
        return self.find("up").shape[0] == 0

    @property
    def _experts_module(self) -> nn.Module:
        paths = self.anatomy.architecture.experts
        assert paths is not None
        return self.module.get_submodule(paths.module)

    def find(self, role: str) -> Matrix:
        """The matrix of that role where the architecture puts it, whether or not its sublayer is still there.

        Raises NotApplicable for a gate, up or down in a mixture of experts, which has one of each expert.
        """
        architecture = self.anatomy.architecture
        if role in ("gate", "up", "down") and self.has_experts:
            raise NotApplicable(one_mlp_needed(self))
        if role in architecture.matrices:
            return Matrix(self, role, f"{self.path}.{architecture.matrices[role]}")
        for path, fused in architecture.fused.items():
            if role in fused.parts:
                return Matrix(self, role, f"{self.path}.{path}", fused)
        raise KeyError(role)

    def matrix(self, role: str) -> Matrix:
        """The matrix of that role; KeyError where the block has none (a gate, or a dropped sublayer).

        Of a part that stands in a sublayer's place, the linear layer that it has for this role.
        """
        unit = "attention" if role in ("q", "k", "v", "o") else "mlp"
        if (part := self.part(unit)) is not None:
            path = next(path for path, module in self.module.named_modules() if module is part)
            inner = getattr(part.get_submodule(part.roles[role]), "matrix", None)  # a matrix with more around it
            within = part.roles[role] if inner is None else f"{part.roles[role]}.{inner}"
            return Matrix(self, role, f"{self.path}.{path}.{within}")
        if self._is_dropped(unit):
            raise KeyError(role)
        found = self.find(role)
        if hasattr(found.host, "slot"):  # a part that is no matrix
            raise KeyError(role)
        return found

    def matrices(self) -> list[Matrix]:
        """The block's matrices in the order q, k, v, o, gate, up, down, without those of dropped sublayers.

        The last three of each expert after the other, in a mixture of experts.
        """
        found = []
        mlp: Any = self.mlp if self.has_experts else None
        for role in MATRIX_ROLES[:4] if self.has_experts else MATRIX_ROLES:
            try:
                found.append(self.matrix(role))
            except KeyError:
                continue
        return found if mlp is None else [*found, *mlp.matrices()]

    @property
    def parallel(self) -> bool:
        """Whether the MLP reads the block's input instead of what attention has added to it."""
        return self.anatomy._holds(self.anatomy.architecture.parallel)

    @property
    def residual_multiplier(self) -> float:
        """What a sublayer's output is multiplied by where it enters the residual stream."""
        return self.anatomy.residual_multiplier

    @property
    def rotary_width(self) -> int:
        """Of how many of a head's first channels rotary positions turn pairs; 0 without rotation.

        Read from the config's `rope_parameters`, one set or one for each kind of layer, where the description names no
        other entry.
        """
        rotation, config = self.anatomy.architecture.rotation, self.anatomy.config
        rope = getattr(config, "rope_parameters", None)
        if "width" in rotation:
            return getattr(config, rotation["width"]) or self.head_size
        if not rope:
            return self.head_size if rotation else 0
        first = next((value for value in rope.values() if isinstance(value, dict)), rope)
        return int(self.head_size * (first.get("partial_rotary_factor") or 1.0)) // 2 * 2

    @property
    def rotates_neighbours(self) -> bool:
        """Whether channels 2i and 2i + 1 are turned together, instead of i and i + width/2."""
        return self.anatomy.architecture.rotation.get("pairs") == "neighbours"

    @property
    def adds_up(self) -> bool:
        """Whether the block adds what its sublayers add, and nothing else: no part that does more leads it."""
        return not isinstance(self.module, Surrounded) or self.module.leading.places_norms

    @property
    def post_norm(self) -> bool:
        """Whether norms stand after the residual sum, so that a single sublayer cannot be dropped."""
        return self.anatomy.post_norm or (isinstance(self.module, Surrounded) and self.module.leading.post_norm)

    def branch_output(self, unit: str) -> nn.Module | None:
        """The module whose output `attention` or `mlp` adds to the residual stream; None if it was dropped.

        Where the model multiplies what it adds, that is not in the output: see `residual_multiplier`.
        """
        if self.part(unit) is None and self._is_dropped(unit):
            return None
        norm = self.norms.get(f"{unit}_output")
        if norm is None and unit == "mlp" and self.has_experts:
            return self._experts_module
        if norm is None and self.part(unit) is not None:
            return self.model.get_submodule(str(self.slot_path(unit)))
        return norm if norm is not None else self.find("o" if unit == "attention" else "down").host

    def refuse_dropping_sublayers(self) -> None:
        """Raise an error where a single sublayer cannot be dropped."""
        if self.post_norm:
            raise TransectError(
                f"{type(self.model).__name__} normalises after the residual sum, so a single sublayer cannot be "
                "dropped without changing what the next one reads; drop whole blocks, or remove heads or neurons"
            )
        if isinstance(self.module, Surrounded):
            raise TransectError(
                f"a part stands around block {self.index} and decides what its sublayers read, so a single one cannot "
                "be dropped; drop the whole block"
            )
        if isinstance(self.mlp, MLP):
            self.mlp.refuse_narrowing()


def _exists(module: nn.Module, path: str) -> bool:
    try:
        return module.get_submodule(path) is not None
    except AttributeError:
        return False
