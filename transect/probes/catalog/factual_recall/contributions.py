"""What single parts of the residual stream add to logits: heads split at W_O, and direct logit attribution."""

from __future__ import annotations

import torch
from torch import Tensor

from ....anatomy import Block
from ....forward import Lens
from ....forward.lens import norm_gain


def head_outputs(block: Block, heads: Tensor, added: Tensor) -> Tensor:
    """What each head adds to the residual stream (N x H x d); with the bias of W_O they sum to `added`.

    heads: outputs of the heads side by side (N x (H d_h)). added: what attention adds (N x d). Where a norm stands
    behind W_O, its scale is that of the whole sum, so that the parts still add up.
    """
    o = block.matrix("o")
    weight = o.weight.to(heads)
    count = weight.shape[1] // block.head_size
    parts = torch.einsum("nhi,dhi->nhd", heads.unflatten(-1, (count, -1)), weight.unflatten(1, (count, -1)))
    norm = block.norms.get("attention_output")
    if norm is None:
        return parts * block.residual_multiplier
    gain = norm_gain(norm).to(heads)
    whole = parts.sum(1) if o.bias is None else parts.sum(1) + o.bias.to(heads)
    return parts * gain * _scale(added, whole * gain)[:, None]


_CHUNK = 4096  # rows of W_U at a time


class Attribution:
    """Direct logit attribution under the final norm at the scale of the full residual stream, for N prompts.

    The final norm is linear once its scale is known, so a part c of the stream adds s (c g) · (W_U[token] - mean W_U):
    logits count from the mean over the vocabulary, since a constant added to all of them changes nothing. What a
    softcap does to the logits afterwards is left out, and the biases of norm and head belong to no part.

    final: the residual stream before the final norm (N x d).
    """

    def __init__(self, lens: Lens, final: Tensor) -> None:
        self.lens = lens
        weight = lens.weight
        self.mean = weight.mean(0, dtype=torch.float64).cpu()
        self.gain = lens.gain.detach().to(final)
        if lens.norm is None:
            self.scale = final.new_ones(len(final), 1)
            return
        with torch.no_grad():
            normed = lens.norm(final.to(weight)).to(final)
        bias = getattr(lens.norm, "bias", None)
        if bias is not None:
            normed = normed - bias.detach().to(final)
        self.scale = _scale(normed, self._centred(final) * self.gain)

    def _centred(self, part: Tensor) -> Tensor:
        return part - part.mean(-1, keepdim=True) if self.lens.centres else part

    def normed(self, part: Tensor) -> Tensor:
        """A part of the stream (N x ... x d) as the unembedding reads it."""
        scale = self.scale.view(-1, *[1] * (part.dim() - 1))
        return self._centred(part) * self.gain * scale

    def rows(self, tokens: Tensor) -> Tensor:
        """Rows of W_U of some tokens (N), less the mean over the vocabulary (N x d)."""
        weight = self.lens.weight
        return weight[tokens.to(weight.device)].to(self.mean) - self.mean

    def logits(self, part: Tensor, tokens: Tensor) -> Tensor:
        """What a part (N x ... x d) adds to the logit of each prompt's token (N): N x ..."""
        return torch.einsum("n...d,nd->n...", self.normed(part), self.rows(tokens))

    def directions(self, tokens: Tensor) -> Tensor:
        """The directions of the stream (N x d) that raise these tokens' logits, above the mean token."""
        return self._centred(self.rows(tokens).to(self.gain) * self.gain)

    def ranks(self, part: Tensor, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """Places of tokens (M) in the vocabulary, 1 for the first, as parts (N x ... x d) of the stream order it (M).

        rows: which of the parts, counted in their order, each token is asked of. Default: each one's own.
        """
        weight, normed = self.lens.weight, self.normed(part).flatten(0, -2)
        rows = torch.arange(len(normed)) if rows is None else rows
        own = (normed[rows] * weight[tokens.to(weight.device)].to(normed)).sum(1, keepdim=True)
        above = torch.zeros(len(tokens), dtype=torch.long)
        for start in range(0, len(weight), _CHUNK):
            chunk = weight[start : start + _CHUNK].to(normed)
            inside = (tokens >= start) & (tokens < start + len(chunk))
            logits = (normed @ chunk.T)[rows]
            logits[inside, tokens[inside] - start] = -torch.inf  # a token is not above itself
            above += (logits > own).sum(1)
        return above + 1

    def top(self, part: Tensor, count: int) -> list[int]:
        """The tokens whose logits a part (d) raises most, as the logit lens reads it."""
        weight = self.lens.weight
        logits = weight @ (self._centred(part) * self.gain).to(weight)
        return logits.topk(min(count, len(logits))).indices.tolist()


def _scale(whole: Tensor, unscaled: Tensor) -> Tensor:
    """The factor (N x 1) between two states (N x d) that point the same way."""
    return (whole * unscaled).sum(-1, keepdim=True) / unscaled.square().sum(-1, keepdim=True)
