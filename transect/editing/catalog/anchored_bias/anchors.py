"""Which parts of a model write one letter of a multiple-choice item, whatever is asked.

Source: Li and Gao, 2025, arXiv:2405.03205, with its released notebook (github.com/ruizheliUOA/Anchored_Bias_GPT2). The
paper compares the letter with each item's right one. Here it is compared with the mean of the others, over items with
their options moved round the letters, so that no right answer is read (our design).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....anatomy import Block
from ....data import Specimen
from ....forward import watch
from ....forward.lens import Lens, norm_gain
from .letters import Items, alike

HEADS = 5  # that count as leaning, at most


@dataclass(frozen=True)
class Leaning:
    """How far each part leans to the letter at the last token, in logits, means over all prompts, float64.

    mlps (L), heads (L x H): D, the letter's logit less the mean of the other letters', of the part's output put through
    the final norm on its own, as the authors' code does; these do not add up.
    neurons, by layer (n): what neuron i adds to the difference of the model's own logits, k_i v_iᵀŵ under the scales of
    the norms behind it; these add up. activations, by layer (n): mean k_i.
    A dropped sublayer leans by 0 and has no neurons.
    """

    mlps: Tensor
    heads: Tensor
    neurons: dict[int, Tensor]
    activations: dict[int, Tensor]


def letter_direction(lens: Lens, tokens: Tensor, letter: int) -> Tensor:
    """ŵ (d), float64: which way in the residual stream the final norm and the head read the letter against the others.

    W_U[letter] less the mean of the other letters' rows, times the final norm's gain, and centred where that norm
    centres. tokens: ids of all the letters. letter: which of them.
    """
    rows = lens.weight[tokens.to(lens.weight.device)].double()
    others = [number for number in range(len(tokens)) if number != letter]
    return read_direction(lens, rows[letter] - rows[others].mean(0))


def read_direction(lens: Lens, row: Tensor) -> Tensor:
    """A direction behind the final norm (d) as one in the residual stream, up to the norm's scale."""
    direction = lens.gain.double() * row.double()
    return direction - direction.mean() if lens.centres else direction


def written_direction(block: Block, direction: Tensor) -> Tensor:
    """A direction of the residual stream (d) as one of the MLP's value vectors: times what stands in between.

    That is the model's multiplier and the gain of a norm, where there are such.
    """
    norm = block.norms.get("mlp_output")
    direction = direction * block.residual_multiplier
    return direction if norm is None else direction * norm_gain(norm).double()


def project_out(vectors: Tensor, direction: Tensor, beta: float) -> Tensor:
    """v - β P v for each column (d x m), P the projector on the direction (d); in the vectors' precision or wider."""
    unit = (direction / direction.norm()).to(vectors)
    return vectors - beta * unit[:, None] * (unit @ vectors)


