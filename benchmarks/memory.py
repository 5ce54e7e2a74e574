"""What a streamed comparison needs: memory by number of blocks, and memory and time for blocks of an 8B model's shape.

Random Llama checkpoints whose blocks are alike are written into a temporary folder, and each is compared with
`transect.compare(stream=True)` in a process of its own, which reports its peak.

- `depth`: blocks of one size, 8, 32 and 96 of them. Target: the peaks within 10 % of one another.
- `llama-3-8b`: two blocks of Llama-3-8B's shape (hidden 4096, MLP 14,336, 32 heads, 8 of keys and values, bfloat16),
  each method in a process of its own. Target: a peak below 12 GB. The seconds a block are the row's (its statistics,
  factorization and replacement) over the number of blocks: times 32 that is the whole model's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import apart, parser, show, token_batches, verdict
from streaming import peak, write_checkpoint

import transect
from transect.evaluation import checkpoint_bytes

METHODS = ("svd-llm", "kfac-svd", "gptq", "modegpt")
LLAMA_3_8B = {"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
MB, GB = 1e6, 1e9


def compare_here(folder: str, out: str, methods: list[str], keep: float, length: int, sequences: int) -> None:
    """Compare, and print the peak before (after all imports) and after it, and the seconds of each method's row."""
    before = peak()
    data, held_out = token_batches(sequences // 4, 4, length), token_batches(1, 4, length, seed=2)
    frame = transect.compare(folder, methods, [keep], data, held_out, out, stream=True, accumulate=torch.float32)
    seconds = dict(zip(frame["method"], frame["compress_seconds"], strict=True))
    print(json.dumps({"before": before, "peak": peak(), "seconds": seconds}))


def compare_apart(**arguments: Any) -> dict[str, Any]:
    """`compare_here` in a fresh process."""
    return apart(__file__, "--compare", arguments)


def depth(hidden: int, depths: Sequence[int], length: int, sequences: int) -> float:
    """Peaks by number of blocks; returns the largest over the smallest."""
    found, sizes = [], []
    for blocks in depths:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "dense"
            folder.mkdir()
            write_checkpoint(folder, hidden, blocks)
            sizes.append(checkpoint_bytes(folder))
            found.append(
                compare_apart(
                    folder=str(folder), out=f"{temporary}/run", methods=list(METHODS), keep=0.6, length=length,
                    sequences=sequences,
                )
            )  # fmt: skip
    spread = max(one["peak"] for one in found) / min(one["peak"] for one in found)
    rows = [
        [
            blocks, f"{size / MB:.0f}", f"{one['peak'] / MB:.0f}", f"{(one['peak'] - one['before']) / MB:.0f}",
            f"{spread:.3f}" if last else "", verdict(spread <= 1.1) if last else "",
        ]
        for blocks, size, one, last in zip(
            depths, sizes, found, [False] * (len(found) - 1) + [True], strict=True
        )
    ]  # fmt: skip
    show(
        f"Peak resident memory of `compare --stream`: {', '.join(METHODS)}; hidden {hidden}, {sequences} sequences of "
        f"{length} tokens",
        ["blocks", "model MB", "peak MB", "of it above imports", "largest / smallest peak", "<= 1.1"],
        rows,
    )
    return spread


def eight_billion(
    hidden: int, blocks: int, methods: Sequence[str], length: int, sequences: int, **shape: int
) -> dict[str, float]:
    """Peak in GB by method, for blocks of one shape."""
    rows, peaks = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "dense"
        folder.mkdir()
        write_checkpoint(folder, hidden, blocks, dtype="bfloat16", **shape)
        for method in methods:
            one = compare_apart(
                folder=str(folder), out=f"{temporary}/{method}", methods=[method], keep=0.6, length=length,
                sequences=sequences,
            )  # fmt: skip
            peaks[method] = one["peak"] / GB
            seconds = one["seconds"][method] / blocks
            rows.append([method, f"{peaks[method]:.1f}", f"{seconds:.0f}", verdict(peaks[method] < 12)])
    show(
        f"{blocks} blocks of hidden size {hidden}, {shape}, bfloat16; {sequences} sequences of {length} tokens",
        ["method", "peak GB", "seconds a block", "< 12 GB"],
        rows,
    )
    return peaks


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Measure both, print the tables, and return the numbers."""
    options = parser(__doc__)
    options.add_argument("--only", choices=["depth", "llama-3-8b"], help="default both")
    options.add_argument("--methods", nargs="+", default=list(METHODS), help="of the second part")
    options.add_argument("--compare", help=argparse.SUPPRESS)
    chosen = options.parse_args(argv)
    if chosen.compare:
        compare_here(**json.loads(chosen.compare))
        return {}
    quick, results = chosen.quick, {}
    if chosen.only != "llama-3-8b":
        results["depth"] = depth(*((32, [1, 3], 16, 4) if quick else (256, [8, 32, 96], 256, 16)))
    if chosen.only != "depth":
        sizes = (64, 1, chosen.methods[:1], 16, 4) if quick else (4096, 2, chosen.methods, 512, 16)
        shape = {"intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2} if quick else LLAMA_3_8B
        results |= eight_billion(*sizes, **shape)
    return results


if __name__ == "__main__":
    main()
