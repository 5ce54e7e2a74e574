"""Is a low-rank model faster? Prefill and decoding of a random Llama before and after `svd` at keep 0.5.

The vocabulary is small (1024) and the head reads the last position only, as `generate` does, so that the blocks are
what is measured. The FLOP ratio beside the measured one is that of the whole pass, attention included.

Target: prefill at least 1.5 times faster than the dense model, hidden size 1024, batch 8.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from common import alternate, generation_options, llama, ratio, show, token_batches, verdict
from torch import Tensor

import transect
from transect.anatomy import Anatomy
from transect.operators import flops_of


def prefill(model: Any, ids: Tensor) -> Any:
    """Read the prompt; logits of its last position only."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def decode(model: Any, ids: Tensor, steps: int) -> None:
    """A short prompt, then `steps` greedy tokens one at a time."""
    output = prefill(model, ids[:, :4])
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)


def multiply_adds(model: Any, positions: int, cached: float) -> float:
    """Of a pass over `positions` positions of one sequence that attend to `cached` each, and the head once."""
    anatomy = Anatomy(model)
    matrices = sum(flops_of(matrix.module) / 2 for matrix in anatomy.matrices())
    attention = sum(2 * cached * block.find("o").shape[1] for block in anatomy.blocks)
    return positions * (matrices + attention) + model.get_output_embeddings().weight.numel()


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Time both models, print the table, and return how many times faster each phase is."""
    chosen = generation_options(__doc__, argv, keep=0.5, repeats=15)
    prompt, steps = chosen.prompt, chosen.steps
    dense = llama(chosen.hidden, chosen.blocks)
    small = transect.compress(copy.deepcopy(dense), "svd", chosen.keep)
    ids = token_batches(1, chosen.batch_size, prompt).batches[0]["input_ids"]
    seconds = alternate(
        {
            "prefill dense": lambda: prefill(dense, ids),
            "prefill svd": lambda: prefill(small, ids),
            "decode dense": lambda: decode(dense, ids, steps),
            "decode svd": lambda: decode(small, ids, steps),
        },
        chosen.repeats,
    )
    rows, results = [], {}
    for phase, tokens, shape in (("prefill", prompt, (prompt, prompt / 2)), ("decode", steps, (1, steps / 2))):
        speeds = [chosen.batch_size * tokens / median(seconds[f"{phase} {which}"]) for which in ("dense", "svd")]
        faster = results[phase] = ratio(seconds, f"{phase} dense", f"{phase} svd")
        fewer = multiply_adds(dense, *shape) / multiply_adds(small, *shape)
        rows.append([phase, *speeds, faster, fewer, verdict(faster >= 1.5) if phase == "prefill" else "no target"])
    show(
        f"svd at keep {chosen.keep:g}: Llama of {chosen.blocks} blocks, hidden {chosen.hidden}, float32, "
        f"batch {chosen.batch_size}, prompt {prompt}",
        ["", "dense tokens/s", "low-rank tokens/s", "times faster", "times fewer FLOPs", ">= 1.5"],
        rows,
    )
    return results


if __name__ == "__main__":
    main()