def leaning_heads(leans: Tensor, threshold: float) -> list[tuple[int, int, float]]:
    """(layer, head, D) of the heads that lean most, at most `HEADS`, by more than the threshold. leans: L x H."""
    if leans.numel() == 0:
        return []
    values, places = leans.flatten().topk(min(HEADS, leans.numel()))
    width = leans.shape[1]
    return [
        (int(place) // width, int(place) % width, float(value))
        for value, place in zip(values, places, strict=True)
        if value > threshold
    ]


def by_layer(heads: Sequence[tuple[int, int, float]]) -> dict[int, list[int]]:
    """Heads as numbers by layer."""
    found: dict[int, list[int]] = {}
    for layer, head, _ in heads:
        found.setdefault(layer, []).append(head)
    return found


@torch.no_grad()
def leaning(specimen: Specimen, items: Items, letter: int) -> Leaning:
    """Measure every MLP, head and neuron, in one pass over all prompts.

    letter: number of the letter among the items'. Raises NotApplicable for a model without a lens, or whose sublayers
    do not add to one stream.
    """
    specimen.require_contributions()
    lens, blocks, layers = specimen.lens, specimen.anatomy.blocks, specimen.layers
    towards = letter_direction(lens, items.tokens, letter)
    most = max((block.attention.heads for block in blocks if block.attention is not None), default=0)
    mlps, heads = torch.zeros(layers, dtype=torch.float64), torch.zeros(layers, most, dtype=torch.float64)
    neurons: dict[int, Tensor] = {}
    activations: dict[int, Tensor] = {}
    count = 0
    for _, ids, _ in alike(items):
        with (
            watch(specimen.anatomy, ["mlp", "heads", "neurons"]) as seen,
            watch(specimen.anatomy, ["residual"], [layers]) as last,
        ):
            specimen.model.base_model(input_ids=ids.to(specimen.model.device), use_cache=False)
        count += len(ids)
        scale = final_scale(lens, last.residual[layers][:, -1])
        for block in blocks:
            layer = block.index
            if layer in seen.heads:
                outputs = head_outputs(block, seen.heads[layer][:, -1])
                heads[layer, : outputs.shape[1]] += letter_lens(lens, outputs, items.tokens, letter).sum(0).cpu()
            if layer in seen.neurons:
                mlps[layer] += letter_lens(lens, seen.mlp[layer][:, -1], items.tokens, letter).sum().cpu()
                active = seen.neurons[layer][:, -1].double()
                share = value_logits(block, active, seen.mlp[layer][:, -1], towards, scale).sum(0).cpu()
                neurons[layer] = neurons.get(layer, 0) + share
                activations[layer] = activations.get(layer, 0) + active.sum(0).cpu()
    return Leaning(
        mlps / count, heads / count, {layer: total / count for layer, total in neurons.items()},
        {layer: total / count for layer, total in activations.items()},
    )  # fmt: skip


def letter_lens(lens: Lens, states: Tensor, tokens: Tensor, letter: int) -> Tensor:
    """The letter's logit less the mean of the others' (...), float64, of states (... x d) on their own.

    Before the soft cap of models that have one.
    """
    normed = states if lens.norm is None else lens.norm(states)
    tokens = tokens.to(states.device)
    logits = normed.double() @ lens.weight[tokens].double().T
    if lens.bias is not None:
        logits = logits + lens.bias[tokens].double()
    others = (logits.sum(-1) - logits[..., letter]) / (len(tokens) - 1)
    return logits[..., letter] - others


def head_outputs(block: Block, heads: Tensor) -> Tensor:
    """What each head adds to the stream (B x H x d), from o's input (B x (H d_h)).

    Up to the scale of the norm behind attention, in models that have one.
    """
    attention = block.attention
    assert attention is not None  # the input was seen
    parts = heads.unflatten(-1, (-1, attention.head_size))
    weight = attention.o.weight.unflatten(-1, (-1, attention.head_size))
    norm = block.norms.get("attention_output")
    outputs = torch.einsum("bhe,dhe->bhd", parts, weight) * block.residual_multiplier
    return outputs if norm is None else outputs * norm_gain(norm)


def value_logits(block: Block, active: Tensor, added: Tensor, towards: Tensor, scale: Tensor) -> Tensor:
    """What each neuron adds to the logit difference (B x n): k_i v_iᵀŵ over the scales of the norms behind it.

    active (B x n): k. added (B x d): what the MLP adds to the stream. towards (d): ŵ. scale (B): of the final norm.
    """
    down = block.matrix("down")
    norm = block.norms.get("mlp_output")
    direction = written_direction(block, towards)
    if norm is not None:
        raw = active @ down.weight.double().T
        raw = raw if down.bias is None else raw + down.bias.double()
        raw = raw * norm_gain(norm).double() * block.residual_multiplier
        scale = scale * raw.norm(dim=-1) / added.double().norm(dim=-1)
    return active * (direction @ down.weight.double()) / scale[:, None]


def final_scale(lens: Lens, states: Tensor) -> Tensor:
    """What the final norm divides each state (B x d) by (B), float64."""
    if lens.norm is None:
        return torch.ones(len(states), dtype=torch.float64, device=states.device)
    normed, states = lens.norm(states).double(), states.double()
    bias = getattr(lens.norm, "bias", None)
    normed = normed if bias is None else normed - bias.double()
    states = states - states.mean(-1, keepdim=True) if lens.centres else states
    return (states * lens.gain.double()).norm(dim=-1) / normed.norm(dim=-1)
