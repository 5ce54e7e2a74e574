"""What a model computes, reads and keeps for a token: operations and parameters as they run, and bytes of its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..forward.mode import at_rest
from ..forward.objective import task_of
from ..operators import int4_kernel
from .active import ParametersRead
from .speed import takes_logits_to_keep, test_inputs

_aten = torch.ops.aten
WRITTEN = 8  # tokens over which active parameters are averaged: another one may choose other experts, or other blocks


@dataclass(frozen=True)
class Operations:
    """For each token read (image, for a vision model): floating point operations, and bytes kept for those to come.

    Bytes are None unless the model is causal. active_parameters: those that a token reads which is written behind the
    prompt, on average; for a model that is not causal, those that a whole input reads. See `ParametersRead`.
    """

    flops: float
    cache_bytes: float | None
    active_parameters: float


def operations_counted() -> FlopCounterMode:
    """Inside the `with`, counts the operations of matrix products and attention, so that what is skipped costs none.

    It is torch's own counter, which counts attention as if every query saw every key, with what it does not know on a
    CPU: attention, products by groups (experts), and the kernel of 4-bit integers (twice for 8 bits, see `Int4`).
    """
    found = {_aten._scaled_dot_product_flash_attention_for_cpu: _attention, _aten._grouped_mm: _grouped}
    if hasattr(_aten, int4_kernel.NAME):
        found[getattr(_aten, int4_kernel.NAME)] = _packed
    return FlopCounterMode(display=False, custom_mapping=found)


def _attention(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """Of shapes (B x heads x N x d): q kᵀ, and what comes of it with v."""
    batch, heads, queries, size = q
    return 2 * batch * heads * queries * k[-2] * (size + v[-1])


def _grouped(x: Any, weights: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """Of shapes (N x m) and (groups x m x n): each row with its group's matrix."""
    return 2 * x[0] * weights[-2] * weights[-1]


def _packed(x: Any, packed: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """Of shapes (N x n) and (m x n / 2 bytes): each row with the matrix."""
    return 2 * x[0] * x[1] * packed[0]


@torch.no_grad()
def operations_of(model: Any, prompt_tokens: int | None = None) -> Operations:
    """Those of one forward pass over random inputs, as `measure_speed` has them.

    See `operations_counted`.
    """
    causal = task_of(model) == "causal"
    options: dict[str, Any] = {"use_cache": True} if causal else {}
    if causal and takes_logits_to_keep(model):
        options["logits_to_keep"] = 1
    with at_rest(model):
        inputs = test_inputs(model, 1, prompt_tokens)
        with ParametersRead(model) as read, operations_counted() as counted:
            output = model(**inputs, **options)
        data = next(iter(inputs.values()))
        count = data.numel() if "input_ids" in inputs else 1
        flops = counted.get_total_flops() / count
        if not causal:
            return Operations(flops, None, float(read.count))
        kept = cache_bytes(output.past_key_values) / count
        written = []
        for token in data[0, :WRITTEN]:
            with ParametersRead(model) as read:
                model(token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
            written.append(read.count)
            if read.everything:
                break
        return Operations(flops, kept, sum(written) / len(written))


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
