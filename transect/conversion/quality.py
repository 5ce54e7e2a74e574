"""What a user asks of a converted model: how fast is it, what does it keep in memory, and does it still generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..errors import TransectError
from ..evaluation.operations import cache_bytes
from ..evaluation.speed import measure_speed
from ..forward.mode import at_rest


@dataclass(frozen=True)
class Quality:
    """A model at one length of prompt, alone in its batch.

    length: positions of the prompt. flops: floating point operations for each of them, counted as they ran.
    decode_flops: for one token written behind it. cache_bytes: what is kept for that. prefill, decode: tokens a second.
    """

    length: int
    flops: float
    decode_flops: float
    cache_bytes: int
    prefill: float
    decode: float


@torch.no_grad()
def quality_of(model: Any, lengths: Sequence[int]) -> list[Quality]:
    """The model at each length, on random tokens, measured one after the other on the device that it is on.

    Operations are those of matrix products and attention (torch's own counter), so that what is skipped costs none.
    TransectError for a length that the model does not take.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(lengths)
    if not lengths or min(lengths) < 2 or max(lengths) > most:
        raise TransectError(f"lengths should be from 2 to {most}, the most positions that this model takes: {lengths}")
    found = []
    with at_rest(model):
        for length in lengths:
            rows = model.get_input_embeddings().weight.shape[0]
            tokens = torch.randint(rows, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
            with FlopCounterMode(display=False) as read:
                output = model(tokens, use_cache=True, logits_to_keep=1)
            kept = cache_bytes(output.past_key_values)
            with FlopCounterMode(display=False) as wrote:
                model(tokens[:, -1:], past_key_values=output.past_key_values, use_cache=True)
            del output
            speed = measure_speed(model, prompt_tokens=length, repeats=3)
            found.append(
                Quality(
                    length, read.get_total_flops() / length, float(wrote.get_total_flops()), kept,
                    speed.prefill_tokens_per_second, speed.decode_tokens_per_second or 0.0,
                )
            )  # fmt: skip
    return found


@torch.no_grad()
def generates_alike(model: Any, length: int = 24, new: int = 8) -> bool:
    """Whether greedy generation with the cache writes what it writes without one, on random tokens."""
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
