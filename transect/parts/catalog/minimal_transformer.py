"""Attention with fewer matrices, and no MLP (Bermeitinger et al. 2024, arXiv:2410.13732).

S_h = X M_h Xᵀ / sqrt(size) with one matrix M for queries and keys, which may be symmetric, and values that are merged
with the output, or are the input itself. Several heads work on slices of the stream (x as H blocks of d / H), since a
whole M for each would hold more numbers than the two that it replaces from three heads on; `Merged` has them whole, as
trained attention needs them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import TransectError
from ..attention import seen_by
from ..part import Around, Mixer, MLPPart
from ..rotary import rotated


def lower_triangles(numbers: Tensor, size: int) -> Tensor:
    """Lower triangular matrices (heads x size x size) from their rows one by one (heads x size (size + 1) / 2)."""
    rows, columns = torch.tril_indices(size, size, device=numbers.device)
    heads = torch.arange(len(numbers), device=rows.device)[:, None]
    return numbers.new_zeros(len(numbers), size, size).index_put((heads, rows, columns), numbers)


class Minimal(Mixer):
    """Softmax attention from one similarity matrix, with one matrix for values and output, or none.

    It knows no positions but those that are in the stream: with rotary positions between query and key the two
    matrices would not be one.

    similarity: `merged`, any M, or `symmetric`, M = T Tᵀ with T lower triangular, of which nothing else is stored.
    values: `merged`, one matrix P in the place of values and output, or `none`, so that every position is given a
        convex combination of the inputs.
    """

    kind = "mixer.minimal"
    paper = "arXiv:2410.13732"
    limit = "with one head and without positions, M = Wqᵀ Wk and P = Wo Wv it is softmax attention"
    cost = "N²"

    def __init__(
        self, width: int, heads: int, causal: bool, *, similarity: Literal["merged", "symmetric"] = "merged",
        values: Literal["merged", "none"] = "merged",
    ) -> None:  # fmt: skip
        super().__init__(causal)
        if width % heads:
            raise TransectError(f"{heads} heads do not divide a width of {width}")
        self.width, self.heads, self.similarity = width, heads, similarity
        size = width // heads
        shape = (size, size) if similarity == "merged" else (size * (size + 1) // 2,)
        self.factor = nn.Parameter(torch.randn(heads, *shape) * size**-0.5)  # M, or the rows of T one by one
        self.output = nn.Linear(width, width, bias=False) if values == "merged" else nn.Identity()

    def similarities(self) -> Tensor:
        """M of each head (heads x size x size)."""
        if self.similarity == "merged":
            return self.factor
        lower = lower_triangles(self.factor, self.width // self.heads)
        return lower @ lower.mT

    def mix(self, x: Tensor, around: Around) -> Tensor:
        parts = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B x heads x N x size
        count = x.shape[1]
        mask = seen_by(count, count, self.causal, around.real, x.device)
        y = functional.scaled_dot_product_attention(
            parts @ self.similarities(), parts, parts, attn_mask=mask, is_causal=mask is None and self.causal
        )
        return self.output(y.transpose(1, 2).flatten(2))

    @property
    def flops(self) -> int:
        return super().flops + 2 * self.width * (self.width // self.heads)

    def mixing_flops(self, length: int) -> int:
        return 4 * length * length * self.width


class Merged(Mixer):
    """Softmax attention whose queries and keys, values and output, or both pairs are one whole matrix for each head.

    S_h = (X M_h + c_h) Xᵀ / sqrt(head size) and y = Σ_h softmax(S_h) X P_hᵀ + b. In generation the input is kept in the
    place of the keys and values that are gone: d numbers a position if both are. With merged queries it knows no
    positions but those that are in the stream.

    queries: `merged`, M_h = Wqᵀ Wk (d x d); `symmetric`, M_h = T Tᵀ with T lower triangular, of which nothing else is
        stored; or `separate`, two matrices, turned by the model's rotary positions.
    values: `merged`, P_h = Wo Wv (d x d) of each head, or `separate`.
    bias: whether there are c, of which symmetric ones have one too, and b; and biases of the separate matrices.
    """

    kind = "mixer.merged"
    paper = "arXiv:2410.13732"
    limit = "with M = Wqᵀ Wk, c = Wkᵀ bq, P = Wo Wv and b = Wo bv + bo of each head it is softmax attention"
    cost = "N²"
    recurrent = True  # though its state grows
    roles = {"o": "o_proj"}

    def __init__(
        self, width: int, heads: int, key_value_heads: int, head_size: int, causal: bool, *,
        queries: Literal["merged", "symmetric", "separate"] = "merged",
        values: Literal["merged", "separate"] = "merged", bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(causal)
        self.width, self.heads, self.key_value_heads, self.head_size = width, heads, key_value_heads, head_size
        self.queries, self.values = queries, values
        self.shift = None
        if queries == "separate":
            self.q_proj = nn.Linear(width, heads * head_size, bias=bias)
            self.k_proj = nn.Linear(width, key_value_heads * head_size, bias=bias)
        else:
            shape = (width, width) if queries == "merged" else (width * (width + 1) // 2,)
            self.similarity = nn.Parameter(torch.randn(heads, *shape) / width)  # M, or the rows of T one by one
            self.shift = nn.Parameter(torch.zeros(heads, width)) if bias else None  # c
        if values == "separate":
            self.v_proj = nn.Linear(width, key_value_heads * head_size, bias=bias)
        of_a_head = width if values == "merged" else head_size
        self.o_proj = nn.Linear(heads * of_a_head, width, bias=bias)  # P_1 ... P_H side by side

    def factors(self) -> Tensor:
        """T of each head (heads x d x d)."""
        return lower_triangles(self.similarity, self.width)

    def similarities(self) -> Tensor:
        """M of each head (heads x d x d)."""
        if self.queries == "merged":
            return self.similarity
        lower = self.factors()
        return lower @ lower.mT

    def _queries(self, x: Tensor, around: Around) -> Tensor:
        """What meets the keys (B x heads x N x size)."""
        if self.queries == "separate":
            return rotated(self._by_heads(self.q_proj(x)), around.rotary)
        if self.queries == "merged":
            q = x[:, None] @ self.similarity
        else:
            lower = self.factors()
            q = x[:, None] @ lower @ lower.mT
        return q if self.shift is None else q + self.shift[:, None]

    def _by_heads(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        q = self._queries(x, around)
        new = {}
        if self.queries == "separate":
            new["k"] = rotated(self._by_heads(self.k_proj(x)), around.rotary)
        if self.values == "separate":
            new["v"] = self._by_heads(self.v_proj(x))
        if len(new) < 2:
            new["x"] = x[:, None]  # one head of both
        real = around.real
        if around.state is not None:
            new, real = _with_past(new, x, real, around.state)
        k, v = (
            one.repeat_interleave(self.heads // one.shape[1], dim=1)
            for one in (new.get("k", new.get("x")), new.get("v", new.get("x"))) if one is not None
        )  # fmt: skip
        mask = seen_by(q.shape[2], k.shape[2], self.causal, real, q.device)
        causal = mask is None and self.causal and q.shape[2] == k.shape[2]
        y = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.head_size**-0.5
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))

    @property
    def flops(self) -> int:
        if self.queries == "separate":
            return super().flops
        return super().flops + 2 * self.heads * self.width**2 * (2 if self.queries == "symmetric" else 1)

    def mixing_flops(self, length: int) -> int:
        sizes = (self.head_size if one == "separate" else self.width for one in (self.queries, self.values))
        return 2 * length * length * self.heads * sum(sizes)


def _with_past(
    new: dict[str, Tensor], x: Tensor, real: Tensor | None, state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """What is kept of all positions so far (B x heads x N x size, by name), and which of them are real (B x N)."""
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
    for name, tensor, dim in (*((name, tensor, 2) for name, tensor in new.items()), ("real", real, 1)):
        state[name] = torch.cat([state[name], tensor], dim=dim) if name in state else tensor
    return {name: state[name] for name in new}, state["real"]


class NoMLP(MLPPart):
    """Adds nothing: the block is attention alone."""

    kind = "mlp.none"
    paper = "arXiv:2410.13732"
    limit = "none: it does nothing"

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x
