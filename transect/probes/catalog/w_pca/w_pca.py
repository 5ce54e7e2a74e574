"""W-PCA: the directions that MLPs use, times the parameters, as a score of an architecture (arXiv:2504.15983)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from ....anatomy import MLP
from ....data import Specimen
from ....errors import NotApplicable
from ....parameters import Range
from ...draw import Drawing, lines
from ...registry import Looking, probing
from ...result import Quantity, Result
from .dimension import Scatter

Where = Literal["pre", "post"]
_ENOUGH = 4  # tokens for each neuron, below which the text limits the count


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    layers = result.label("layer", len(result["dimension"]))
    return [
        lines(
            "Directions that hold the variance", "Principal components of each MLP's hidden layer, how many neurons it "
            "has, and the width of what it reads: before the activation there cannot be more directions than that.",
            {name: result[name] for name in ("dimension", "neurons", "read")},
            x=layers, xlabel="layer", ylabel="count",
        )
    ]  # fmt: skip


@probing(
    "w-pca", title="Score of the architecture (W-PCA)", paper="arXiv:2504.15983",
    watches=["up", "gate", "neurons"], draw=draw,
)  # fmt: skip
def w_pca(
    specimen: Specimen,
    *,
    eta: Annotated[float, Range(0, 1, above=True, below=True)] = 0.99,
    where: Where = "pre",
) -> Looking:
    """The W-PCA score of an architecture: mean PCA dimension of its MLPs' hidden layers, times its parameters.

    Wang, ICLR 2025. The PCA dimension of a block is the fewest principal components of its hidden layer's activations
    (tokens x neurons) that hold more than the share eta of their variance; V is its mean over blocks, and W-PCA is V
    times the number of the model's parameters. It needs no gradients and no labels, and is meant to rank models that
    nobody has trained, by one pass over the same text: `rank_architectures`. The released code takes the mean over
    batches of each batch's dimension; here it is that of all tokens together, so that it does not depend on how they
    are cut into batches, and padding does not count (there it does).
    Memory: a matrix of neurons x neurons, float64, for every block; time: its eigenvalues.

    eta: share of the variance, above 0 and below 1; the code has 0.99 for BERT's blocks and 0.9 for MobileBERT's.
    where: before the activation function ("pre"; the released code), in a gated MLP the gate's outputs, or what the
        last matrix reads ("post").
    """
    mlps = {block.index: block.mlp for block in specimen.anatomy.blocks if isinstance(block.mlp, MLP)}
    if not mlps:
        raise NotApplicable("no block of this model has an MLP: they were dropped, or are mixtures of experts")
    tallies = {layer: Scatter() for layer in mlps}
    while (seen := (yield)) is not None:
        for layer, mlp in mlps.items():
            entrance = seen.up if mlp.gate is None else seen.gate
            states: Tensor = (entrance if where == "pre" else seen.neurons)[layer]
            tallies[layer].add(states.flatten(0, -2) if seen.mask is None else states[seen.mask])
    dimension = torch.tensor([tally.dimension(eta) for tally in tallies.values()])
    neurons, read = (torch.tensor([mlp.up.shape[side] for mlp in mlps.values()]) for side in (0, 1))
    parameters = sum(parameter.numel() for parameter in specimen.model.parameters())
    tokens, proxy = next(iter(tallies.values())).rows, dimension.double().mean()
    quantities = {
        "dimension": Quantity(dimension, ("layer",), "", "principal components that hold the share of the variance"),
        "neurons": Quantity(neurons, ("layer",), "neurons", "width of the hidden layer"),
        "read": Quantity(read, ("layer",), "", "width of what the MLP reads"),
        "proxy": Quantity(proxy, (), "", "V: mean dimension over the blocks"),
        "parameters": Quantity(torch.tensor(parameters), (), "", "parameters of the model"),
        "score": Quantity(proxy * parameters, (), "", "W-PCA: V times the parameters"),
        "tokens": Quantity(torch.tensor(tokens), (), "tokens", "T"),
    }
    return Result(
        quantities, _findings(quantities, list(mlps), eta, where), _caveats(neurons, read, tokens, where),
        {"layer": [str(layer) for layer in mlps]},
    )  # fmt: skip


def _findings(quantities: dict[str, Quantity], layers: list[int], eta: float, where: Where) -> list[str]:
    values = {name: one.values for name, one in quantities.items()}
    dimension, neurons = values["dimension"], values["neurons"]
    least, most = int(dimension.argmin()), int(dimension.argmax())
    side = "before the activation function" if where == "pre" else "that the last matrix reads"
    return [
        f"On {int(values['tokens'])} tokens, {float(values['proxy']):.1f} principal components hold {eta:.4g} of the "
        f"variance of the hidden activations {side} (mean over {len(layers)} blocks): from {int(dimension[least])} of "
        f"{int(neurons[least])} in block {layers[least]} to {int(dimension[most])} of {int(neurons[most])} in "
        f"block {layers[most]}.",
        f"Times {int(values['parameters']):,} parameters, W-PCA is {float(values['score']):.4g}. Of untrained models "
        "on the same text, the larger score is ranked higher.",
    ]


def _caveats(neurons: Tensor, read: Tensor, tokens: int, where: Where) -> list[str]:
    caveats = [
        "The score grows with the number of parameters by its definition. Compare its ranking with that of the "
        "parameter count alone before believing it.",
        "It is meant for models with random weights. Training changes the dimensions, and models that share the "
        "weights of a super-network have others: compare like with like.",
    ]
    if where == "pre" and bool((neurons > read).any()):
        caveats.append(
            "Before the activation a layer has no more directions than the stream that it reads is wide, however many "
            "neurons it has; there the parameter count does most of the ranking. where=post has no such bound."
        )
    if tokens < _ENOUGH * int(neurons.max()):
        caveats.append(
            f"{tokens} tokens are few for {int(neurons.max())} neurons: the dimension is at most the tokens less one, "
            f"and too small already below several tokens a neuron."
        )
    return caveats
