"""Evaluation: loss, accuracy, knowledge, speed, memory and size, and the bridge to lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..forward.objective import Batch
from .harness import run_lm_eval
from .knowledge import recalls, says
from .loss import LossResult, evaluate_loss, standard_error
from .memory import peak_memory
from .operations import Operations, operations_of
from .quality import Quality, check_lengths, generates_alike, quality_of
from .size import checkpoint_bytes, matrix_bytes, model_bytes, parameters
from .speed import Speed, kernels_of, measure_speed

__all__ = [
    "LossResult",
    "Operations",
    "Quality",
    "Speed",
    "check_lengths",
    "checkpoint_bytes",
    "evaluate",
    "evaluate_loss",
    "generates_alike",
    "matrix_bytes",
    "measure_speed",
    "model_bytes",
    "operations_of",
    "parameters",
    "peak_memory",
    "quality_of",
    "recalls",
    "run_lm_eval",
    "says",
    "standard_error",
]


def evaluate(model: Any, batches: Iterable[Batch]) -> dict[str, Any]:
    """Everything that a table row shows about a model.

    loss (nats a prediction), its standard_error (None for a single example), examples (of each, its nats and number of
    predictions), perplexity, accuracy, tokens (predictions scored), seconds (of scoring them), parameters,
    bytes (of the whole model), prefill_tokens_per_second, decode_tokens_per_second (None unless causal), peak_memory
    (bytes, of the process so far), kernels (of the machine's that its operators use, for the speeds).
    """
    scores = evaluate_loss(model, batches)
    speed = measure_speed(model)
    return {
        **scores.to_row(),
        "perplexity": scores.perplexity,
        "accuracy": scores.accuracy,
        "tokens": scores.tokens,
        "parameters": parameters(model),
        "bytes": model_bytes(model),
        "prefill_tokens_per_second": speed.prefill_tokens_per_second,
        "decode_tokens_per_second": speed.decode_tokens_per_second,
        "peak_memory": peak_memory(model.device),
        "seconds": scores.seconds,
        "kernels": kernels_of(model),
    }
