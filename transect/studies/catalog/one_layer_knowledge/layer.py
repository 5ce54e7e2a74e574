"""Transformers of one layer, several side by side: attention that filters, an MLP that stores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from .facts import generator_of

ATTENTION = ("q", "k", "v")
UP = "up"  # the MLP's first matrix


class OneLayer(nn.Module):
    """G independent transformers of one layer over two tokens, which are run and trained together.

    With h_j = E[x_j] + pos_j in R^d and the last token's query: α = softmax_j((Q h_last)ᵀ K h_j / √d),
    z = h_last + V Σ_j α_j h_j, and logits = U (z + W₂ relu(W₁ z + b₁) + b₂). This parametrisation is ours: Xu and Chen
    (arXiv:2508.00901) have one layer of self-attention and MLP, but their equations could not be read. Start: torch's
    defaults, so N(0, 1) for embeddings and positions, and U(-n^-½, n^-½) for what reads n numbers.

    seeds: of each model's start; a model does not depend on which others stand beside it. neurons: of the MLP, 0 for
    none. uniform: every α_j is 1/2, and there are no Q and K.
    Parameters have the models in front: `embedding` (G, vocabulary, d), `position` (G, 2, d), `q`, `k`, `v` (G, d, d),
    `up` W₁ (G, neurons, d), `up_bias`, `down` W₂ (G, d, neurons), `down_bias`, `unembedding` U (G, vocabulary, d).
    """

    embedding: nn.Parameter
    position: nn.Parameter
    q: nn.Parameter
    k: nn.Parameter
    v: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter
    down: nn.Parameter
    down_bias: nn.Parameter
    unembedding: nn.Parameter

    def __init__(
        self, vocabulary: int, seeds: Sequence[int], width: int = 48, neurons: int = 192, uniform: bool = False
    ) -> None:
        super().__init__()
        self.width, self.neurons, self.uniform = width, neurons, uniform
        shapes = {"embedding": (vocabulary, width), "position": (2, width)}
        shapes |= {name: (width, width) for name in (("v",) if uniform else ATTENTION)}
        if neurons:
            shapes |= {UP: (neurons, width), "up_bias": (neurons,), "down": (width, neurons), "down_bias": (width,)}
        shapes["unembedding"] = (vocabulary, width)
        reads = {"up_bias": width, "down_bias": neurons}
        generators = [generator_of("start", seed) for seed in seeds]
        for name, shape in shapes.items():
            if name in ("embedding", "position"):
                drawn = [torch.randn(shape, generator=generator) for generator in generators]
            else:
                bound = reads.get(name, shape[-1]) ** -0.5
                drawn = [torch.empty(shape).uniform_(-bound, bound, generator=generator) for generator in generators]
            self.register_parameter(name, nn.Parameter(torch.stack(drawn)))

    @property
    def models(self) -> int:
        """G."""
        return len(self.unembedding)

    @property
    def watched(self) -> list[str]:
        """The matrices that low-rank fine-tuning changes: q, k, v and W₁, as far as there are these."""
        return [*(("v",) if self.uniform else ATTENTION), *([UP] if self.neurons else [])]

    def stream(self, tokens: Tensor, uniform: bool = False) -> Tensor:
        """What the MLP reads, z (G, B, d), of tokens (G, B, 2)."""
        vocabulary = self.embedding.shape[1]
        start = vocabulary * torch.arange(self.models, device=tokens.device)[:, None, None]
        h = functional.embedding(tokens + start, self.embedding.flatten(0, 1)) + self.position[:, None]  # (G, B, 2, d)
        last = h[:, :, 1]
        if uniform or self.uniform:
            mixed = h.mean(2)
        else:
            query = last @ self.q.mT @ self.k  # (K h_j)ᵀ Q h_last = h_jᵀ Kᵀ Q h_last
            scores = (h @ query[..., None])[..., 0] / math.sqrt(self.width)
            mixed = (scores.softmax(-1)[:, :, None] @ h)[:, :, 0]
        return last + mixed @ self.v.mT

    def forward(self, tokens: Tensor, *, uniform: bool = False, mlp: bool = True) -> Tensor:
        """Logits (G, B, vocabulary) of tokens (G, B, 2). uniform: with attention frozen to 1/2. mlp: False without."""
        z = self.stream(tokens, uniform)
        if self.neurons and mlp:
            hidden = torch.baddbmm(self.up_bias[:, None], z, self.up.mT).relu()
            z = z + torch.baddbmm(self.down_bias[:, None], hidden, self.down.mT)
        return z @ self.unembedding.mT

    def questions(self, first: int, attributes: int) -> Tensor:
        """h_p of the question tokens (G, A, d): where the last position begins when it holds one of them."""
        return self.embedding[:, first : first + attributes] + self.position[:, 1:]


class LowRank(nn.Module):
    """W + B A, with A (G, rank, d_in) as PEFT begins it and B (G, d_out, rank) zero; LoRA's α is the rank."""

    def __init__(self, like: Tensor, rank: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        rows, columns = like.shape[1:]
        bound = columns**-0.5
        drawn = [torch.empty(rank, columns).uniform_(-bound, bound, generator=one) for one in generators]
        self.first = nn.Parameter(torch.stack(drawn).to(like))
        self.second = nn.Parameter(like.new_zeros(len(like), rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.baddbmm(weight, self.second, self.first)


def attach(model: OneLayer, rank: int, seeds: Sequence[int]) -> dict[str, nn.Parameter]:
    """Put factors of that rank beside q, k, v and W₁; returns these, by name. seeds: of each model's factors."""
    generators = [generator_of("factors", seed) for seed in seeds]
    for name in model.watched:
        parametrize.register_parametrization(model, name, LowRank(getattr(model, name), rank, generators))
    return {name: p for name, p in model.named_parameters() if name.endswith((".first", ".second"))}


def merge(model: OneLayer) -> None:
    """Write the factors into the matrices."""
    for name in model.watched:
        parametrize.remove_parametrizations(model, name, leave_parametrized=True)


def joined(states: Sequence[Mapping[str, Tensor]]) -> OneLayer:
    """The models of several states beside each other, in their order."""
    together = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    count, vocabulary, width = together["unembedding"].shape
    neurons = together[UP].shape[1] if UP in together else 0
    model = OneLayer(vocabulary, [0] * count, width, neurons, uniform="q" not in together)
    model.load_state_dict(together)
    return model
