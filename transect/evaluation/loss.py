"""Loss, perplexity and accuracy of a model on batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadData, TransectError
from ..forward.head import scored
from ..forward.mode import at_rest
from ..forward.objective import Batch, inputs_of, summed_loss
from ..forward.wide import computing_wide
from ..statistics import Progress


@dataclass(frozen=True)
class LossResult:
    """loss: mean negative log-likelihood of a prediction, in nats. perplexity: exp(loss). tokens: predictions scored.
    accuracy: fraction of predictions whose most likely class is the right one. seconds: wall-clock time."""

    loss: float
    perplexity: float
    tokens: int
    accuracy: float
    seconds: float


@torch.no_grad()
def evaluate_loss(model: Any, batches: Iterable[Batch], progress: Progress | None = None) -> LossResult:
    """Score every prediction that the batches ask for: next tokens, masked tokens, or classes.

    model: runs in evaluation mode, on the device it is on, and on a CPU in float32 (see `computing_wide`).
    batches: see `transect.data.load`; of one batch, the logits of some positions are in memory at a time.
    progress: shows the batches as they are scored.
    Raises TransectError naming the first module whose output is not finite, and BadData if nothing is to be scored.
    """
    started = time.perf_counter()
    loss, correct, count = 0.0, 0, 0
    with at_rest(model), computing_wide(model):
        for batch in progress(batches, "evaluation") if progress else batches:
            for logits, labels in scored(model, batch):
                nats = float(summed_loss(logits, labels))
                if not math.isfinite(nats):
                    raise TransectError(_first_non_finite(model, batch))
                loss += nats
                correct += int((logits.argmax(-1) == labels).sum())
                count += labels.numel()
    if count == 0:
        raise BadData("the batches hold nothing to be predicted")
    loss /= count
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return LossResult(loss, perplexity, count, correct / count, time.perf_counter() - started)


def _first_non_finite(model: Any, batch: Batch) -> str:
    """Run the batch again and say which module was the first to put out NaN or infinity."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if not found and any(not bool(torch.isfinite(tensor).all()) for tensor in _floats(output)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        model(**inputs_of(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    where = (
        f"the first module whose output is not finite is {found[0] or type(model).__name__}"
        if found
        else "every module's output is finite, but a right answer has probability 0"
    )
    return f"the loss is not finite: {where}"


def _floats(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _floats(part)
    elif isinstance(output, dict):
        yield from _floats(list(output.values()))
