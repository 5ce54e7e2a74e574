"""What Transect has to know of an architecture: a small declaration, read from JSON.

Paths are module paths relative to a block, except `blocks` and `final_norm`, which are relative to the base model
(`model.base_model`). See `architectures/*.json` for the built-in ones and CONTRIBUTING.md for a worked example.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import BadCheckpoint, TransectError, UnknownArchitecture
from ..store import read_json

MATRIX_ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class FusedMatrix:
    """One stored matrix that holds several: its rows are the parts' rows.

    parts: the roles in storage order, e.g. ("q", "k", "v").
    interleaved: False where the parts lie one after another; True where each key/value head has its rows together: its
        query heads, its key, its value (GPT-NeoX; Falcon, where one key/value head serves several query heads).
    """

    parts: tuple[str, ...]
    interleaved: bool = False


@dataclass(frozen=True)
class ExpertPaths:
    """Where a block keeps its experts, if its MLP is a mixture of them. Blocks that have none keep an ordinary MLP.

    module: path of the whole sublayer within a block. router: of what chooses experts, with a row for each in its
        `weight`. experts: of what holds them, in the layout of transformers' `use_experts_implementation`:
        `gate_up_proj` (experts x 2 neurons x d) and `down_proj` (experts x d x neurons).
    shared: role -> path of an expert that every token passes, or none.
    activation: the config attribute that names the function between gate and down.
    least: the fewest experts that the router's own code can choose from.
    """

    module: str
    router: str
    experts: str
    shared: Mapping[str, str] = field(default_factory=dict)
    activation: str = "hidden_act"
    least: int = 1


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a transformer are, by module path.

    name: the definition's own name.
    model_types: the `config.model_type` values that it describes.
    blocks: the `ModuleList` of blocks, relative to the base model.
    matrices: role (q, k, v, o, gate, up, down) -> path within a block; roles stored together are in `fused` instead.
    fused: path within a block -> the parts that are stored there.
    attention: path of the attention module within a block.
    attention_returns: how many values its forward returns, the output first; 0 where it returns the output alone.
    attention_adds: the argument of its forward that it adds to its output by itself (Bloom), or None.
    head_bias: arguments of its forward that hold a slice for each head, in their third dimension from the end, as ALiBi
        does: the kept heads keep their slices.
    head_parameters: paths of parameters within the attention module that hold one entry for each query head, in their
        first dimension (attention sinks).
    block_returns: how many values a block's forward returns, the stream first; 0 where it returns the stream alone.
    norms: name -> path within a block, for every norm that the block has; of several paths the first that exists.
    q_norm, k_norm: paths of the query and key norms within a block, where the architecture has them.
    rotation: how rotary positions turn a head's first channels: `pairs` is "halves" (i and i + width/2, the default) or
        "neighbours" (2i and 2i + 1), `width` the config's number of channels that are turned; default: as
        `rope_parameters` say, or all where there is no such entry.
    activation: path of the MLP's activation within a block.
    final_norm: path of the norm after the last block, relative to the base model.
    experts: where the experts are, in a mixture of them; gate, up and down are then those of blocks without experts.
    config: our names -> the config's: `blocks`, `hidden`, `heads`, `key_value_heads`, `head_size`, `neurons`, and with
        experts `experts` and `chosen_experts` (by each token).
    attributes: attribute of the attention module (or `config.<name>` for its private config) -> what it must hold
        when heads are removed: `heads`, `key_value_heads`, `heads_per_group` or `width` (= heads x head size).
    per_block: entries of the config that are lists with one value a block; a dropped block takes its value along.
    fixed_blocks: a block's own place enters what it computes, so that none can be dropped; either a bool, or the config
        attribute that is True in that case.
    residual_multiplier: the config's number by which a sublayer's output is multiplied where it enters the stream.
    logits: what happens to the head's output, by the config's names: it is multiplied by `multiplier`, divided by
        `divisor`, then `softcap` * tanh(logits / softcap) is taken.
    head_transform: a map of its own stands between the final norm and the unembedding, so that there is no logit lens.
    only_if: config attribute -> the value without which the description does not hold.
    post_norm: norms stand after the residual sum, so that a sublayer cannot be dropped; either a bool, or the
        config attribute that is False in that case.
    parallel: attention and MLP both read the block's input, so that the MLP does not see what attention added; either a
        bool, or the config attribute that is True in that case, or several of which one is.
    head_size_is_configurable: the config stores the head size, so fewer heads still make an ordinary config.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    matrices: Mapping[str, str]
    attention: str
    fused: Mapping[str, FusedMatrix] = field(default_factory=dict)
    attention_returns: int = 2
    attention_adds: str | None = None
    head_bias: tuple[str, ...] = ()
    head_parameters: tuple[str, ...] = ()
    block_returns: int = 0
    norms: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    q_norm: str | None = None
    k_norm: str | None = None
    rotation: Mapping[str, str] = field(default_factory=dict)
    activation: str | None = None
    final_norm: str | None = None
    experts: ExpertPaths | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)
    per_block: tuple[str, ...] = ("layer_types",)
    fixed_blocks: bool | str = False
    residual_multiplier: str | None = None
    logits: Mapping[str, str] = field(default_factory=dict)
    head_transform: bool = False
    only_if: Mapping[str, Any] = field(default_factory=dict)
    post_norm: bool | str = False
    parallel: bool | str | tuple[str, ...] = False
    head_size_is_configurable: bool = False

    def __post_init__(self) -> None:
        roles = list(self.matrices) + [part for fused in self.fused.values() for part in fused.parts]
        unknown = set(roles) - set(MATRIX_ROLES)
        if unknown:
            raise TransectError(f"architecture {self.name!r}: unknown roles {sorted(unknown)}; known: {MATRIX_ROLES}")
        if len(set(roles)) != len(roles):
            raise TransectError(f"architecture {self.name!r}: a role is given twice in {roles}")
        optional = {"gate"} if self.experts is None else {"gate", "up", "down"}
        missing = set(MATRIX_ROLES) - optional - set(roles)
        if missing:
            raise TransectError(f"architecture {self.name!r}: no path is given for the roles {sorted(missing)}")
        for key, known in (("logits", ("multiplier", "divisor", "softcap")), ("rotation", ("pairs", "width"))):
            unknown = set(getattr(self, key)) - set(known)
            if unknown:
                raise TransectError(
                    f"architecture {self.name!r}: unknown entries {sorted(unknown)} under `{key}`; known: {known}"
                )
        if self.rotation.get("pairs", "halves") not in ("halves", "neighbours"):
            raise TransectError(
                f"architecture {self.name!r}: rotation pairs are 'halves' or 'neighbours', not "
                f"{self.rotation['pairs']!r}"
            )

    @staticmethod
    def from_dict(description: Mapping[str, Any]) -> Architecture:
        """Read a declaration as it stands in a JSON file; unknown or missing keys are named in the error."""
        known = {f.name for f in fields(Architecture)}
        unknown = set(description) - known
        if unknown:
            raise TransectError(f"architecture description has unknown keys {sorted(unknown)}; known: {sorted(known)}")
        missing = {"name", "model_types", "blocks", "matrices", "attention"} - set(description)
        if missing:
            raise TransectError(f"architecture description lacks {sorted(missing)}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in description.items()
        }
        values["fused"] = {
            path: FusedMatrix(tuple(fused["parts"]), fused.get("interleaved", False))
            for path, fused in values.get("fused", {}).items()
        }
        if values.get("experts") is not None:
            try:
                values["experts"] = ExpertPaths(**values["experts"])
            except TypeError as error:
                raise TransectError(f"architecture description: `experts` {error}") from None
        return Architecture(**values)


_registered: dict[str, Architecture] = {}
_verifiers: list[Callable[[Any, Architecture], None]] = []


@cache
def _built_in() -> dict[str, Architecture]:
    folder = resources.files("transect.anatomy") / "architectures"
    found = (
        Architecture.from_dict(json.loads(file.read_text(encoding="utf-8")))
        for file in folder.iterdir()
        if file.name[-5:] == ".json"
    )
    return {model_type: architecture for architecture in found for model_type in architecture.model_types}


def known_model_types() -> list[str]:
    """All `config.model_type` values that can be opened, sorted."""
    return sorted({**_built_in(), **_registered})


def register_architecture(description: Mapping[str, Any] | str | Path) -> Architecture:
    """Teach Transect an architecture, from a dict or a JSON file; it takes precedence over a built-in one.

    A description that says what a built-in one says is that one, and needs no check.
    """
    architecture = read_architecture(description)
    architecture = next((known for known in _built_in().values() if known == architecture), architecture)
    _registered.update(dict.fromkeys(architecture.model_types, architecture))
    return architecture


def read_architecture(description: Mapping[str, Any] | str | Path) -> Architecture:
    """An architecture from a dict or a JSON file, without registering it."""
    return Architecture.from_dict(_read(Path(description)) if isinstance(description, (str, Path)) else description)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except BadCheckpoint as error:
        raise TransectError(f"the architecture description {path} cannot be read as JSON: {error}") from None


def verify_with(verifier: Callable[[Any, Architecture], None]) -> None:
    """Let a function look at every model that is opened with a description that is not built in.

    It raises where the description is wrong. The self-check runs models, so it lives in a room above this one.
    """
    _verifiers.append(verifier)


def verify(model: Any, architecture: Architecture) -> None:
    """Have the description checked, unless it is built in."""
    if all(architecture is not known for known in _built_in().values()):
        for verifier in _verifiers:
            verifier(model, architecture)


def architecture_of(model_type: str) -> Architecture:
    """The definition for a `config.model_type`, or an error that says how to write one."""
    found = _registered.get(model_type) or _built_in().get(model_type)
    if found is None:
        raise UnknownArchitecture(
            f"the architecture {model_type!r} is not described yet (known: {', '.join(known_model_types())}). "
            "Describe it: pass a dict or a JSON file that names the module paths of its blocks, q, k, v, o, up and "
            "down matrices to transect.register_architecture (on the command line: --architecture FILE); "
            'CONTRIBUTING.md, "Add an architecture", has a worked example.'
        )
    return found
