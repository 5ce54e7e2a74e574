"""Contextual decomposition of a forward pass (CD-T, Hsu et al. 2024, arXiv:2407.00886).

Every activation x is r + i, a part that comes from chosen words or heads, and the rest. r is propagated layer by layer
by the rules below; x is what the user's own model computed, and i = x - r. So completeness holds by construction, and
what a rule leaves over goes to i.

- linear: r' = W r + b |W r| / (|W r| + |W i| + τ), coordinate by coordinate.
- norm, with the statistics of x: r' = g (r - mean r) / s + β |r| / (|r| + |i| + τ); RMSNorm has neither mean nor β.
- activation φ: r' = φ(x) - φ(i), so r has what comes of both together.
- gated MLP (our extension): r' = φ(g) u - φ(g_i) u_i.
- attention: A_r v_r with the weights A_r of q_r and k_r alone ("recomputed", the authors' rule for GPT), through the
  model's own attention module, so that rotation, masks and shared heads are its own; or A v_r with the weights of x
  ("fixed", their rule for BERT). Norms on queries and keys would scale a part as if it were the whole: there they are
  fixed.
- after each of the MLP's linear maps, and after the sum with what it is added to: where r and i have opposite signs,
  the larger takes all of x and the other is 0. Where a block has lost its MLP, nothing is moved (ours).

It is a decomposition under these rules: others give other parts, and in a nonlinear network parts do not add over
sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ....anatomy import Attention, Block, Matrix
from ....data import Specimen
from ....forward import changed, eager_attention, last_logits, watch
from ....forward.lens import norm_centres, norm_gain

_TAU = 1e-8
Node = tuple[int, int, int]  # layer, position, head
Pattern = Literal["recomputed", "fixed"]


@dataclass(frozen=True)
class Parts:
    """What comes of n sources.

    logits: r at the last position (n x V). heads: of each layer from the first source's on, r of what its heads say
    (n x T x H d_h), where that was asked for. stream: r after the last block (n x T x d).
    """

    logits: Tensor
    heads: Mapping[int, Tensor]
    stream: Tensor


class Decomposition:
    """One prompt, laid open for decomposition.

    specimen: a causal language model that adds to one residual stream; else NotApplicable. ids: token ids (T).
    """

    @torch.no_grad()
    def __init__(self, specimen: Specimen, ids: Tensor, pattern: Pattern = "recomputed") -> None:
        specimen.require_causal()
        specimen.require_contributions()
        specimen.require_own_sublayers()
        self.specimen, self.anatomy, self.ids = specimen, specimen.anatomy, ids
        self.lens = specimen.lens
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        with ExitStack() as stack:
            fixed = pattern == "fixed" or any(
                block.attention is not None and (block.attention.q_norm or block.attention.k_norm)
                for block in self.anatomy.blocks
            )
            self.pattern: Pattern = "fixed" if fixed else "recomputed"
            if fixed:
                stack.enter_context(eager_attention(specimen.model))
            for block in self.anatomy.blocks:
                if block.attention is not None:
                    stack.callback(self._note_call(block).remove)
            points = ["residual", "attention", "heads", "neurons", "up", "gate", *(["patterns"] if fixed else [])]
            self.seen = stack.enter_context(watch(self.anatomy, points))  # type: ignore[arg-type]
            self.logits = last_logits(specimen.model, ids[None].to(specimen.model.device))[0, 0]

    @property
    def nodes(self) -> list[Node]:
        """Every head at every position, from the first layer on."""
        return [
            (block.index, position, head)
            for block in self.anatomy.blocks
            if block.attention is not None
            for position in range(len(self.ids))
            for head in range(block.attention.heads)
        ]

    def head(self, node: Node, tensor: Tensor) -> Tensor:
        """A head's numbers (... x d_h) at a position, out of what o reads (... x T x H d_h)."""
        _, position, head = node
        size = self.anatomy.head_size
        return tensor[..., position, head * size : (head + 1) * size]

    def words(self, positions: Tensor) -> Parts:
        """Parts that come from words. positions: n x T, True for the words of each source."""
        stream = self.seen.residual[0]
        return self._propagate(stream * positions[..., None].to(stream), {}, 0)

    def heads(self, sources: Sequence[Node], means: Mapping[int, Tensor] | None = None, keep: bool = False) -> Parts:
        """Parts that come from heads, one node a source.

        means: for each layer the heads' mean output over a reference (T x H d_h); the source is then what the head says
        beyond its mean. Default: all that it says. keep: whether the parts of all heads are wanted.
        """
        first, start = min(layer for layer, _, _ in sources), min(position for _, position, _ in sources)
        whole = self.seen.residual[first]
        started = torch.zeros(len(sources), whole.shape[1] - start, whole.shape[2]).to(whole)
        at: dict[int, list[tuple[int, Node]]] = {}
        for number, node in enumerate(sources):
            at.setdefault(node[0], []).append((number, node))
        return self._propagate(started, at, first, means, keep)

    @torch.no_grad()
    def _propagate(
        self,
        r: Tensor,
        sources: Mapping[int, list[tuple[int, Node]]],
        first: int,
        means: Mapping[int, Tensor] | None = None,
        keep: bool = False,
    ) -> Parts:
        """r: n x t x d at the input of block `first`, at the last t positions; in front of both everything is 0."""
        heads: dict[int, Tensor] = {}
        start = len(self.ids) - r.shape[1]

        def all_positions(part: Tensor) -> Tensor:
            return torch.nn.functional.pad(part, (0, 0, start, 0))

        for block in self.anatomy.blocks[first:]:
            x, added = self.seen.residual[block.index][:, start:], torch.zeros_like(r)
            attention = block.attention
            if attention is not None:
                z = self.seen.heads[block.index][:, start:]
                z_r = self._heads(block, attention, r, start)
                for number, (_, position, head) in sources.get(block.index, ()):
                    node = (block.index, position - start, head)
                    mean = 0.0 if means is None else self.head(node, means[block.index][start:])
                    self.head(node, z_r)[number] = self.head(node, z[0]) - mean
                if keep:
                    heads[block.index] = all_positions(z_r)
                added = self._through_norm(block, "attention_output", linear(attention.o, z_r, z), attention.o, z)
                x_mid = x + self.seen.attention[block.index][:, start:]
            else:
                x_mid = x
            r_mid = r + added
            if block.mlp is not None:
                before = (r, x) if block.parallel else (r_mid, x_mid)
                r_mid = stable(r_mid + self._mlp(block, *before, start), self.seen.residual[block.index + 1][:, start:])
            r = r_mid
        x = self.seen.residual[len(self.anatomy.block_list)]
        r_last, x_last = r[:, -1], x[:, -1]
        if self.lens.norm is not None:
            r_last, x_last = norm(self.lens.norm, r_last, x_last), self.lens.norm(x_last)
        logits = _linear(self.lens.weight, self.lens.bias, r_last, x_last)
        if self.lens.softcap is not None:
            whole = torch.nn.functional.linear(x_last, self.lens.weight, self.lens.bias)
            logits = self._capped(whole) - self._capped(whole - logits)
        return Parts(logits, heads, all_positions(r))

    def _capped(self, logits: Tensor) -> Tensor:
        assert self.lens.softcap is not None
        return self.lens.softcap * torch.tanh(logits / self.lens.softcap)

    def _heads(self, block: Block, attention: Attention, r: Tensor, start: int) -> Tensor:
        """r of what o reads (n x t x H d_h)."""
        r, x = self._normed(block, "attention_input", r, self.seen.residual[block.index][:, start:])
        q_r, k_r, v_r = (linear(matrix, r, x) for matrix in (attention.q, attention.k, attention.v))
        if self.pattern == "recomputed":
            q_r, k_r, v_r = (torch.nn.functional.pad(part, (0, 0, start, 0)) for part in (q_r, k_r, v_r))
            return self._own_attention(block, q_r, k_r, v_r)[:, start:].clone()
        values = v_r.unflatten(-1, (attention.key_value_heads, -1)).transpose(1, 2)  # n, kv heads, t, d_h
        values = values.repeat_interleave(attention.heads // attention.key_value_heads, 1)
        patterns = self.seen.patterns[block.index][..., start:, start:].to(values)
        return (patterns @ values).transpose(1, 2).flatten(2)

    def _own_attention(self, block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What o would read if the projections had given these q, k and v."""
        if self.anatomy.architecture.head_bias and len(q) > 1:  # the bias is laid out for one sequence
            return torch.cat([self._own_attention(block, *(x[i : i + 1] for x in (q, k, v))) for i in range(len(q))])
        args, kwargs = self.calls[block.index]
        module = block.module.get_submodule(self.anatomy.architecture.attention)
        empty = q.new_zeros(*q.shape[:2], self.anatomy.config_value("hidden"))
        if args:
            args = (empty, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": empty}
        layer = block.index
        replaced = {("q", layer): lambda x: q, ("k", layer): lambda x: k, ("v", layer): lambda x: v}
        with changed(self.anatomy, replaced), watch(self.anatomy, ["heads"], [layer]) as seen:
            module(*args, **kwargs)
        return seen.heads[layer]

    def _mlp(self, block: Block, r: Tensor, x: Tensor, start: int) -> Tensor:
        """r of what the MLP adds at the positions from `start` on."""
        mlp = block.mlp
        assert mlp is not None and mlp.activation is not None
        r, x = self._normed(block, "mlp_input", r, x)
        up, up_r = self.seen.up[block.index][:, start:], linear(mlp.up, r, x)
        up_r = stable(up_r, up)
        if mlp.gate is None:
            neurons = mlp.activation(up) - mlp.activation(up - up_r)
        else:
            gate = self.seen.gate[block.index][:, start:]
            gate_r = stable(linear(mlp.gate, r, x), gate)
            neurons = mlp.activation(gate) * up - mlp.activation(gate - gate_r) * (up - up_r)
        whole = self.seen.neurons[block.index][:, start:]
        out = stable(linear(mlp.down, neurons, whole), _whole(mlp.down, whole))
        return self._through_norm(block, "mlp_output", out, mlp.down, whole)

    def _normed(self, block: Block, name: str, r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """r and x behind the block's norm of that name, or as they are where it has none."""
        module = block.norms.get(name)
        return (r, x) if module is None else (norm(module, r, x), module(x))

    def _through_norm(self, block: Block, name: str, r: Tensor, matrix: Matrix, before: Tensor) -> Tensor:
        """r of what a sublayer adds: its output behind the norm and the multiplier that some architectures have."""
        return self._normed(block, name, r, _whole(matrix, before))[0] * block.residual_multiplier

    def _note_call(self, block: Block) -> Any:
        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls[block.index] = args, kwargs

        module = block.module.get_submodule(self.anatomy.architecture.attention)
        return module.register_forward_pre_hook(note, with_kwargs=True)


def linear(matrix: Matrix, r: Tensor, x: Tensor) -> Tensor:
    """r' of W x + b. r: n x T x d_in. x: the whole (1 x T x d_in)."""
    return _linear(matrix.weight, matrix.bias, r, x)


def _linear(weight: Tensor, bias: Tensor | None, r: Tensor, x: Tensor) -> Tensor:
    weight = weight.to(r)
    through = r @ weight.T
    if bias is None:
        return through
    rest = x @ weight.T - through  # of one whole, not of every source's rest
    return through + bias.to(r) * through.abs() / (through.abs() + rest.abs() + _TAU)


def _whole(matrix: Matrix, x: Tensor) -> Tensor:
    """W x + b."""
    return torch.nn.functional.linear(x, matrix.weight.to(x), None if matrix.bias is None else matrix.bias.to(x))


def norm(module: Any, r: Tensor, x: Tensor) -> Tensor:
    """r' behind a LayerNorm or RMSNorm, whose statistics are those of the whole x."""
    gain, bias = norm_gain(module), getattr(module, "bias", None)
    whole = module(x)
    if bias is not None:
        whole = whole - bias
    if norm_centres(module):
        x_centred, r_centred = x - x.mean(-1, keepdim=True), r - r.mean(-1, keepdim=True)
    else:
        x_centred, r_centred = x, r
    scaled = gain * x_centred
    spread = scaled.square().sum(-1, keepdim=True) / (scaled * whole).sum(-1, keepdim=True)  # s: whole = g x / s
    out = gain * r_centred / spread
    return out if bias is None else out + bias * r.abs() / (r.abs() + (x - r).abs() + _TAU)


def stable(r: Tensor, x: Tensor) -> Tensor:
    """r where it agrees in sign with i = x - r; where they differ, all of x or nothing, whichever part is larger."""
    i = x - r
    larger = torch.where(r.abs() > i.abs(), x.expand_as(r), torch.zeros_like(r))
    return torch.where(r * i < 0, larger, r)
