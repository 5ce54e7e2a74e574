"""What a model computes and keeps for a token: operations counted as they run, and bytes of its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..forward.mode import at_rest
from ..forward.objective import task_of
from .speed import takes_logits_to_keep, test_inputs


@dataclass(frozen=True)
class Operations:
    """For each token read (image, for a vision model): floating point operations, and bytes kept for those to come.

    Bytes are None unless the model is causal.
    """

    flops: float
    cache_bytes: float | None


@torch.no_grad()
def operations_of(model: Any, prompt_tokens: int | None = None) -> Operations:
    """Those of one forward pass over random inputs, as `measure_speed` has them.

    Counted are matrix products and attention (torch's own counter), so that what is skipped costs none; an operator
    that runs in a kernel of its own is not seen.
    """
    causal = task_of(model) == "causal"
    options: dict[str, Any] = {"use_cache": True} if causal else {}
    if causal and takes_logits_to_keep(model):
        options["logits_to_keep"] = 1
    with at_rest(model):
        inputs = test_inputs(model, 1, prompt_tokens)
        with FlopCounterMode(display=False) as counted:
            output = model(**inputs, **options)
    count = next(iter(inputs.values())).numel() if "input_ids" in inputs else 1
    kept = cache_bytes(output.past_key_values) / count if causal else None
    return Operations(counted.get_total_flops() / count, kept)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache of transformers, or a state in it, keeps; each counts once."""
    found: dict[tuple[int, int], int] = {}
    waiting: list[Any] = [getattr(cache, "layers", cache)]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            found[one.data_ptr(), one.numel()] = one.numel() * one.element_size()
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, (list, tuple)):
            waiting += one
        elif hasattr(one, "__dict__"):
            waiting += vars(one).values()
    return sum(found.values())
