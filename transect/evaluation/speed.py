"""Measured speed: reading a prompt, and writing token by token."""

from __future__ import annotations

import inspect
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..forward.mode import at_rest
from ..forward.objective import task_of
from ..operators import Operator

BUDGET = 1.0  # seconds that a measurement takes, about


@dataclass(frozen=True)
class Speed:
    """prefill_tokens_per_second: tokens read (images, for a vision model) in one forward pass, over all sequences.
    decode_tokens_per_second: tokens written one at a time with the key/value cache; None unless the model is causal."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None


@torch.no_grad()
def measure_speed(
    model: Any, batch_size: int = 1, prompt_tokens: int | None = None, new_tokens: int = 16, repeats: int = 5
) -> Speed:
    """Median speed of up to `repeats` runs after a warm-up, on the device that the model is on.

    batch_size: sequences or images at once. prompt_tokens: random tokens to read; default 128, or half the context if
    that is less. new_tokens: tokens to write greedily, each a forward pass of the model itself.
    A run that has taken about a second stops writing, and no further one begins after a second in all; on a model so
    slow that the warm-up alone takes that long, the warm-up is the measurement.
    """
    with at_rest(model):
        inputs = test_inputs(model, batch_size, prompt_tokens)
        started = time.perf_counter()
        runs = [_run(model, inputs, min(new_tokens, 2))]
        if time.perf_counter() - started < BUDGET:
            runs = []
            while len(runs) < repeats and (not runs or time.perf_counter() - started < BUDGET):
                runs.append(_run(model, inputs, new_tokens))
    decode = [run.decode_tokens_per_second for run in runs if run.decode_tokens_per_second is not None]
    prefill = statistics.median(run.prefill_tokens_per_second for run in runs)
    return Speed(prefill, statistics.median(decode) if decode else None)


def test_inputs(model: Any, batch_size: int, prompt_tokens: int | None) -> dict[str, Tensor]:
    """Random token ids (batch_size x prompt_tokens), or a random image for a vision model."""
    generator, config = torch.Generator().manual_seed(0), model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(batch_size, config.num_channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    if prompt_tokens is None:
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        prompt_tokens = 128 if context is None else min(128, max(1, context // 2))
    rows = model.get_input_embeddings().weight.shape[0]
    return {"input_ids": torch.randint(rows, (batch_size, prompt_tokens), generator=generator).to(model.device)}


def _run(model: Any, inputs: dict[str, Tensor], new_tokens: int) -> Speed:
    """One forward pass over the inputs and, for a causal model, greedy steps after it."""
    causal = task_of(model) == "causal"
    options: dict[str, Any] = {"use_cache": True} if causal else {}
    if causal and takes_logits_to_keep(model):
        options["logits_to_keep"] = 1  # as `generate` reads a prompt
    started = _now(model)
    output = model(**inputs, **options)
    read = _now(model)
    data = next(iter(inputs.values()))
    prefill = (data.numel() if "input_ids" in inputs else len(data)) / (read - started)
    if not causal:
        return Speed(prefill, None)
    steps = 0
    while steps == 0 or (steps < new_tokens and time.perf_counter() - started < BUDGET):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        steps += 1
    return Speed(prefill, len(data) * steps / (_now(model) - read))


def takes_logits_to_keep(model: Any) -> bool:
    """Whether its forward can be asked for the last logits alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _now(model: Any) -> float:
    """Seconds, once the device has done all that was asked of it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def kernels_of(model: Any) -> list[str]:
    """Names of the kernels, beyond dense products, that a model's operators use on this machine."""
    names = {getattr(module, "kernel", "dense") for module in model.modules() if isinstance(module, Operator)}
    return sorted(names - {"dense"})
