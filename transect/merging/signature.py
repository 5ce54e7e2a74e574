"""Robust weight signatures: what a robust training has changed beyond an ordinary one, stored in few bits.

With one start θ_0, a clean training θ_c and a robust one θ_k of it, tensor by tensor: a = θ_c - θ_0, b = θ_k - θ_0 and
v = b - (a·b / a·a) a, the part of the robust update that is orthogonal to the clean one (Cai et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..errors import BadCheckpoint, TransectError
from ..store import keep, verified
from .registry import tensors_of

FILE = "signature.safetensors"
KIND = "a robust weight signature"
Numbers = Mapping[str, Tensor]


def signature_of(base: Numbers, clean: Numbers, robust: Numbers, names: Iterable[str]) -> dict[str, Tensor]:
    """v of the tensors of these names, in float32. Where the clean training changed nothing it is all of b."""
    found = {}
    for name in names:
        start = base[name].double()
        a, b = clean[name].double() - start, robust[name].double() - start
        length = a.square().sum()
        share = (a * b).sum() / length if length > 0 else 0.0
        found[name] = (b - share * a).float()
    return found


def shallow_names(anatomy: Anatomy, depth: float) -> list[str]:
    """The tensors of the shallowest share of the blocks, with what comes before them; all of the model at 1.

    In the order in which blocks run. Of what is outside the blocks, the final norm and what follows it come last; an
    embedding that is also the unembedding counts as what comes first.
    """
    names = list(tensors_of(anatomy.model))
    if depth == 1:
        return names
    blocks = anatomy.blocks
    first = max(1, round(depth * len(blocks)))
    within = tuple(f"{block.path}." for block in blocks[:first])
    behind = {id(tensor) for module in (anatomy.final_norm, anatomy.unembedding) if module is not None
              for tensor in module.parameters()} - {id(one) for one in anatomy.embedding.parameters()}  # fmt: skip
    tensors = dict(anatomy.model.named_parameters())
    root = blocks[0].path.rpartition(".")[0] + "."
    body = blocks[0].path.removesuffix(f"{anatomy.architecture.blocks}.0")  # a task's head is outside of it

    def chosen(name: str) -> bool:
        if name.startswith(root):
            return name.startswith(within)
        return name.startswith(body) and id(tensors.get(name)) not in behind

    return [name for name in names if chosen(name)]


def rounded(values: Numbers, levels: int) -> dict[str, Tensor]:
    """The values on a uniform grid of so many levels between each tensor's least and largest; 0 leaves them."""
    if levels == 0:
        return dict(values)
    found = {}
    for name, tensor in values.items():
        low, step = _grid(tensor, levels)
        found[name] = (low + step * _codes(tensor, low, step, levels)).float().reshape(tensor.shape)
    return found


def _grid(tensor: Tensor, levels: int) -> tuple[float, float]:
    """The least value and the distance between two levels."""
    low, high = float(tensor.min()), float(tensor.max())
    return low, (high - low) / (levels - 1)


def _codes(tensor: Tensor, low: float, step: float, levels: int) -> Tensor:
    if step == 0:
        return torch.zeros(tensor.numel(), dtype=torch.float64)
    return ((tensor.double().flatten() - low) / step).round().clamp(0, levels - 1)


def write_signature(path: Path, values: Numbers, levels: int) -> None:
    """Write a signature: of each tensor the numbers of its levels, ⌈log2 levels⌉ bits each; with 0 levels float32."""
    if levels == 0:
        keep(path, values, KIND, {"levels": 0})
        return
    packed, described = {}, {}
    for name, tensor in values.items():
        low, step = _grid(tensor, levels)
        packed[name] = _pack(_codes(tensor, low, step, levels), bits_of(levels))
        described[name] = {"shape": list(tensor.shape), "low": low, "step": step}
    keep(path, packed, KIND, {"levels": levels, "tensors": described})


def read_signature(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a signature, by the parameter's name, in float32.

    source: its file, or a folder that holds one under the usual name. BadCheckpoint where it is none, or damaged.
    """
    path = Path(source).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise BadCheckpoint(f"there is no signature {path}: `transect merge --method rws` writes one")
    try:
        stored = verified(path, KIND)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path} is no robust weight signature, or not as it was written: {error}") from None
    levels = stored.note["levels"]
    if levels == 0:
        return dict(stored)
    found = {}
    for name, one in stored.note["tensors"].items():
        codes = _unpack(stored[name], bits_of(levels), math.prod(one["shape"]))
        found[name] = (one["low"] + one["step"] * codes).float().reshape(one["shape"])
    return found


def bits_of(levels: int) -> int:
    """Bits that hold the number of a level."""
    return max(1, math.ceil(math.log2(levels)))


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits as bytes, behind one another without gaps, the highest bit first."""
    numbers = codes.numpy().astype(np.uint32)
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint32)
    return torch.from_numpy(np.packbits(((numbers[:, None] >> shifts) & 1).astype(np.uint8)))


def _unpack(stored: Tensor, bits: int, count: int) -> Tensor:
    ones = np.unpackbits(stored.numpy(), count=count * bits).reshape(count, bits).astype(np.float64)
    return torch.from_numpy(ones @ 2.0 ** np.arange(bits - 1, -1, -1))


def refuse_other_tensors(values: Numbers, model: dict[str, Tensor]) -> None:
    """TransectError where a signature has a tensor that the model has not, or of another shape; names it."""
    for name, tensor in values.items():
        if name not in model:
            raise TransectError(f"the signature is of another model: this one has no tensor {name}")
        if tensor.shape != model[name].shape:
            raise TransectError(
                f"the signature is of another model: its {name} is {list(tensor.shape)}, and this model's "
                f"{list(model[name].shape)}"
            )


def cosine(one: Numbers, other: Numbers) -> float:
    """Of the angle between two signatures of the same tensors."""
    products = [sum(float((a[name].double() * b[name].double()).sum()) for name in one)
                for a, b in ((one, other), (one, one), (other, other))]  # fmt: skip
    return products[0] / max((products[1] * products[2]) ** 0.5, 1e-300)
