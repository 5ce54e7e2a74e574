"""Is a model with fewer neurons, heads or sublayers faster? Prefill and decoding of a random Llama, before and after.

modegpt, amp and llm-drop at keep 0.7, calibrated on random tokens. As in low_rank.py the vocabulary is small and the
head reads the last position only, so that the blocks are what is measured.

Targets: prefill at least 1.25 times faster than the dense model, and decoding no slower; hidden size 1024.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from common import alternate, generation_options, llama, ratio, show, token_batches, verdict
from low_rank import decode, prefill

import transect
from transect.anatomy import Anatomy
from transect.operators import flops_of

METHODS = ("modegpt", "amp", "llm-drop")
_DECODE = 1.0


def matrix_flops(model: Any) -> int:
    """FLOPs of all the model's matrices for one position."""
    return sum(flops_of(matrix.module) for matrix in Anatomy(model).matrices())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Time every method against the dense model, print the table, and return how many times faster each phase is."""
    chosen = generation_options(__doc__, argv, keep=0.7, repeats=11)
    prompt, steps = chosen.prompt, chosen.steps
    dense = llama(chosen.hidden, chosen.blocks)
    data = token_batches(2, 4, prompt)
    models = {"dense": dense}
    for method in METHODS:
        models[method] = transect.compress(copy.deepcopy(dense), method, chosen.keep, data)
    ids = token_batches(1, chosen.batch_size, prompt).batches[0]["input_ids"]
    candidates: dict[str, Any] = {}
    for name, model in models.items():
        candidates[f"prefill {name}"] = lambda model=model: prefill(model, ids)
        candidates[f"decode {name}"] = lambda model=model: decode(model, ids, steps)
    with torch.no_grad():
        seconds = alternate(candidates, chosen.repeats)
    rows, results = [], {}
    whole = Anatomy(dense).matrix_bytes()
    for name in METHODS:
        model = models[name]
        row: list[Any] = [name, Anatomy(model).matrix_bytes() / whole, matrix_flops(dense) / matrix_flops(model)]
        for phase, tokens, target in (("prefill", prompt, 1.25), ("decode", steps, _DECODE)):
            faster = results[f"{phase} {name}"] = ratio(seconds, f"{phase} dense", f"{phase} {name}")
            row += [chosen.batch_size * tokens / median(seconds[f"{phase} {name}"]), faster, verdict(faster >= target)]
        rows.append(row)
    show(
        f"keep {chosen.keep:g}: Llama of {chosen.blocks} blocks, hidden {chosen.hidden}, float32, "
        f"batch {chosen.batch_size}, prompt {prompt}",
        ["", "kept", "fewer FLOPs", "prefill tokens/s", "faster", ">= 1.25", "decode tokens/s", "faster ", ">= 1"],
        rows,
    )  # fmt: skip
    return results


if __name__ == "__main__":
    main()
