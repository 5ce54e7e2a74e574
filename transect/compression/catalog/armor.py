"""ARMOR: a 2:4 sparse core between block-diagonal wrappers (Liu et al., ICLR 2026, arXiv:2510.05528)."""

from typing import Annotated, Any

import torch
from torch import Tensor

from ...operators.block_diagonal import WrappedSparse, wrapped_sparse_bytes
from ...statistics import FeatureNorm
from ..registry import Range, Seed, Size, replacement
from ..two_four import ENGINES, best_two_of_four, fitting, normalized, usable

_PATIENCE = 100  # rounds without progress after which it stops


def armor_size(shape: tuple[int, int], itemsize: int, keep: float, *, block: int, **settings: Any) -> Size:
    """The largest blocks, of at most `block`, that the budget pays for (our choice; the paper fixes one size).

    A's block divides d_out. B's divides d_in (rounded up to a multiple of 4), and is a multiple of 4, 2 or 1, so that a
    group of four lies in one block or is made of whole ones.
    """
    (d_out, d_in), size = shape, None
    outputs = [b for b in range(1, block + 1) if d_out % b == 0]
    inputs = [b for b in range(1, block + 1) if -(-d_in // 4) * 4 % b == 0 and (b % 4 == 0 or 4 % b == 0)]
    for most in range(block, 0, -1):
        chosen = {
            "output_block": max(b for b in outputs if b <= most), "input_block": max(b for b in inputs if b <= most)
        }  # fmt: skip
        size = Size(wrapped_sparse_bytes(d_out, d_in, **chosen, itemsize=itemsize), chosen)
        if size.bytes <= keep * d_out * d_in * itemsize:
            break
    assert size is not None
    return fitting(size, shape, itemsize, keep, "ARMOR")


@replacement("armor", paper="arXiv:2510.05528", size=armor_size, note=ENGINES, needs=[FeatureNorm(power=2)])
def armor(
    weight: Tensor,
    rms: Tensor,
    *,
    output_block: int,
    input_block: int,
    block: Annotated[int, Range(1, 1024)] = 128,
    rounds: Annotated[int, Range(0, 100_000)] = 500,
    learning_rate: Annotated[float, Range(0, 1)] = 1e-2,
    seed: Seed = 0,
) -> WrappedSparse:
    """A 2:4 sparse matrix between two block-diagonal ones that are trained with it to fit the dense weight.

    W ≈ diag(ρ) A C B diag(c): c are W's column norms, ρ the row norms after that, and A, C, B minimise Σ h_j E_ij² with
    h_j = E x_j² and E the error of the normalised weight. The start is A = B = I and the 2:4 matrix that is best by
    itself (NoWag-P). A round is one step of Adam on A, B and C's kept entries, and one exact step on a group of C in
    every block (see `Wrapping.core_step`). The best round is kept, where the released code keeps the last. ρ and c are
    folded into A and B, which cost bytes too.

    block: most rows of one block of A and of B; the budget may pay for less. The paper has 128 at width 4096 and more.
    rounds: how many at most, our default; it stops after 100 without progress, as the released code does. The paper has
        20 000, that code 3000.
    learning_rate: of Adam, falling linearly to 0 (our schedule); the released code has a constant 1e-4, which needs
        thousands of rounds. The default was chosen by the reconstruction of matrices of three models: in 300 to 500
        rounds it loses no more than a constant 3e-3 does (within 0.3 %), and at most 1.5 % more than the best rate.
    seed: of the choice of groups.
    """
    target, rows, columns = normalized(torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4)).float())
    importance = torch.nn.functional.pad(usable(rms.square()), (0, -weight.shape[1] % 4)).float()
    fit = Wrapping(target, importance, output_block, input_block, seed)
    left, core, mask, right = fit.run(rounds, learning_rate)
    left = left * rows.view(len(left), -1, 1)
    right = right * columns.view(len(right), 1, -1)
    return WrappedSparse.from_parts(left, core, mask, right, weight.shape[1])


