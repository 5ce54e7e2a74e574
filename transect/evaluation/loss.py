"""Loss, perplexity and accuracy of a model on batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadData, TransectError
from ..forward.head import scored
from ..forward.mode import at_rest
from ..forward.objective import Batch, agreement, inputs_of, losses_of, task_of
from ..forward.wide import computing_wide
from ..statistics import Progress

# Of each example (sequence, text or image) that holds a prediction, its summed nats and their number.
Examples = Sequence[tuple[float, int]]


@dataclass(frozen=True)
class LossResult:
    """loss: mean negative log-likelihood of a prediction, in nats. perplexity: exp(loss). tokens: predictions scored.
    accuracy: fraction of predictions whose most likely class is the right one. seconds: wall-clock time.
    examples: see `Examples`.

    Of a model without a head: loss is the mean relative squared error of its last hidden states, accuracy their mean
    cosine with what they should be, and perplexity None."""

    loss: float
    perplexity: float | None
    tokens: int
    accuracy: float
    seconds: float
    examples: Examples

    def to_row(self) -> dict[str, Any]:
        """What a table row keeps of one text: loss, its standard_error, and the examples."""
        examples = [list(pair) for pair in self.examples]
        return {"loss": self.loss, "standard_error": standard_error(self.examples), "examples": examples}


@torch.no_grad()
def evaluate_loss(model: Any, batches: Iterable[Batch], progress: Progress | None = None) -> LossResult:
    """Score every prediction that the batches ask for: next tokens, masked tokens, or classes.

    model: runs in evaluation mode, on the device it is on, and on a CPU in float32 (see `computing_wide`).
    batches: see `transect.data.load`; of one batch, the logits of some positions are in memory at a time.
    progress: shows the batches as they are scored.
    Raises TransectError naming the first module whose output is not finite, and BadData if nothing is to be scored.
    """
    started = time.perf_counter()
    loss, correct, count = 0.0, 0.0, 0
    examples: list[tuple[float, int]] = []
    with at_rest(model), computing_wide(model):
        for batch in progress(batches, "evaluation") if progress else batches:
            size = len(next(iter(batch.values())))
            nats, counts = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
            for logits, labels, owners in scored(model, batch):
                owners = owners.cpu()
                nats.index_add_(0, owners, losses_of(logits, labels).double().cpu())
                counts += owners.bincount(minlength=size)
                correct += float(agreement(logits, labels).sum())
            if not nats.isfinite().all():
                raise TransectError(_first_non_finite(model, batch))
            loss += float(nats.sum())
            count += int(counts.sum())
            examples += [pair for pair in zip(nats.tolist(), counts.tolist(), strict=True) if pair[1]]
    if count == 0:
        raise BadData("the batches hold nothing to be predicted")
    loss /= count
    perplexity = None if task_of(model) == "embedding" else math.exp(loss) if loss < 700 else math.inf
    return LossResult(loss, perplexity, count, correct / count, time.perf_counter() - started, tuple(examples))


def standard_error(examples: Examples, others: Examples | None = None) -> float | None:
    """Of the mean loss of a prediction, over the examples as a sample of all that there are; None for a single one.

    others: what another model makes of the same examples, in order. Then it is that of the difference, pair by pair:
    what makes an example hard for both does not count. Examples of different lengths weigh as their predictions do
    (the linearised error of a ratio).
    """
    counts = [count for _, count in examples]
    nats = [nats for nats, _ in examples]
    if others is not None:
        if counts != [count for _, count in others]:
            raise ValueError("the two models were not scored on the same examples")
        nats = [ours - theirs for ours, (theirs, _) in zip(nats, others, strict=True)]
    n, mean = len(counts), sum(nats) / sum(counts)
    if n < 2:
        return None
    squares = sum((each - mean * count) ** 2 for each, count in zip(nats, counts, strict=True))
    return math.sqrt(n / (n - 1) * squares) / sum(counts)


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
