"""What a user asks of a model of another architecture: how fast is it at which length, what does it keep in memory, and
does it still generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import TransectError
from ..forward.mode import at_rest
from ..forward.objective import task_of
from ..parts import Part
from .active import ParametersRead
from .operations import cache_bytes, operations_counted
from .speed import measure_speed, takes_logits_to_keep

WRITTEN = 16  # tokens that are written behind a prompt, at most, to time them
FARTHEST = 512  # positions of a prompt that is read without a cache
REPEATS = 3  # times that a prompt is read for its speed, at most


@dataclass(frozen=True)
class Quality:
    """A model at one length of prompt, alone in its batch.

    length: positions of the prompt. flops: floating point operations for each of them, counted as they ran.
    decode_flops: for one token written behind it. active_parameters: that it reads. cache_bytes: what is kept for it.
    prefill, decode: tokens a second.
    """

    length: int
    flops: float
    decode_flops: float
    active_parameters: int
    cache_bytes: int
    prefill: float
    decode: float


def check_lengths(model: Any, lengths: Sequence[int], whose: str = "this model") -> None:
    """TransectError unless the model goes on with prompts of these lengths.

    Where positions are turned, and none is looked up in a table, prompts may be longer than those that the model was
    trained on: what is measured then is cost, not what it says.
    """
    if task_of(model) != "causal":
        raise TransectError(f"lengths are of prompts, which {whose} does not go on with: leave them out")
    most = most_positions(model)
    if min(lengths, default=2) < 2 or (most is not None and max(lengths, default=2) >= most):
        up_to = "at least 2" if most is None else f"from 2 to {most - 1}"
        why = "" if most is None else f", so that {whose}, which has {most} positions, can write a token behind them"
        raise TransectError(f"lengths should be {up_to}{why}: {', '.join(map(str, lengths))}")


def most_positions(model: Any) -> int | None:
    """How many positions the model has, where something in it is stored for each of them; None elsewhere."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    found = [module.made_with["length"] for module in model.modules() if isinstance(module, Part) and (
        "length" in module.made_with
    )]  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not words and context and context <= module.num_embeddings:
            found.append(context)
    return min(found, default=None)


@torch.no_grad()
def quality_of(model: Any, lengths: Sequence[int]) -> list[Quality]:
    """The model at each length, on random tokens, measured one after the other on the device that it is on.

    Operations: see `operations_counted`.
    TransectError for a length that the model does not take.
    """
    check_lengths(model, lengths)
    most, found = most_positions(model), []
    with at_rest(model):
        for length in lengths:
            rows = model.get_input_embeddings().weight.shape[0]
            tokens = torch.randint(rows, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
            options: dict[str, Any] = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
            with operations_counted() as read:
                output = model(tokens, use_cache=True, **options)
            kept = cache_bytes(output.past_key_values)
            with ParametersRead(model) as active, operations_counted() as wrote:
                model(tokens[:, -1:], past_key_values=output.past_key_values, use_cache=True)
            del output
            new = WRITTEN if most is None else min(WRITTEN, most - length)
            speed = measure_speed(model, prompt_tokens=length, new_tokens=new, repeats=REPEATS)
            found.append(
                Quality(
                    length, read.get_total_flops() / length, float(wrote.get_total_flops()), active.count, kept,
                    speed.prefill_tokens_per_second, speed.decode_tokens_per_second or 0.0,
                )
            )  # fmt: skip
    return found


@torch.no_grad()
def generates_alike(model: Any, length: int = 24, new: int = 8) -> bool:
    """Whether greedy generation with the cache writes what it writes without one, on random tokens.

    The prompt is longer than `length` where parts do something else behind their first positions (a window, a router
    that decides there), so that they do it, up to `FARTHEST` positions: the prompt is read anew for each token.
    """
    behind = max((module.acts_behind for module in model.modules() if isinstance(module, Part)), default=0)
    length = max(length, behind + new if behind + new <= FARTHEST else 0)
    rows = model.get_input_embeddings().weight.shape[0]
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length + new
    length = max(2, min(length, most - new))
    tokens = torch.randint(rows, (1, length), generator=torch.Generator().manual_seed(1)).to(model.device)
    with at_rest(model):
        asked = dict(
            attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        with_cache, without = (model.generate(tokens, use_cache=use, **asked) for use in (True, False))
    return torch.equal(with_cache, without)
