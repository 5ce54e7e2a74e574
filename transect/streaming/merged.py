"""Parameters that a checkpoint keeps in pieces, as the experts of a mixture: transformers merges them when it loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass(frozen=True)
class Merged:
    """A parameter of the model and what it is made of.

    converter: transformers' rule. pieces: by the rule's pattern, the names on disk, in order.
    """

    name: str
    converter: Any
    pieces: Mapping[str, list[str]]

    def read(self, where: Mapping[str, Path], model: Any) -> Tensor:
        """The parameter, from the files that hold its pieces."""
        with ExitStack() as stack:
            paths = {where[piece] for pieces in self.pieces.values() for piece in pieces}
            files = {path: stack.enter_context(safe_open(path, "pt")) for path in paths}
            tensors: dict[str, Any] = {
                pattern: [files[where[piece]].get_tensor(piece) for piece in pieces]
                for pattern, pieces in self.pieces.items()
            }
            for operation in self.converter.operations:
                tensors = operation.convert(
                    tensors,
                    source_patterns=self.converter.source_patterns,
                    target_patterns=self.converter.target_patterns,
                    full_layer_name=self.name,
                    model=model,
                    config=model.config,
                )
        (tensor,) = tensors.values()
        return tensor


def merged_parameters(model: Any, stored: Iterable[str]) -> dict[str, Merged]:
    """The model's parameters that are in pieces on disk, by name. stored: the names on disk."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter) and len(rule.target_patterns) == 1]
    state = model.state_dict()
    pieces: dict[str, dict[str, list[str]]] = {}
    for piece in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(piece, renamings, converters, model.base_model_prefix, state)
        if pattern is not None and name in state:
            pieces.setdefault(name, {}).setdefault(pattern, []).append(piece)
    return {
        name: Merged(name, next(rule for rule in converters if set(parts) <= set(rule.source_patterns)), parts)
        for name, parts in pieces.items()
    }
