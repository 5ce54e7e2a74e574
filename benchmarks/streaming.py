"""Does streaming compression need the same memory whatever the depth? Peak resident memory by number of blocks.

Writes random Llama checkpoints whose blocks are alike into a temporary folder, shard by shard, and compresses each with
`transect.compress(stream_to=...)` in a process of its own, which reports its peak: once with a method that needs a
forward pass (svd-llm) and once with one that needs gradients too (kfac-svd). Most of the peak is Python with torch and
transformers, so the table also shows what comes on top of that, beside the sizes of what is never held at once.

Target: the peaks for 8, 32 and 96 blocks within 10 % of one another.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from common import apart, heads, parser, show, token_batches, verdict
from safetensors.torch import save_file

import transect
from transect.evaluation import checkpoint_bytes, peak_memory

BLOCKS_A_SHARD = 4
MB = 1e6


def write_checkpoint(folder: Path, hidden: int, blocks: int, *, dtype: str = "float32", **shape: int) -> None:
    """A random Llama, a few blocks a shard, so that making it needs no more memory than one shard.

    shape: what its configuration has of its own, such as intermediate_size.
    """
    settings: dict[str, Any] = {
        "intermediate_size": hidden * 11 // 4, "num_attention_heads": heads(hidden),
        "num_key_value_heads": heads(hidden), **shape,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=blocks, vocab_size=1024, max_position_embeddings=1024,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype=dtype, pad_token_id=None, bos_token_id=0,
        eos_token_id=1, **settings,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()}
    shards: dict[int, list[str]] = {}
    for name in shapes:
        shards.setdefault(int(name.split(".")[2]) // BLOCKS_A_SHARD if ".layers." in name else -1, []).append(name)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, names in shards.items():
        file = f"model-{number + 2:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.ones(shapes[name], dtype=getattr(torch, dtype)) if "norm" in name
            else (torch.randn(shapes[name], generator=generator) * shapes[name][-1] ** -0.5).to(getattr(torch, dtype))
            for name in names
        }  # fmt: skip
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def peak() -> int:
    """Bytes of this process's peak resident set. Linux hands `ru_maxrss` on from the parent, but not this."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return peak_memory()
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def compress_here(folder: str, out: str, method: str, length: int, sequences: int) -> None:
    """Compress, and print the peak before (after all imports) and after it."""
    before = peak()
    batches = token_batches(sequences // 4, 4, length)
    transect.compress(folder, method, 0.6, batches, stream_to=out)
    print(json.dumps({"before": before, "peak": peak()}))


def compress_apart(**arguments: Any) -> dict[str, int]:
    """`compress_here` in a fresh process."""
    return apart(__file__, "--compress", arguments)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Measure the peak of every size and method, print the table, and return the numbers."""
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, help="default 256")
    options.add_argument("--blocks", type=int, nargs="+", help="default 8 32 96")
    options.add_argument("--methods", nargs="+", help="default svd-llm kfac-svd")
    options.add_argument("--length", type=int, help="tokens in a sequence; default 256")
    options.add_argument("--sequences", type=int, help="default 16")
    options.add_argument("--compress", help=argparse.SUPPRESS)
    chosen = options.parse_args(argv)
    if chosen.compress:
        compress_here(**json.loads(chosen.compress))
        return {}
    quick = chosen.quick
    hidden, depths = chosen.hidden or (32 if quick else 256), chosen.blocks or ([1, 3] if quick else [8, 32, 96])
    length, sequences = chosen.length or (16 if quick else 256), chosen.sequences or (4 if quick else 16)
    methods = chosen.methods or (["kfac-svd"] if quick else ["svd-llm", "kfac-svd"])
    measured: dict[str, list[dict[str, int]]] = {method: [] for method in methods}
    sizes = []
    for blocks in depths:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "dense"
            folder.mkdir()
            write_checkpoint(folder, hidden, blocks)
            sizes.append(checkpoint_bytes(folder))
            for method in methods:
                out = str(Path(temporary) / method)
                measured[method].append(
                    compress_apart(folder=str(folder), out=out, method=method, length=length, sequences=sequences)
                )
    rows, results = [], {}
    for method, found in measured.items():
        peaks = [one["peak"] for one in found]
        spread = results[method] = max(peaks) / min(peaks)
        for number, (blocks, one) in enumerate(zip(depths, found, strict=True)):
            last = number == len(depths) - 1
            rows.append(
                [
                    method, blocks, f"{sizes[number] / MB:.0f}", f"{one['peak'] / MB:.0f}",
                    f"{(one['peak'] - one['before']) / MB:.0f}", f"{spread:.3f}" if last else "",
                    verdict(spread <= 1.1) if last else "",
                ]
            )  # fmt: skip
    show(
        f"Peak resident memory of streaming compression: hidden {hidden}, {sequences} sequences of {length} tokens",
        ["method", "blocks", "model MB", "peak MB", "of it above imports", "largest / smallest peak", "<= 1.1"],
        rows,
    )
    return results


if __name__ == "__main__":
    main()
