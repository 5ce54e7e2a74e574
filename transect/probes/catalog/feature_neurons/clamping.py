"""What holding single neurons does to the tokens that they decode to, against other neurons at the same output norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....anatomy import Block
from ....data import Specimen
from ....errors import NotApplicable
from ....forward import Feed, changed, feeds_of, put_out, run_at, run_blocks, watch
from ....forward.change import Change
from ...neurons import held, output_norms, wide

Outcome = tuple[Tensor, float]
LENGTH, SEQUENCES = 64, 8
ROWS = 16  # sequences in one forward pass


@dataclass(frozen=True)
class Chosen:
    """A neuron, the sign with which it is held, and the token that it decodes to."""

    layer: int
    neuron: int
    sign: int
    token: int


@dataclass(frozen=True)
class Effects:
    """What holding did, in nats, against the model as it is. One row a chosen neuron.

    own: mean change of the log-probability of its token when it is held (n). others: of the same token, when each of
    its controls is held instead (n x c). loss: change of the loss on the same text (n); others_loss: (n x c).
    values: at what it was held (n). norms: mean square output of the held neuron, and of its controls, as lengths
    (n x (1 + c)): equal along a row. open: share of positions where the neuron's gate lets anything through (n); 1
    without a gate.
    """

    own: Tensor
    others: Tensor
    loss: Tensor
    others_loss: Tensor
    values: Tensor
    norms: Tensor
    open: Tensor


def short_text(specimen: Specimen) -> Tensor:
    """Up to 8 sequences of up to 64 tokens (n x T); NotApplicable where there is no text."""
    longest = max(map(len, specimen.text.texts()), default=0)
    if longest < 2:
        raise NotApplicable("it needs text with sequences of at least two tokens: pass data (--data)")
    return specimen.sequences(SEQUENCES, min(LENGTH, longest))


@torch.no_grad()
def clamp_effects(specimen: Specimen, chosen: Sequence[Chosen], ids: Tensor, strength: float, controls: int) -> Effects:
    """Hold each chosen neuron at every position of a text, then random neurons of its block in its place.

    A neuron is held at sign * strength * the root mean square of its own up-projection on the text. A control is held
    at the value, of the same sign, at which its output has the same mean square length over the text, so that both push
    the stream equally hard. In an ungated MLP the output is the same at every position, and it is held itself.

    ids: the text (n x T) on the CPU. controls: how many random neurons for each.
    """
    generator = torch.Generator().manual_seed(specimen.seed)
    blocks = specimen.anatomy.blocks
    layers = sorted({one.layer for one in chosen})
    reading = {layer: _reading(specimen, blocks[layer], ids) for layer in layers}
    tokens = torch.tensor([one.token for one in chosen])
    entering = _entering(specimen, ids, layers)
    before, loss = _outcome(specimen, entering[layers[0]], layers[0], {}, tokens)
    rows = []
    for number, one in enumerate(specimen.shown(chosen, "clamping")):
        block, (size, gain, opened) = blocks[one.layer], reading[one.layer]
        length = gain * output_norms(block).cpu()  # mean square output, as a length, of each neuron held at 1
        order = torch.randperm(len(size), generator=generator).tolist()
        others = [neuron for neuron in order if neuron != one.neuron and length[neuron] > 0]
        gated = block.mlp is not None and block.mlp.gate is not None
        value = one.sign * strength * float(size[one.neuron])
        held_at = value if gated else float(_activated(block, torch.tensor([value]))[0])
        found = []
        for neuron in [one.neuron, *others[:controls]]:
            constant = held_at * float(length[one.neuron] / length[neuron].clamp_min(1e-30))
            change = held([neuron], [constant])
            place = ("up" if gated else "neurons", one.layer)
            after, cost = _outcome(
                specimen, entering[one.layer], one.layer, {place: change}, tokens[number : number + 1]
            )
            found.append((float(after - before[number]), cost - loss, abs(constant) * float(length[neuron])))
        while len(found) <= controls:  # a block with fewer neurons than controls
            found.append((float("nan"),) * 3)
        rows.append((torch.tensor(found, dtype=torch.float64), value, float(opened[one.neuron])))
    table = torch.stack([row for row, _, _ in rows])  # n x (1 + c) x 3
    return Effects(
        table[:, 0, 0], table[:, 1:, 0], table[:, 0, 1], table[:, 1:, 1],
        torch.tensor([value for _, value, _ in rows]), table[..., 2], torch.tensor([share for _, _, share in rows]),
    )  # fmt: skip


def _reading(specimen: Specimen, block: Block, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every neuron on the text (n each): root mean square of up, and of what multiplies it; share that is open.

    What multiplies it is act(gate), or 1 without a gate.
    """
    up_sum = torch.zeros(block.matrix("up").shape[0], dtype=torch.float64)
    gate_sum, open_sum, count = torch.zeros_like(up_sum), torch.zeros_like(up_sum), 0
    gated = block.mlp is not None and block.mlp.gate is not None
    for part in ids.split(ROWS):
        with watch(specimen.anatomy, ["up", "gate"], [block.index]) as seen:
            specimen.model.base_model(input_ids=part.to(specimen.model.device))
        up = seen.up[block.index].flatten(0, -2).double().cpu()
        up_sum, count = up_sum + up.square().sum(0), count + len(up)
        if gated:
            factor = _activated(block, seen.gate[block.index]).flatten(0, -2).double().cpu()
            gate_sum, open_sum = gate_sum + factor.square().sum(0), open_sum + (factor.abs() > 1e-2).double().sum(0)
    size = (up_sum / count).sqrt()
    if not gated:
        return size, torch.ones_like(size), torch.ones_like(size)
    return size, (gate_sum / count).sqrt(), open_sum / count


