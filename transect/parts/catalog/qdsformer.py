"""Doubly stochastic attention (Born et al., NeurIPS 2025, arXiv:2504.16275; Sinkformers, arXiv:2110.11773).

The softmax of the logits M = q kᵀ / sqrt(head size) is replaced by a matrix whose rows and columns both sum to 1, so
that every position is attended equally in total and the mean over positions passes unchanged. It is not for causal
models: a lower triangular matrix of that kind is the identity.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...arguments import Range
from ...errors import TransectError
from ...parameters import Seed
from ..attention import Attention
from ..part import Around
from ..precision import wide

_NOISE = 1e-7  # standard deviation of what is added to logits for a basis, which may depend on one another
_QUBITS = 10  # at most, of a simulated circuit: its matrix has 4^qubits entries


class QDSFormer(Attention):
    """Attention by doubly stochastic matrices, from any of four operators; everything is simulated classically.

    operator: `sinkhorn`, rows and columns normed in turn; `qr`, squares of the orthonormal basis that Gram-Schmidt
        makes of the logits' columns, so that the order of positions counts; `direct`, the nearest such matrix;
        `circuit`, mean squares of a unitary matrix from rotations of qubits by the logits, our stand-in for the
        paper's circuit.
    steps: how often rows or columns are normed, an odd number so that rows come last (1 is softmax attention); of
        `direct`, of Dykstra's alternating projections.
    auxiliary: qubits of the circuit besides those that number the positions.
    layers: of the circuit; 0 for as many as let every logit in.
    seed: of the circuit's angles, which are not trained.
    """

    kind = "mixer.qdsformer"
    paper = "arXiv:2504.16275"
    limit = "with sinkhorn and one step it is softmax attention"
    can_be = ("bidirectional",)
    cost = "N²; N³ for qr, and the square of N 2^auxiliary for each gate of the circuit"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *,
        operator: Literal["sinkhorn", "qr", "direct", "circuit"] = "sinkhorn",
        steps: Annotated[int, Range(1, 10_001)] = 21, auxiliary: Annotated[int, Range(0, 8)] = 1,
        layers: Annotated[int, Range(0, 10_000)] = 0, seed: Seed = 0,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal)
        if operator == "sinkhorn" and steps % 2 == 0:
            raise TransectError(f"sinkhorn ends with the rows after an odd number of steps, not {steps}")
        self.operator, self.steps = operator, steps
        self.auxiliary, self.layers, self.seed = auxiliary, layers, seed

    def attend(self, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
        logits = wide(q @ k.mT) * self.head_size**-0.5
        real = q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if around.real is None else around.real
        return self.matrix(logits, real).to(v) @ v

    def matrix(self, logits: Tensor, real: Tensor) -> Tensor:
        """The attention matrix (B x h x N x N), doubly stochastic among the real positions, of B x N."""
        if self.operator == "sinkhorn":
            return sinkhorn(alone(logits, real, float("-inf"), 0.0), self.steps)
        if self.operator == "qr":
            return squared_basis(alone(logits, real, 0.0, 1.0), self.head_size)
        if self.operator == "direct":
            return nearest(logits, real, self.steps)
        count = logits.shape[-1]
        unitary = circuit(alone(logits, real, 0.0, 0.0), self.auxiliary, self.layers, self.seed)
        return censored(block_means(unitary, self.auxiliary), real)[..., :count, :count]

    def mixing_flops(self, length: int) -> int:
        entries, qubits = length * length, _positions_qubits(length) + self.auxiliary
        layers = self.layers or -(-entries // (2 * qubits))
        operator = {
            "sinkhorn": 4 * self.steps * entries, "qr": 8 * entries * length // 3, "direct": 8 * self.steps * entries,
            "circuit": layers * qubits * 14 * 4**qubits,
        }[self.operator]  # fmt: skip
        return self.heads * (4 * entries * self.head_size + operator)


def alone(logits: Tensor, real: Tensor, apart: float, itself: float) -> Tensor:
    """The logits (B x h x N x N), with `apart` between padding and all else and `itself` from padding to itself."""
    both = (real[:, :, None] & real[:, None, :])[:, None]
    own = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    return logits.masked_fill(~both, apart).masked_fill(~both & own, itself)


def sinkhorn(logits: Tensor, steps: int) -> Tensor:
    """exp(M + u 1ᵀ + 1 vᵀ) with u (rows, in steps 1, 3, ...) and v (columns, in steps 2, 4, ...) that norm to 1.

    Sinkformers, Section 3, but for the gradient, which their code stops at v and which here takes all steps back.
    """
    rows, columns = logits.new_zeros(()), logits.new_zeros(())
    for step in range(steps):
        if step % 2 == 0:
            rows = -torch.logsumexp(logits + columns, dim=-1, keepdim=True)
        else:
            columns = -torch.logsumexp(logits + rows, dim=-2, keepdim=True)
    return (logits + rows + columns).exp()


def squared_basis(logits: Tensor, rank: int) -> Tensor:
    """U ∘ U of M = U R with orthonormal U (... x N x N).

    rank: of M at most. The columns of U behind it depend on rounding alone and take no gradient, which would be as
    large as the noise is small.
    """
    noise = torch.randn(
        logits.shape[-2:], generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    )
    wide = logits.double() + _NOISE * noise.to(logits.device)
    basis = torch.linalg.qr(wide[..., :rank]).Q
    if rank < wide.shape[-1]:
        rest = torch.linalg.qr(wide.detach()).Q[..., rank:]
        basis = torch.cat([basis, rest], dim=-1)
    return basis.square().to(logits.dtype)


def nearest(logits: Tensor, real: Tensor, steps: int) -> Tensor:
    """The doubly stochastic matrix nearest to M (least squares), among real positions; 0 elsewhere.

    Dykstra's algorithm between matrices whose rows and columns sum to 1 and those without negative entries; after few
    steps the sums are not exact.
    """
    both = (real[:, :, None] & real[:, None, :])[:, None].to(logits)
    there, count = real[:, None, :, None].to(logits), real.sum(1).clamp(min=1)[:, None, None, None].to(logits)
    matrix, left = logits * both, torch.zeros_like(logits)
    for _ in range(steps):
        rows = there - matrix.sum(-1, keepdim=True)
        columns = there.mT - matrix.sum(-2, keepdim=True)
        matrix = matrix + both * (rows + columns - rows.sum(-2, keepdim=True) / count) / count
        matrix = matrix + left
        left = matrix.clamp(max=0)
        matrix = matrix - left
    return matrix


def circuit(logits: Tensor, auxiliary: int, layers: int, seed: int) -> Tensor:
    """A unitary matrix (... x S x S, S = 2^(qubits)) from M (... x N x N), row by row turned into angles.

    Each layer turns every qubit about y and then z by θ ∘ M, θ uniform in (-1, 1) and the entries of M repeated or cut
    to as many, and changes the sign where two neighbouring qubits of the ring are 1 (controlled Z).
    """
    qubits = _positions_qubits(logits.shape[-1]) + auxiliary
    if qubits > _QUBITS:
        raise TransectError(
            f"a circuit for {logits.shape[-1]} positions with {auxiliary} auxiliary qubits has {qubits} qubits, and "
            f"{_QUBITS} can be simulated: take fewer positions, or the operator sinkhorn or qr"
        )
    entries = logits.flatten(-2)
    layers = layers or -(-entries.shape[-1] // (2 * qubits))
    count = layers * qubits * 2
    draw = torch.Generator().manual_seed(seed)
    theta = 2 * torch.rand(count, generator=draw, dtype=torch.float64, device="cpu").to(entries) - 1
    angles = theta * entries[..., torch.arange(count, device=entries.device) % entries.shape[-1]]
    about_y, about_z = (angles / 2).unflatten(-1, (layers, qubits, 2)).unbind(-1)
    gates = _rotations(about_y, about_z)  # ... x layers x qubits x 2 x 2
    size = 2**qubits
    signs = _ring_signs(qubits, entries)
    unitary = torch.eye(size, dtype=gates.dtype, device=gates.device).expand(*logits.shape[:-2], size, size)
    for layer in range(layers):
        for qubit in range(qubits):
            split = unitary.unflatten(-2, (2**qubit, 2, -1))
            gate = gates[..., layer, qubit, :, :]
            unitary = torch.einsum("...ab,...lbrc->...larc", gate, split).flatten(-4, -2)
        unitary = signs[:, None] * unitary
    return unitary


def _rotations(about_y: Tensor, about_z: Tensor) -> Tensor:
    """RZ RY for half angles (...): ... x 2 x 2."""
    cos, sin = about_y.cos(), about_y.sin()
    turned = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    phases = torch.polar(torch.ones_like(about_z), about_z)
    return torch.stack([phases.conj(), phases], -1)[..., None] * turned


def _ring_signs(qubits: int, like: Tensor) -> Tensor:
    """(-1)^(neighbours in the ring of qubits that both are 1), of every state (2^qubits)."""
    states = torch.arange(2**qubits, device=like.device)
    ones = (states[:, None] >> torch.arange(qubits, device=like.device)) & 1
    both = (ones * ones.roll(1, 1)).sum(1) if qubits > 2 else ones.prod(1) * (qubits == 2)
    return (1 - 2 * (both % 2)).to(like)


def _positions_qubits(count: int) -> int:
    """Qubits that number so many positions, at least one."""
    return max(1, math.ceil(math.log2(count)))


def block_means(unitary: Tensor, auxiliary: int) -> Tensor:
    """2^-a Σ |U_(a, i), (b, j)|² over the blocks of 2^a auxiliary states: doubly stochastic for every unitary U."""
    blocks = 2**auxiliary
    squares = unitary.real.square() + unitary.imag.square() if unitary.is_complex() else unitary.square()
    return squares.unflatten(-2, (blocks, -1)).unflatten(-1, (blocks, -1)).sum((-4, -2)) / blocks


def censored(matrix: Tensor, real: Tensor) -> Tensor:
    """The walk of a doubly stochastic matrix (B x h x S x S) as seen at the real ones of its first N states alone.

    A_rr + A_rp (I - A_pp)⁻¹ A_pr, which is doubly stochastic again; rows and columns of the others are left as they
    come. real: B x N.
    """
    if bool(real.all()) and real.shape[1] == matrix.shape[-1]:
        return matrix
    hidden = torch.ones(real.shape[0], matrix.shape[-1], dtype=torch.bool, device=real.device)
    hidden[:, : real.shape[1]] = ~real
    rows, columns = hidden[:, None, :, None].to(matrix), hidden[:, None, None, :].to(matrix)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    through = torch.linalg.solve(identity - rows * matrix * columns, rows * matrix)
    return (matrix + (matrix * columns) @ through) * (1 - rows) * (1 - columns)