class Wrapping:
    """A (d_out x d_out) and B (d_in x d_in), block-diagonal, and C (d_out x d_in), 2:4, so that A C B is near W̄.

    target: W̄ (d_out x d_in), 4 dividing d_in. importance: h (d_in), at least 0.
    m x n blocks, of p rows and q columns: A is (m, p, p), B is (n, q, q), and C is kept as (n, d_out, q), so that B
    multiplies it from the right in one batch. Block (j, k) of the product depends on C's block (j, k) alone. An
    input_block of 1 or 2 is q = 4 here, with B zero outside its smaller blocks.
    """

    def __init__(self, target: Tensor, importance: Tensor, output_block: int, input_block: int, seed: int = 0) -> None:
        (d_out, d_in), p, q = target.shape, output_block, max(input_block, 4)
        self.m, self.n, self.p, self.q = d_out // p, d_in // q, p, q
        self.target, self.importance = target, importance
        total = (target.square() * importance).sum()
        self.total = torch.where(total > 0, total, 1)  # a matrix of zeros is met exactly
        mask = best_two_of_four(target.square() * importance)
        self.mask = self._by_column_block(mask).contiguous()  # (n, d_out, q)
        self.a = torch.eye(p).to(target).repeat(self.m, 1, 1)
        self.b = torch.eye(q).to(target).repeat(self.n, 1, 1)
        self.input_block = input_block
        smaller = torch.arange(q, device=target.device) // input_block
        self.b_mask = smaller[:, None] == smaller  # (q, q)
        self.c = self._by_column_block(target * mask).contiguous()
        self.generator = torch.Generator(target.device).manual_seed(seed)
        self.multiply()

    def _by_column_block(self, matrix: Tensor) -> Tensor:
        """(d_out, d_in) as (n, d_out, q)."""
        return matrix.unflatten(1, (self.n, self.q)).transpose(0, 1)

    def _by_row_block(self, blocks: Tensor) -> Tensor:
        """(n, d_out, q) as (m, p, d_in)."""
        return blocks.transpose(0, 1).reshape(self.m, self.p, self.n * self.q)

    def multiply(self) -> None:
        """CB and the error E = A C B - W̄ of what A, B and C are now."""
        self.cb = self.c @ self.b  # (n, d_out, q)
        target = self.target.view(self.m, self.p, -1)
        self.error = torch.baddbmm(target, self.a, self._by_row_block(self.cb), beta=-1).flatten(0, 1)  # (d_out, d_in)

    def loss(self) -> float:
        """Σ h E² over that of the zero matrix."""
        return float(self.error.square().sum(0) @ self.importance / self.total)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the loss, for A (m, p, p), B (n, q, q) and every entry of C (n, d_out, q), masked or not."""
        g = (self.error * (2 * self.importance / self.total)).unflatten(0, (self.m, self.p))
        of_a = g @ self._by_row_block(self.cb).transpose(1, 2)
        back = self._by_column_block((self.a.transpose(1, 2) @ g).flatten(0, 1))  # Aᵀ G
        return of_a, self.c.transpose(1, 2) @ back, back @ self.b.transpose(1, 2)

    def run(self, rounds: int, learning_rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best A, C (d_out x d_in), its mask and B of all rounds."""
        adam = torch.optim.Adam([self.a, self.b, self.c], fused=True)
        best = last = self.loss()
        kept, waited = self._copy(), 0
        for done in range(rounds):
            adam.param_groups[0]["lr"] = learning_rate * (1 - done / rounds)
            self.a.grad, of_b, of_c = self.gradients()
            self.b.grad = of_b * self.b_mask
            self.c.grad = of_c * self.mask
            adam.step()
            self.c.mul_(self.mask)  # the momentum of an entry that has left
            self.multiply()
            self.core_step(of_c)
            loss = self.loss()
            waited = 0 if loss < last - max(1e-6 * last, 1e-8) else waited + 1
            last = loss
            if loss < best:
                best, kept = loss, self._copy()
            if waited == _PATIENCE:
                break
        a, b, c, mask = kept
        parts = b.unflatten(2, (-1, self.input_block)).unflatten(1, (-1, self.input_block))
        b = parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)  # without the zeros between small blocks
        return a, c.transpose(0, 1).flatten(1), mask.transpose(0, 1).flatten(1), b

    def _copy(self) -> tuple[Tensor, ...]:
        return tuple(part.detach().clone() for part in (self.a, self.b, self.c, self.mask))

    def core_step(self, gradient: Tensor) -> None:
        """Solve one group of four of every block exactly: the best of its six supports, and the best two values.

        A group is drawn in proportion to the L1 norm of its part of `gradient` (n, d_out, q); here that of the step of
        Adam before it, which saves a quarter of the work (our choice). In a block, with a the group's column of A and
        B_g its rows of B, the group's four entries c add a (c B_g), so that the loss is a quadratic of c alone:
        ||a||² c K cᵀ + 2 c t + what does not change, with K = B_g diag(h) B_gᵀ and t = B_g diag(h) Rᵀ a, R the block's
        error without the group. A group stays as it is where nothing is better.
        """
        m, n, p, q = self.m, self.n, self.p, self.q
        weights = gradient.abs().unflatten(2, (-1, 4)).sum(-1).view(n * m, -1).cumsum(-1)  # (blocks, p * q/4)
        drawn = torch.rand(n * m, 1, generator=self.generator, dtype=weights.dtype, device=weights.device)
        chosen = torch.searchsorted(weights, drawn * weights[:, -1:]).clamp_max_(weights.shape[1] - 1).squeeze(1)
        block = torch.arange(n * m, device=chosen.device)
        j, k, row, group = block % m, block // m, chosen // (q // 4), chosen % (q // 4)
        line = block * p + row  # the group's row in C as (n * d_out, q)
        slot = line * (q // 4) + group  # the group in C as (groups, 4)
        quad = k * (q // 4) + group  # its rows of B, as (d_in / 4, 4, q)

        a = self.a.transpose(1, 2).flatten(0, 1)[j * p + row]  # (blocks, p)
        square = a.square().sum(1, dtype=torch.float64)[:, None]  # ||a||²
        a = a.view(n, m, p).permute(1, 2, 0)[..., None]  # (m, p, n, 1)
        error = self.error.view(m, p, n, q)
        seen = ((a * error).sum(1) * self.importance.view(n, q)).transpose(0, 1).reshape(n * m, 1, q)  # aᵀ R diag(h)

        quads = self.b.view(-1, 4, q)
        weighted = (self.b * self.importance.view(n, 1, q)).view(-1, 4, q)
        gram = (weighted @ quads.transpose(1, 2)).double().index_select(0, quad)  # K
        rows = quads.index_select(0, quad)  # B_g: (blocks, 4, q)
        old = self.c.view(-1, 4).index_select(0, slot).double()
        toward = (rows * seen).sum(2).double() - square * (gram @ old[..., None]).squeeze(2)  # t, without the group
        new, support = best_pair(gram, toward, square)
        better = (_quadratic(new, gram, toward, square) < _quadratic(old, gram, toward, square))[:, None]
        change = torch.where(better, new - old, 0).to(self.c)

        self.c.view(-1, 4)[slot] += change
        mask = self.mask.view(-1, 4)
        mask[slot] = torch.where(better, support, mask[slot])
        moved = (change[..., None] * rows).sum(1)  # (blocks, q): by how much a row of CB moves
        self.cb.view(-1, q)[line] += moved
        error.addcmul_(a, moved.view(n, m, q).transpose(0, 1)[:, None])  # `error` is a view of self.error


def best_pair(gram: Tensor, toward: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """The c (..., 4) with two non-zeros that minimises ||a||² c K cᵀ + 2 c t, and its support (bool).

    gram: K (..., 4, 4). toward: t (..., 4). square: ||a||² (..., 1).
    """
    pairs = torch.combinations(torch.arange(4, device=gram.device))  # (6, 2)
    first, second = pairs.T
    k11, k22, k12 = gram[..., first, first] + 1e-9, gram[..., second, second] + 1e-9, gram[..., first, second]
    t1, t2 = toward[..., first], toward[..., second]
    determinant = k11 * k22 - k12**2
    v = torch.stack([k22 * t1 - k12 * t2, k11 * t2 - k12 * t1], -1) / determinant[..., None]  # (..., 6, 2)
    gain = (v * torch.stack([t1, t2], -1)).sum(-1)
    best = gain.argmax(-1, keepdim=True)  # (..., 1)
    places = pairs[best.squeeze(-1)]  # (..., 2)
    values = -v.gather(-2, best[..., None].expand(*best.shape, 2)).squeeze(-2) / (square + 1e-8)
    empty = torch.zeros_like(toward)
    return empty.scatter(-1, places, values), torch.zeros_like(toward, dtype=torch.bool).scatter(-1, places, True)


def _quadratic(c: Tensor, gram: Tensor, toward: Tensor, square: Tensor) -> Tensor:
    """||a||² c K cᵀ + 2 c t, for each c (..., 4)."""
    return (c * (square * (gram @ c[..., None]).squeeze(-1) + 2 * toward)).sum(-1)