def _activated(block: Block, values: Tensor) -> Tensor:
    """The block's activation function."""
    activation = None if block.mlp is None else block.mlp.activation
    if activation is None:
        raise NotApplicable("the architecture's description names no activation of the MLP")
    return activation(values)


def _entering(specimen: Specimen, ids: Tensor, layers: Sequence[int]) -> dict[int, list[Feed]]:
    """The text, part by part, as it enters each of these blocks: what is in front of a held neuron runs once."""
    found: dict[int, list[Feed]] = {layer: [] for layer in layers}
    for feed in feeds_of(specimen.anatomy, [{"input_ids": part} for part in ids.split(ROWS)]):
        for number in range(max(layers) + 1):
            if number in found:
                found[number].append(replace(feed))
            feed.hidden = run_at(specimen.anatomy, feed, number, feed.hidden)
    return found


def _outcome(
    specimen: Specimen, feeds: Sequence[Feed], layer: int, changes: Mapping[tuple[str, int], Change], tokens: Tensor
) -> Outcome:
    """Mean log-probabilities of some tokens over all positions (k), and the mean loss, in nats.

    feeds: what enters block `layer`; the changes are there or behind it.
    """
    sums, nats, positions, predictions = torch.zeros(len(tokens), dtype=torch.float64), 0.0, 0, 0
    for feed in feeds:
        rows = feed.batch["input_ids"]
        with changed(specimen.anatomy, changes):
            hidden = run_blocks(specimen.anatomy, feed, layer, feed.hidden)
            with put_out(specimen.anatomy, hidden):
                logits = wide(specimen.model(input_ids=rows, use_cache=False).logits)
        total = logits.logsumexp(-1)  # n x T
        nats += float((total[:, :-1] - logits[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]).double().sum())
        sums += (logits[..., tokens.to(logits.device)] - total[..., None]).double().sum((0, 1)).cpu()
        positions, predictions = positions + rows.numel(), predictions + rows[:, 1:].numel()
    return sums / positions, nats / predictions
