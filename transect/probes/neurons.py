"""MLP neurons read through the unembedding, and neurons held at a value while the model runs.

A neuron has up to three vectors in the residual stream: a row of up and a row of gate, by which it reads, and a column
of down, which it writes. Scores of a vector w over the vocabulary are W_U w (V), and z = (max - mean) / std of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..anatomy import Block
from ..errors import TransectError
from ..forward import Lens
from ..forward.change import Change
from ..forward.lens import norm_centres, norm_gain

Vector = Literal["up", "gate", "down"]
KINDS: tuple[Vector, ...] = ("up", "gate", "down")
ENTRIES = 2**24  # numbers in one chunk of scores


def vectors(block: Block, which: Vector, lens: Lens | None = None) -> Tensor | None:
    """The vectors of a block's neurons in the residual stream (n x d), float32 or wider; None without such a matrix.

    With a lens, norms are folded in: rows of up and gate are multiplied by the gain of the norm that the MLP reads
    through, columns of down by the gains of the MLP's output norm and of the final norm, where there are such. A
    LayerNorm also subtracts the mean over the d coordinates. Without, the weights are as they are stored.
    """
    if block.mlp is None:  # dropped, or a part, which may have a matrix of that name, but no such neurons
        return None
    try:
        weight = block.matrix(which).weight
    except KeyError:
        return None
    found = wide(weight.T if which == "down" else weight)
    if lens is None:
        return found
    if which == "down":
        norms = [lens.norm] if block.post_norm else [block.norms.get("mlp_output"), lens.norm]
    else:
        norms = [] if block.post_norm else [block.norms.get("mlp_input")]
    for norm in norms:
        if norm is None:
            continue
        gain = wide(norm_gain(norm))
        if norm_centres(norm) and which == "down":  # it centres what it reads, then scales
            found = found - found.mean(1, keepdim=True)
        found = found * gain
        if norm_centres(norm) and which != "down":  # read backwards, it scales and then centres
            found = found - found.mean(1, keepdim=True)
    return found


def kinds_of(blocks: Sequence[Block]) -> list[Vector]:
    """Which of up, gate and down the blocks' MLPs have; none where every MLP was dropped, or is a part."""
    roles = {matrix.role for block in blocks if block.mlp is not None for matrix in block.matrices()}
    return [kind for kind in KINDS if kind in roles]


def output_norms(block: Block) -> Tensor:
    """Length of what each neuron adds to the stream for one unit of activation (n), before the stream is normalised."""
    columns = wide(block.matrix("down").weight)
    norm = None if block.post_norm else block.norms.get("mlp_output")
    if norm is not None:
        columns = columns * wide(norm_gain(norm))[:, None]
    return columns.norm(dim=0) * block.residual_multiplier


def scores(unembedding: Tensor, found: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Scores (rows x V) of vectors (n x d), a chunk of rows at a time, so that n x V never is in memory at once."""
    step = max(1, ENTRIES // len(unembedding))
    for start in range(0, len(found), step):
        rows = slice(start, min(start + step, len(found)))
        yield rows, found[rows] @ unembedding.T


def standardised(part: Tensor) -> Tensor:
    """Each row's distance from its mean over the vocabulary in standard deviations; 0 for a row without variation."""
    centred = part - part.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    floor = part.abs().amax(1, keepdim=True).clamp_min(torch.finfo(part.dtype).tiny) * 1e-6
    return torch.where(deviation > floor, centred / deviation.clamp_min(floor), 0)


def unembedding(lens: Lens, normalise: bool = False) -> Tensor:
    """W_U (V x d), float32 or wider. normalise: rows at length 1, so that long ones have no advantage."""
    weight = wide(lens.weight)
    return torch.nn.functional.normalize(weight, dim=1) if normalise else weight


def held(neurons: Sequence[int], values: Sequence[float] | Tensor) -> Change:
    """A change (see `changed`) that holds these entries of the last dimension at these values, at every position."""
    index, constants = torch.as_tensor(neurons, dtype=torch.long), torch.as_tensor(values)

    def hold(activations: Tensor) -> Tensor:
        wrong = [number for number in index.tolist() if not 0 <= number < activations.shape[-1]]
        if wrong:
            raise TransectError(f"neuron {wrong[0]} does not exist: there are 0 to {activations.shape[-1] - 1}")
        out = activations.clone()
        out[..., index.to(out.device)] = constants.to(out)
        return out

    return hold


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def readable(specimen: Any, tokens: Sequence[int]) -> str:
    """Some tokens for a sentence: quoted, with their spaces."""
    return ", ".join(repr(specimen.token(token)) for token in tokens)
