"""What modules of a model read of a text: what a conversion fits functions and tables to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..errors import TransectError
from ..forward import at_rest, real_positions, run_body, to_device

POSITIONS = 512  # of each module that are looked at, where a conversion says no other number


@torch.no_grad()
def inputs_of_modules(
    anatomy: Anatomy, modules: Mapping[Any, nn.Module], batches: Iterable[Any], positions: int = POSITIONS
) -> dict[Any, Tensor]:
    """Of each module, by its key, the inputs (n x width) at up to so many real positions, spread over the batches."""
    batches = list(batches)
    each, found = -(-positions // max(1, len(batches))), {key: [] for key in modules}
    real: Tensor | None = None

    def keeping(key: Any) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            rows = (given[0] if given else named["hidden_states"]).flatten(0, -2)
            rows = rows if real is None else rows[real.flatten()]
            found[key].append(rows[:: max(1, len(rows) // each)][:each])

        return hook

    hooks = [module.register_forward_pre_hook(keeping(key), with_kwargs=True) for key, module in modules.items()]
    try:
        with at_rest(anatomy.model):
            for batch in batches:
                on_device = to_device(batch, anatomy.model.device)
                real = real_positions(on_device)
                run_body(anatomy.model, on_device)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(found.values()):
        raise TransectError("this conversion looks at what the model reads: pass data= with at least one sequence")
    return {key: torch.cat(rows)[:positions] for key, rows in found.items()}
