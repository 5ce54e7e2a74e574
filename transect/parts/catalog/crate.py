"""CRATE (Yu et al., JMLR 2024, arXiv:2311.13110): a block as one step of compression and one of sparsification.

The coding rate of tokens (N x d) within K subspaces, R^c = ½ Σ_k logdet(I + p/(N ε²) W_k W_kᵀ) with W_k (N x p) their
projections, is lowered by attention whose queries, keys and values are one projection (MSSA); what is sparse in a
dictionary D is raised by one step of proximal gradient descent (ISTA). The network of the paper has all three parts:
`--mixer crate --mlp crate --block crate`, in a base with layer norms, such as vit or gpt2.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...arguments import Range
from ...errors import TransectError
from ..attention import seen_by
from ..part import Around, BlockPart, Inside, Mixer, MLPPart
from ..precision import wide
from ..rotary import rotated


class SubspaceAttention(Mixer):
    """o(softmax(w wᵀ / sqrt(head size)) w) by heads, with one projection w of the input (MSSA, Section 2.3).

    Rotary positions, where the model has them, turn w as query and as key, so that the logits stay symmetric. With one
    head as wide as the stream, o is the identity. In generation w is kept, half of what softmax attention keeps.

    strength: what the sum is multiplied by; below 0 it is taken off the stream.
    damping: how much of the input is taken off besides. The derived step has κγ for both; the trained networks have
        1 and 0, which raise the rate up to the next norm.
    """

    kind = "mixer.crate"
    paper = "arXiv:2311.13110"
    limit = "with its q, k and v matrices equal, softmax attention is this"
    cost = "N²"
    recurrent = True  # though its state grows
    roles = {"v": "proj", "o": "o_proj"}

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, *, strength: float = 1.0,
        damping: Annotated[float, Range(0)] = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(causal)
        self.heads, self.head_size, self.strength, self.damping = heads, head_size, strength, damping
        self.proj = nn.Linear(width, heads * head_size, bias=False)
        if heads == 1 and head_size == width:
            self.o_proj, self.roles = nn.Identity(), {"v": "proj"}  # type: ignore[misc]
        else:
            self.o_proj = nn.Linear(heads * head_size, width)

    def mix(self, x: Tensor, around: Around) -> Tensor:
        v = self.proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # w: B x heads x N x head size
        q = k = rotated(v, around.rotary)
        real, state = around.real, around.state
        if state is not None:
            new = {"v": v.transpose(1, 2), "real": v.new_ones(x.shape[:2], dtype=torch.bool) if real is None else real}
            if around.rotary is not None:
                new["k"] = k.transpose(1, 2)
            for name, tensor in new.items():
                state[name] = torch.cat([state[name], tensor], dim=1) if name in state else tensor
            v, real = state["v"].transpose(1, 2), state["real"]
            k = v if around.rotary is None else state["k"].transpose(1, 2)
        mask = seen_by(q.shape[2], k.shape[2], self.causal, real, x.device)
        causal = mask is None and self.causal and q.shape[2] == k.shape[2]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        y = self.o_proj(y.transpose(1, 2).flatten(2))
        return self.strength * y - self.damping * x

    def mixing_flops(self, length: int) -> int:
        return 4 * length * length * self.heads * self.head_size


class ISTA(MLPPart):
    """relu(x + η Dᵀ(x - D x) - η λ): a step towards the sparsest z >= 0 with D z near x (Section 2.4).

    A square dictionary is all that it holds. In the paper the result replaces the stream, as with `block.crate`; where
    that is not, it is added to it. The step is one of descent as long as ‖D‖² <= 1/η, as it is in the beginning.

    step: η.
    penalty: λ.
    """

    kind = "mlp.crate"
    paper = "arXiv:2311.13110"
    limit = "none; with D orthogonal it is relu(x + η(Dᵀx - x) - ηλ)"

    def __init__(
        self, width: int, *, step: Annotated[float, Range(0, above=True)] = 0.1,
        penalty: Annotated[float, Range(0)] = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.step, self.penalty = step, penalty
        self.dictionary = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.dictionary)

    def forward(self, x: Tensor) -> Tensor:
        left = x - functional.linear(x, self.dictionary)  # x - D x
        return functional.relu(x + self.step * functional.linear(left, self.dictionary.mT) - self.step * self.penalty)

    @property
    def flops(self) -> int:
        return 4 * self.dictionary.numel()


class Replacing(BlockPart):
    """The block with no sum behind its MLP: x + attention(norm x), normed, goes through the MLP, which is the stream.

    With `mlp.crate` the stream behind each block is then a sparse code, nowhere below 0.
    """

    kind = "block.crate"
    paper = "arXiv:2311.13110"
    limit = "none: the MLP's output replaces the stream"

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        if inside.attention is None or inside.mlp is None or len(inside.norms) != 2:
            raise TransectError(
                f"{self.kind} needs a block of two norms, an attention and an MLP in modules of their own, as llama's, "
                "gpt2's and vit's are; here one is missing, or there are more"
            )
        first, second = inside.norms
        return inside.mlp(second(x + inside.attention(first(x))))


def coding_rate(tokens: Tensor, precision: float) -> Tensor:
    """R = ½ logdet(I + p / (N ε²) W Wᵀ) of tokens W (... x N x p), in nats, by the smaller of the two determinants.

    precision: ε.
    """
    count, size = tokens.shape[-2:]
    tokens = wide(tokens)
    gram = tokens.mT @ tokens if size < count else tokens @ tokens.mT
    eye = torch.eye(min(count, size), dtype=gram.dtype, device=gram.device)
    scale = size / (count * precision**2)
    lower = torch.linalg.cholesky(eye + scale * gram)
    return lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
