"""LayerNorm in recurrent cells (Ba, Kiros & Hinton 2016, arXiv:1607.06450), as token mixers.

The norm itself is `norm.layer`. In a cell it stands on the summed inputs of each step: what comes from the state and
what comes from the input are normed by themselves in gated cells, over all gates at once, and together in a plain one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import TransectError
from ..part import Around, Mixer


class _Cell(Mixer):
    """What the cells share: what comes from the inputs is computed for all positions at once, then step by step.

    A subclass gives `drive` and `step`. A step at padding leaves the state as it is.
    """

    can_be = ("causal",)
    cost = "N, one position after the other"
    recurrent = True
    roles = {"o": "o_proj"}
    kept = ("h",)  # names of the tensors (B x H) that go from step to step; what is read is the first

    def __init__(self, width: int, heads: int, head_size: int, causal: bool) -> None:
        super().__init__(causal)
        self.hidden = heads * head_size
        if self.hidden < 2:
            raise TransectError(f"{self.kind} norms over its hidden units: it needs 2 or more, not {self.hidden}")
        self.o_proj = nn.Linear(self.hidden, width, bias=False)

    def drive(self, x: Tensor) -> Tensor:
        """What the inputs (B x N x d) give to each step (B x N x gates H)."""
        raise NotImplementedError

    def step(self, drive: Tensor, h: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """The next state, tensor by tensor, from what the input gives (B x gates H) and the state."""
        raise NotImplementedError

    def mix(self, x: Tensor, around: Around) -> Tensor:
        drive, kept = self.drive(x), {} if around.state is None else around.state
        state = tuple(kept.get(name, drive.new_zeros(len(x), self.hidden)) for name in self.kept)
        outputs = []
        for number, given in enumerate(drive.unbind(1)):
            new = self.step(given, *state)
            if around.real is not None:
                real = around.real[:, number, None]
                new = tuple(torch.where(real, after, before) for after, before in zip(new, state, strict=True))
            state = new
            outputs.append(state[0])
        kept.update(zip(self.kept, state, strict=True))
        return self.o_proj(torch.stack(outputs, dim=1))

    def mixing_flops(self, length: int) -> int:
        return 0


class RNN(_Cell):
    """h_t = tanh(LN(W_h h_{t-1} + W_x x_t)): one norm over both sums (Eq. 4), and a matrix o behind it.

    norms: false for the plain cell, with a bias instead.
    """

    kind = "mixer.ln-rnn"
    paper = "arXiv:1607.06450"
    limit = "none: a recurrent cell"

    def __init__(self, width: int, heads: int, head_size: int, causal: bool, *, norms: bool = True) -> None:
        super().__init__(width, heads, head_size, causal)
        self.from_x = nn.Linear(width, self.hidden, bias=not norms)
        self.from_h = nn.Linear(self.hidden, self.hidden, bias=False)
        self.norm = _norm(self.hidden, norms)

    def drive(self, x: Tensor) -> Tensor:
        return self.from_x(x)

    def step(self, drive: Tensor, h: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        return (torch.tanh(self.norm(self.from_h(h) + drive)),)


class LSTM(_Cell):
    """i, f, o, c̃ = LN(W_h h_{t-1}) + LN(W_x x_t) + b; c_t = σ(f) c_{t-1} + σ(i) tanh(c̃); h_t = σ(o) tanh(LN(c_t)).

    The supplement's cell. The first two norms are over all 4H gates at once, as in the authors' code (other frameworks
    norm gate by gate); c_t is carried as it is. The forget gate's part of b, which no norm sees, begins at 1 (ours),
    the rest at 0. A matrix o stands behind it. LN(W_x x_t) does not see how long x_t is.

    norms: false for the plain cell.
    """

    kind = "mixer.ln-lstm"
    paper = "arXiv:1607.06450"
    limit = "none: a recurrent cell"
    kept = ("h", "c")

    def __init__(self, width: int, heads: int, head_size: int, causal: bool, *, norms: bool = True) -> None:
        super().__init__(width, heads, head_size, causal)
        self.from_x = nn.Linear(width, 4 * self.hidden, bias=False)
        self.from_h = nn.Linear(self.hidden, 4 * self.hidden, bias=False)
        self.bias = nn.Parameter(torch.zeros(4, self.hidden))
        nn.init.ones_(self.bias[1])
        self.norm_x, self.norm_h = _norm(4 * self.hidden, norms), _norm(4 * self.hidden, norms)
        self.norm_c = _norm(self.hidden, norms)

    def drive(self, x: Tensor) -> Tensor:
        return self.norm_x(self.from_x(x)) + self.bias.flatten()

    def step(self, drive: Tensor, h: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        i, f, o, new = (self.norm_h(self.from_h(h)) + drive).chunk(4, dim=-1)
        c = torch.sigmoid(f) * more[0] + torch.sigmoid(i) * torch.tanh(new)
        return torch.sigmoid(o) * torch.tanh(self.norm_c(c)), c


class GRU(_Cell):
    """r, u = LN(W x_t) + LN(U h_{t-1}); h_t = σ(u) h_{t-1} + (1 - σ(u)) tanh(LN(W' x_t) + σ(r) LN(U' h_{t-1})).

    The authors' code; the paper's text writes the gate u with the opposite sign. Both gates share their norms, and the
    new state has its own. A matrix o stands behind it.

    norms: false for the plain cell.
    """

    kind = "mixer.ln-gru"
    paper = "arXiv:1607.06450"
    limit = "none: a recurrent cell"

    def __init__(self, width: int, heads: int, head_size: int, causal: bool, *, norms: bool = True) -> None:
        super().__init__(width, heads, head_size, causal)
        self.from_x = nn.Linear(width, 3 * self.hidden)
        self.from_h = nn.Linear(self.hidden, 3 * self.hidden, bias=False)
        self.norm_x, self.norm_h = (
            nn.ModuleList([_norm(2 * self.hidden, norms), _norm(self.hidden, norms)]) for _ in range(2)
        )

    def drive(self, x: Tensor) -> Tensor:
        return self._normed(self.from_x(x), self.norm_x)

    def _normed(self, sums: Tensor, norms: nn.ModuleList) -> Tensor:
        """Sums (... x 3H), the two gates' normed together, the new state's by themselves."""
        gates, new = sums.split((2 * self.hidden, self.hidden), dim=-1)
        return torch.cat([norms[0](gates), norms[1](new)], dim=-1)

    def step(self, drive: Tensor, h: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        (r, u, new), (r_h, u_h, new_h) = (
            one.chunk(3, dim=-1) for one in (drive, self._normed(self.from_h(h), self.norm_h))
        )
        new = torch.tanh(new + torch.sigmoid(r + r_h) * new_h)
        u = torch.sigmoid(u + u_h)
        return (u * h + (1 - u) * new,)


def _norm(size: int, norms: bool) -> nn.Module:
    return nn.LayerNorm(size) if norms else nn.Identity()
