"""Neurons clamped in the weights: chosen MLP neurons have the same value at every token, in any program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ...anatomy.storage import is_dense
from ...checkpoint.plain import skeleton
from ...data import Specimen
from ...errors import NotApplicable, TransectError
from ...forward import answer_log_probabilities
from ...probes.neurons import readable, scores, unembedding, vectors
from ..journal import Journal
from ..registry import editing

BIAS_ENTRY = "mlp_bias"  # of a config whose MLP has biases if it is true (Llama)
FACTS = 200


def measure(specimen: Specimen) -> dict[str, float]:
    """What the model still knows, where there are facts; the frame adds the loss."""
    if not specimen.known_facts:
        return {}
    facts = specimen.known_facts[:FACTS]
    pairs = [(specimen.encode(fact.text), specimen.continuation(fact.text, fact.answer)) for fact in facts]
    mean = float(answer_log_probabilities(specimen.model, pairs).mean())
    return {f"log-probability of the answer, {len(facts)} facts, nats": mean}


def check(specimen: Specimen, *, neurons: str) -> None:
    """Everything that can be wrong is found here, before any weight changes."""
    for (layer, neuron), value in parsed(neurons).items():
        if not 0 <= layer < specimen.layers:
            raise TransectError(f"{layer}:{neuron}: block {layer} does not exist, there are 0 to {specimen.layers - 1}")
        block = specimen.anatomy.blocks[layer]
        mlp = block.mlp
        if mlp is None:
            raise TransectError(f"{layer}:{neuron}: the MLP of block {layer} was dropped, or is a part")
        if not 0 <= neuron < mlp.neurons:
            raise TransectError(f"{layer}:{neuron}: block {layer} has the neurons 0 to {mlp.neurons - 1}")
        if not is_dense(mlp.up.module):
            raise TransectError(
                f"{mlp.up.name} is stored as {type(mlp.up.module).__name__}: a neuron can be clamped where the "
                "matrix is dense; clamp first and compress afterwards"
            )
        if not torch.isfinite(torch.tensor(value).to(mlp.up.weight.dtype)):
            raise TransectError(f"{layer}:{neuron}={value} is not a finite number in {mlp.up.weight.dtype}")
        if value != 0 and mlp.up.bias is None and not takes_bias(specimen):
            raise NotApplicable(
                f"{layer}:{neuron}={value}: a plain {type(specimen.model).__name__} checkpoint has no place for a bias "
                "in its MLP, so a neuron can be held at 0 only; for another value use transect.forward.changed "
                "while the model runs"
            )


@editing("neuron-clamp", paper="arXiv:2501.02688", measure=measure, check=check, reads=lambda *_, **__: ())
def neuron_clamp(specimen: Specimen, journal: Journal, *, neurons: str = "") -> Mapping[str, Any]:
    """Hold MLP neurons at chosen values at every token, in a checkpoint that any program loads.

    Row i of up becomes zero and its bias the value, so (up x)_i is that value whatever x is: exact, up to rounding the
    value to the weights' precision. In a gated MLP the neuron then puts out act(gate_i x) * value, so it still goes
    silent where its gate closes; in an ungated one it puts out act(value). This is the paper's clamp of the
    up-projection, which it applies while the model runs; writing it into the weights is our design. Llama gets the
    biases that its config entry mlp_bias allows, zeros everywhere else. Mistral, Qwen, Gemma, Phi-3 and OLMo have no
    place for them, so there the value can only be 0.

    neurons: which, as layer:neuron=value, with commas in between, such as 3:17=0,2:5=1.5; both count from 0. The
        feature-neurons probe says what they stand for.
    """
    chosen, blocks = parsed(neurons), specimen.anatomy.blocks
    ups = {layer: blocks[layer].matrix("up") for layer, _ in chosen}
    notes = {f"{layer}:{neuron}": _described(specimen, layer, neuron) for layer, neuron in chosen}
    if any(value != 0 and ups[layer].bias is None for (layer, _), value in chosen.items()):
        for block in blocks:
            for role in ("gate", "up", "down"):
                matrix = block.find(role)
                if is_dense(matrix.module):
                    journal.add_bias(matrix)
        journal.set_config(BIAS_ENTRY, True)
    for layer, up in ups.items():
        rows = [neuron for block, neuron in chosen if block == layer]
        values = torch.tensor([chosen[layer, neuron] for neuron in rows], dtype=torch.float64)
        bias = None if up.bias is None else values
        journal.set_rows(up, torch.tensor(rows), torch.zeros(len(rows), up.shape[1]), bias)
    return notes


def parsed(neurons: str) -> dict[tuple[int, int], float]:
    """(layer, neuron) -> value. Raises TransectError for what is not layer:neuron=value, or names a neuron twice."""
    found: dict[tuple[int, int], float] = {}
    for entry in filter(None, (part.strip() for part in neurons.split(","))):
        place, _, value = entry.partition("=")
        layer, _, neuron = place.partition(":")
        try:
            key, number = (int(layer), int(neuron)), float(value)
        except ValueError:
            raise TransectError(
                f"neuron-clamp: {entry!r} is not layer:neuron=value, such as 3:17=0 or 2:5=1.5"
            ) from None
        if not math.isfinite(number):
            raise TransectError(f"neuron-clamp: the value of {entry!r} must be finite")
        if key in found:
            raise TransectError(f"neuron-clamp: neuron {place} is named twice")
        found[key] = number
    if not found:
        raise TransectError("neuron-clamp: name the neurons, such as neurons=3:17=0,2:5=1.5")
    return found


def takes_bias(specimen: Specimen) -> bool:
    """Whether the model's class gives its MLP biases when its config says `mlp_bias`; foreign entries say nothing."""
    if not hasattr(specimen.model.config, BIAS_ENTRY):
        return False
    up = specimen.anatomy.blocks[0].find("up")
    return getattr(skeleton(specimen.model, {BIAS_ENTRY: True}).get_submodule(up.path), "bias", None) is not None


def _described(specimen: Specimen, layer: int, neuron: int) -> str:
    """Which tokens the neuron wrote, by its column of down."""
    try:
        lens = specimen.lens
    except NotApplicable:
        return "held"
    written = vectors(specimen.anatomy.blocks[layer], "down", lens)
    assert written is not None
    _, part = next(scores(unembedding(lens), written[neuron : neuron + 1]))
    return f"its output raised {readable(specimen, part[0].topk(3).indices.tolist())} most"
