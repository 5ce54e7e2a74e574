"""Do the weights that `gptq` makes equal those of llm-compressor, given the same weights and second moments?

Random matrices, inputs whose features differ in size and depend on each other, and every number of bits, with a zero
point and without. llm-compressor takes its grids as an argument, and two things are therefore looked at:

- "own grids", columns in order of activation (`act_order`): both lay the grids over the weights as they come, each with
  its own code (llm-compressor by compressed-tensors), scales in bfloat16. The whole of either method is compared.
- "our grids", columns in their natural order: `gptq` lays a group's grid over its weights as they are when the group's
  turn comes, as the authors of GPTQ do; llm-compressor always over the weights as they come. It is given ours, and the
  rounding with its compensation is compared.

Both damp by 1 % of the mean of the diagonal. llm-compressor inverts and factorizes in float32, `gptq` in float64. So a
weight that lies half-way between two points may fall on either, and what follows in its row makes up for another error.
Rows whose first difference is one step of the grid are such ties; they are counted and left out.

Target: no other difference above 1e-4, and ties in at most 5 % of the rows.

llm-compressor is needed: `pip install --no-deps llmcompressor`, beside `pip install -e '.[compressed-tensors]' loguru`.
Without --no-deps it would bring another version of torch and transformers. Tried with 0.14.0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from common import parser, show, verdict
from torch import Tensor

from transect.compression import method
from transect.operators.grouped_integer import BITS

_TIES = 0.05  # share of the rows


def problem(d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """W (d_out x d_in) and E[x xᵀ] (d_in x d_in), float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=generator)
    mixing = torch.eye(d_in) + torch.randn(d_in, d_in, generator=generator) / d_in**0.5
    sizes = torch.linspace(0.3, 3, d_in)[torch.randperm(d_in, generator=generator)]
    inputs = torch.randn(4 * d_in, d_in, generator=generator) @ mixing * sizes
    return weight, inputs.T @ inputs / len(inputs)


def difference(
    weight: Tensor, moments: Tensor, bits: int, group: int, symmetric: bool, own: bool
) -> tuple[float, float]:
    """The largest difference of `gptq` from llm-compressor in rows without a tie, and the share of the others.

    own: whether llm-compressor lays its own grids.
    """
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight  # pyright: ignore[reportMissingImports]

    made = method("gptq").function(
        weight.double(), moments.double(), bits=bits, group=group, symmetric=symmetric, act_order=own
    )
    settings: Any = dict(num_bits=bits, symmetric=symmetric, strategy="group", group_size=group)
    settings["actorder"] = "weight" if own else None
    arguments = QuantizationArgs(**settings)
    groups = weight.unflatten(1, (-1, group))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    steps = made.scale.detach().float()
    if not own:
        scale, zeros = steps, made.integers()[1]
        zero = zero if zeros is None else (zeros.int() - 2 ** (bits - 1)).to(zero.dtype)  # theirs are signed
    theirs, _, failed = quantize_weight(
        weight.clone()[None], moments.clone()[None], scale.bfloat16().float()[None], zero[None], None, arguments
    )
    assert not failed.any()

    diagonal = moments.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if own else torch.arange(len(diagonal))
    apart = (made.to_dense().detach() - theirs[0]).abs()[:, order]
    first = (apart > 1e-4).int().argmax(1, keepdim=True)  # 0 where there is none
    in_steps = apart.gather(1, first) / steps.gather(1, order[first] // group)
    tie = ((in_steps - 1).abs() < 1e-3)[:, 0]
    return float(apart[~tie].max()), float(tie.float().mean())


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Compare, print the table, and return the largest differences."""
    options = parser(__doc__)
    options.add_argument("--shape", type=int, nargs=2, metavar=("D_OUT", "D_IN"), help="default 512 1536")
    options.add_argument("--group", type=int, default=64, help="a divisor of D_IN; default 64")
    chosen = options.parse_args(argv)
    shape = tuple(chosen.shape or ((48, 256) if chosen.quick else (512, 1536)))
    if shape[1] % chosen.group:
        raise SystemExit(f"llm-compressor wants groups that divide the columns: {shape[1]} are no multiple of --group")
    try:
        import llmcompressor  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"llm-compressor is missing ({error}); `--help` says how to install it") from None

    weight, moments = problem(shape[0], shape[1])
    rows, found = [], []
    for own in (True, False):
        for bits in BITS:
            for symmetric in (False, True):
                largest, ties = difference(weight, moments, bits, chosen.group, symmetric, own)
                met = verdict(largest <= 1e-4 and ties <= _TIES)
                kind = "symmetric" if symmetric else "zero point"
                rows.append(["own" if own else "ours", str(bits), kind, f"{largest:.1e}", f"{ties:.4f}", met])
                found.append(largest)
    show(
        f"gptq against llm-compressor: a {shape[0]} x {shape[1]} matrix in groups of {chosen.group}",
        ["its grids", "bits", "", "largest difference", "rows with a tie", "target"],
        rows,
        [f"Weights reach {weight.abs().max():.2f}."],
    )
    return found


if __name__ == "__main__":
    main()
