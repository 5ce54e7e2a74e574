"""Is a structure as fast as its FLOPs promise? Every operator against a dense matrix of the same shape.

Square matrices at about half of the dense bytes (a narrow layer at 0.7), random numbers, without gradients: a batch of
positions as in prefill, and a single one as in decoding. Beside each measured time over the dense time stands the ratio
of FLOPs. No target: where a structure is slower than a dense matrix, the table says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from common import alternate, parser, ratio, show
from torch import nn

from transect.compression.integers import Grid, grouped
from transect.compression.two_four import best_two_of_four
from transect.operators import Bank, LowRank, Operator, flops_of
from transect.operators.atoms import Atoms
from transect.operators.block_diagonal import WrappedSparse
from transect.operators.dictionary import SparseDictionary
from transect.operators.grouped_integer import GroupedInteger
from transect.operators.monarch import Monarch
from transect.operators.scattered import LeadingColumns, ScatteredRows
from transect.operators.semi_structured import SemiStructured

_NARROW = 0.7
_HEAD = 64


def operators(size: int, like: torch.Tensor) -> dict[str, nn.Module]:
    """One of each, square, with random numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / size**0.5

    dense = random(size, size)
    mask = best_two_of_four(dense.abs())
    atoms, nonzeros = size // 3, size // 6
    picks = torch.rand(size, atoms, generator=generator).argsort(1)[:, :nonzeros]
    block = min(128, size)
    head = min(_HEAD, size)
    kept = (torch.arange(0, size, head)[:, None] + torch.arange(int(_NARROW * head))).flatten()
    monarch = Monarch(size, size, 4, 4, size // 16, False)
    for parameter in monarch.parameters():
        parameter.data = random(*parameter.shape)
    narrow = nn.Linear(size, int(_NARROW * size), bias=False)
    made: dict[str, Any] = {
        "low-rank": LowRank.from_factors(random(size, size // 4), random(size // 4, size)),
        "monarch, 4 blocks": monarch,
        "2:4": SemiStructured.from_dense(dense, mask),
        f"2:4 between blocks of {block}": WrappedSparse.from_parts(
            random(size // block, block, block), dense, mask, random(size // block, block, block), size
        ),
        "sparse dictionary": SparseDictionary.from_factors(random(atoms, size), random(size, nonzeros), picks),
        "2 shared atoms": Atoms.from_numbers("a", Bank(torch.stack([dense, dense])), True, random(2)),
        "narrow": narrow,
        **{f"{bits}-bit integers": integers(dense, bits, min(64, size)) for bits in (2, 4, 8)},
        "narrow heads, queries": ScatteredRows.from_rows(random(len(kept), size), kept, size),
        "narrow heads, output": LeadingColumns.from_columns(random(size, len(kept)), size // head, size),
    }
    return {name: module.to(like).eval().requires_grad_(False) for name, module in made.items()}


def integers(weight: torch.Tensor, bits: int, group: int) -> GroupedInteger:
    """A matrix rounded to the nearest of a few steps in each group."""
    values = grouped(weight, group)
    grid = Grid.of(values, bits, False)
    codes = grid.codes(values).flatten(1)[:, : weight.shape[1]].to(torch.uint8)
    return GroupedInteger.from_codes(codes, grid.scale, grid.zero, bits, group)


def dense_flops(size: int) -> int:
    """FLOPs of a square dense matrix applied to one vector."""
    return 2 * size * size


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> list[list[Any]]:
    """Time every operator against a dense matrix, print the table, and return its rows."""
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, nargs="+", help="default 512 1024 2048 4096")
    options.add_argument("--positions", type=int, help="in a batch; default 1024")
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32", help="e.g. bfloat16")
    chosen = options.parse_args(argv)
    positions = chosen.positions or (64 if chosen.quick else 1024)
    like = torch.empty(0, device=chosen.device, dtype=getattr(torch, chosen.dtype))
    rows: list[list[Any]] = []
    for size in chosen.hidden or ([64] if chosen.quick else [512, 1024, 2048, 4096]):
        linear = nn.Linear(size, size, bias=False).to(like).requires_grad_(False)
        candidates: dict[str, Any] = {"dense": linear, **operators(size, like)}
        times = {}
        for count in (positions, 1):
            x = torch.randn(count, size).to(like)
            repeats = chosen.repeats or (1 if chosen.quick else max(10, 4096 // size * 10))

            def run(module: nn.Module, x: torch.Tensor = x) -> None:
                module(x)
                if x.is_cuda:
                    torch.cuda.synchronize()

            times[count] = alternate({name: lambda m=m: run(m) for name, m in candidates.items()}, repeats)
        for name, module in candidates.items():
            measured = [ratio(times[count], name, "dense") for count in (positions, 1)]
            faster = [value < 0.97 for value in measured]
            told = "dense" if name == "dense" else "both" if all(faster) else "batch" if faster[0] else (
                "single" if faster[1] else "neither"
            )  # fmt: skip
            kernel = getattr(module, "kernel", "-") if isinstance(module, Operator) else "-"
            rows.append([f"{size}", name, *measured, flops_of(module) / dense_flops(size), told, kernel])
    show(
        f"Time over that of a dense matrix, {chosen.dtype} on {chosen.device}: {positions} positions, and one",
        ["size", "operator", f"time, {positions}", "time, 1", "FLOPs", "faster for", "kernel"],
        rows,
    )
    return rows


if __name__ == "__main__":
    main()
