"""Channels between heads: directions that one writes and a later one reads (Merullo et al. 2024, arXiv:2406.09519).

A head writes W_OV x with W_OV = W_O W_V (d x d), and scores keys by W_QK = W_Qᵀ W_K (d x d). With the singular vectors
u_i of W_OV, component i is read by a later head through M in so far as ‖M u_i‖ / ‖M‖_F is large, where M is W_QKᵀ (the
query reads), W_QK (the key) or the later W_OV (the value). For random matrices that is about 1/√d.

The gains of the norms that a head reads through are folded into W_Q, W_K and W_V, and those behind it into W_O. Where
the norms centre (LayerNorm), so do we. Rotary embeddings are taken at offset 0. Biases are left out. Nothing of size
d x d is made: ‖M u‖ = ‖T u‖ with T of d_h rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....anatomy import Anatomy, Block
from ....errors import NotApplicable
from ....forward.lens import norm_centres, norm_gain

READS = ("query", "key", "value")


@dataclass(frozen=True)
class Heads:
    """The heads of one layer, in float64 (H heads).

    directions: u_i as columns (H x d x d_h). sizes: σ_i (H x d_h), from the largest. readers: T for each of READS
    (3 x H x d_h x d). basis: R of W_O = Q R, and `mix` the u_i in the basis Q (both H x d_h x d_h).
    """

    directions: Tensor
    sizes: Tensor
    readers: Tensor
    basis: Tensor
    mix: Tensor


def heads_of(anatomy: Anatomy, block: Block) -> Heads | None:
    """The heads of a block, factored; None where its attention was dropped."""
    attention = block.attention
    if attention is None:
        return None
    size, count = block.head_size, attention.heads
    shared = count // attention.key_value_heads
    norm, after = block.norms.get("attention_input"), block.norms.get("attention_output")
    if attention.v.shape[0] != size * attention.key_value_heads or attention.o.shape[1] != size * count:
        raise NotApplicable(f"the heads of block {block.index} are narrower than its config says: open the dense model")
    queries, keys, values = (
        _reading(matrix.weight.double(), norm) for matrix in (attention.q, attention.k, attention.v)
    )
    queries = _gained(queries.unflatten(0, (-1, size)), attention.q_norm)  # H x d_h x d
    keys = _gained(keys.unflatten(0, (-1, size)), attention.k_norm).repeat_interleave(shared, 0)
    values = values.unflatten(0, (-1, size)).repeat_interleave(shared, 0)
    writes = attention.o.weight.double()
    if after is not None:
        writes = norm_gain(after).double()[:, None] * writes
    if _centres(anatomy):
        writes = writes - writes.mean(0)
    writes = writes.unflatten(1, (count, size)).transpose(0, 1)  # H x d x d_h
    out, basis = torch.linalg.qr(writes)
    _, read = torch.linalg.qr(values.mT)
    mix, sizes, _ = torch.linalg.svd(basis @ read.mT)
    _, from_keys = torch.linalg.qr(keys.mT)
    _, from_queries = torch.linalg.qr(queries.mT)
    readers = torch.stack([from_keys @ queries, from_queries @ keys, basis @ values])
    return Heads(out @ mix, sizes, readers, basis, mix)


def composition(writer: Heads, reader: Heads) -> tuple[Tensor, Tensor]:
    """How strongly each head reads each head of an earlier layer.

    Returns scores in [0, 1] of whole heads (3 x H_writer x H_reader) and of components (3 x H_writer x d_h x H_reader).
    """
    total = reader.readers.square().sum((-2, -1))  # 3 x H_reader
    seen = torch.einsum("trhd,wdi->twirh", reader.readers, writer.directions).square().sum(-1)  # 3, writer, i, reader
    components = (seen / total[:, None, None]).sqrt()
    weight = writer.sizes.square()
    whole = ((seen * weight[None, :, :, None]).sum(2) / (total[:, None] * weight.sum(-1)[None, :, None])).sqrt()
    return whole.nan_to_num(), components.nan_to_num()


def scaled_component(heads: Heads, head: int, component: int, scale: float) -> Any:
    """A change of the point `heads` that scales what a head writes along u_i; 0 removes it.

    In weights it is W_O + (scale - 1) u uᵀ W_O.
    """
    along, back = _coordinates(heads, head, component)
    return _on_head(heads, head, lambda z: z + (scale - 1) * (z @ along)[..., None] * back)


def set_component(heads: Heads, head: int, component: int, value: float) -> Any:
    """A change of the point `heads` after which a head writes `value` along u_i; the rest of it stays."""
    along, back = _coordinates(heads, head, component)
    return _on_head(heads, head, lambda z: z + (value - z @ along)[..., None] * back)


def _coordinates(heads: Heads, head: int, component: int) -> tuple[Tensor, Tensor]:
    """(a, b) with uᵀ W_O z = a · z, and W_O b = u. z: a head's output before W_O (d_h)."""
    direction = heads.mix[head][:, component]
    return heads.basis[head].T @ direction, torch.linalg.solve(heads.basis[head], direction)


def _on_head(heads: Heads, head: int, function: Any) -> Any:
    size = heads.basis.shape[-1]

    def change(x: Tensor) -> Tensor:
        new = x.clone()
        new[..., head * size : (head + 1) * size] = function(x[..., head * size : (head + 1) * size].double()).to(x)
        return new

    return change


def _reading(weight: Tensor, norm: Any) -> Tensor:
    """W (rows x d) as it acts on the normalised stream, with the norm's gain, centred where the norm centres."""
    if norm is None:
        return weight
    weight = weight * norm_gain(norm).double()
    return weight - weight.mean(1, keepdim=True) if norm_centres(norm) else weight


def _gained(weight: Tensor, norm: Any) -> Tensor:
    """Rows (heads x d_h x d) with the gain of a norm on queries or keys, per head or over all of them."""
    if norm is None:
        return weight
    gain = norm_gain(norm).double()
    return weight * (gain if gain.numel() == weight.shape[1] else gain.view(weight.shape[:2]))[..., None]


def _centres(anatomy: Anatomy) -> bool:
    return norm_centres(anatomy.final_norm)
