"""How the residual stream grows with depth: variance, largest activation, what each sublayer adds, and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...data import Specimen
from ...forward import at_rest, backpropagate, real_positions, run_body, summed_loss, task_of, to_device, watch
from ..draw import Drawing, lines
from ..registry import probing
from ..result import Quantity, Result

_HALF = 65504.0  # the largest number of float16


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    drawn: list[Drawing] = [
        lines(
            "Variance of the stream", "Over channels, mean over tokens, before each block and after the last. A "
            "straight line: every block adds about as much. One that bends upwards: later blocks add more.",
            {"variance": result["variance"]}, xlabel="layer", ylabel="variance", log=True,
        ),
        lines(
            "Largest activation", "The largest magnitude anywhere in the stream, and its root mean square.",
            {"largest": result["largest"], "root mean square": result["rms"]},
            xlabel="layer", ylabel="magnitude", log=True,
        ),
    ]  # fmt: skip
    if "attention" in result.quantities:
        drawn.append(
            lines(
                "What sublayers add", "Root mean square of what attention and the MLP add to the stream.",
                {unit: result[unit] for unit in ("attention", "mlp")}, xlabel="block", ylabel="magnitude", log=True,
            )
        )  # fmt: skip
    if "gradient" in result.quantities:
        drawn.append(
            lines(
                "Gradients", "Length of the gradient of the mean loss in all matrices of a block. Level: every block "
                "learns at the same pace under plain gradient steps.",
                {"gradient": result["gradient"]}, xlabel="block", ylabel="length", log=True,
            )
        )  # fmt: skip
    return drawn


@probing("stream-growth", title="Growth of the residual stream", paper="arXiv:2502.02732", draw=draw)
def stream_growth(specimen: Specimen, *, gradients: bool = True) -> Result:
    """How far activations and gradients grow with depth, which is what the place of norms decides.

    Of the stream x (before each block, and after the last) the variance over channels, its mean over tokens; the root
    mean square; and the largest magnitude. Of attention and MLP, where they add to the stream, the root mean square of
    what they add. The gradient is that of the mean loss over the text, its length over all matrices of a block.
    Straight lines are fitted to the variance and to its logarithm over depth, and the better fit is named.
    Memory: with gradients, one more copy of the blocks. Time: one pass forward and, with gradients, back. Padding is
    left out.

    gradients: whether to look at those too; they need a loss.
    """
    anatomy = specimen.anatomy
    adds = not any(block.post_norm for block in anatomy.blocks)
    batches = list(specimen.text)
    task = task_of(specimen.model)
    loss = gradients and task != "unknown" and (task == "causal" or all("labels" in batch for batch in batches))
    layers = specimen.layers
    sums = {"variance": torch.zeros(layers + 1), "square": torch.zeros(layers + 1)}
    sums |= {unit: torch.zeros(layers) for unit in ("attention", "mlp")}
    sums = {name: total.double() for name, total in sums.items()}
    largest, count, predictions = torch.zeros(layers + 1, dtype=torch.float64), 0, 0
    with at_rest(specimen.model), _collecting(anatomy, loss) as parameters:
        for batch in specimen.shown(batches, "growth"):
            with watch(anatomy, ["residual", "attention", "mlp"] if adds else ["residual"]) as seen:
                if loss:
                    backpropagate(specimen.model, batch, counted := _Counted())
                    predictions += counted.predictions
                else:
                    with torch.no_grad():
                        run_body(specimen.model, to_device(batch, specimen.model.device))
            real = real_positions(to_device(batch, specimen.model.device))
            for layer in range(layers + 1):
                x = _rows(seen.residual[layer], real)
                sums["variance"][layer] += x.var(-1, unbiased=False).sum().cpu()
                sums["square"][layer] += x.square().mean(-1).sum().cpu()
                largest[layer] = torch.maximum(largest[layer], x.abs().max().cpu())
            count += len(_rows(seen.residual[0], real))
            for unit in ("attention", "mlp"):
                for layer, added in getattr(seen, unit).items():
                    sums[unit][layer] += _rows(added, real).square().mean(-1).sum().cpu()
        lengths = [
            sum(float(one.grad.double().square().sum()) for one in block if one.grad is not None) ** 0.5
            for block in parameters
        ]
    quantities = {
        "variance": Quantity(sums["variance"] / count, ("layer",), "", "variance over channels, mean over tokens"),
        "rms": Quantity((sums["square"] / count).sqrt(), ("layer",), "", "root mean square of the stream"),
        "largest": Quantity(largest, ("layer",), "", "largest magnitude in the stream"),
    }
    if adds:
        for unit in ("attention", "mlp"):
            about = f"root mean square of what the {unit} sublayer adds"
            quantities[unit] = Quantity((sums[unit] / count).sqrt(), ("block",), "", about)
    if loss and predictions:
        found = torch.tensor(lengths, dtype=torch.float64) / predictions
        quantities["gradient"] = Quantity(
            found, ("block",), "nats", "length of the gradient of the mean loss in the block's matrices"
        )
    return Result(quantities, _findings(quantities), _caveats(adds, gradients, "gradient" in quantities))


class _Counted:
    """The summed loss, and how many predictions it was over."""

    def __init__(self) -> None:
        self.predictions = 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.predictions += len(labels)
        return summed_loss(logits, labels)


@contextmanager
def _collecting(anatomy: Anatomy, wanted: bool) -> Iterator[list[list[nn.Parameter]]]:
    """The matrices of each block; if wanted, they gather gradients inside the `with`, and are as before behind it."""
    blocks = [[one for one in block.module.parameters() if one.dim() > 1] for block in anatomy.blocks]
    every: list[Any] = [parameter for block in blocks for parameter in block] if wanted else []
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in every]
    try:
        for parameter in every:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield blocks
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def _rows(tensor: Tensor, real: Tensor | None) -> Tensor:
    """What is not at padding (n x d), float64."""
    return (tensor.flatten(0, -2) if real is None else tensor[real]).double()


def fit(values: Tensor) -> tuple[float, float]:
    """How much of the variation of some values (L + 1), and of their logarithms, a straight line over depth holds.

    As R²; 1 where there is nothing to explain.
    """
    found = []
    for one in (values.double(), values.double().log()):
        depth = torch.arange(len(one), dtype=torch.float64)
        depth, one = depth - depth.mean(), one - one.mean()
        rest = one - depth * (depth @ one) / (depth @ depth)
        total = float(one @ one)
        found.append(1.0 if total < 1e-24 else 1 - float(rest @ rest) / total)
    return found[0], found[1]


def _findings(quantities: dict[str, Quantity]) -> list[str]:
    variance, largest = quantities["variance"].values, quantities["largest"].values
    straight, exponential = fit(variance)
    better = "in proportion to depth" if straight >= exponential else "by a factor a layer"
    findings = [
        f"The stream's variance goes from {float(variance[0]):.3g} to {float(variance[-1]):.3g} over "
        f"{len(variance) - 1} blocks. It grows rather {better}: R² {straight:.3f} of a straight line, "
        f"{exponential:.3f} of one through the logarithms.",
        f"The largest activation is {float(largest.max()):.4g}, at layer {int(largest.argmax())}: "
        f"{float(largest.max()) / _HALF:.2%} of what float16 can hold.",
    ]
    if "gradient" in quantities:
        gradient = quantities["gradient"].values
        findings.append(
            f"Gradients are longest in block {int(gradient.argmax())} ({float(gradient.max()):.3g} nats) and shortest "
            f"in block {int(gradient.argmin())} ({float(gradient.min()):.3g})."
        )
    return findings


def _caveats(adds: bool, asked: bool, loss: bool) -> list[str]:
    caveats = [
        "A fit over few layers says little, and growth at random weights is not growth after training: compare models "
        "of one size at the same stage."
    ]
    if not adds:
        caveats.append(
            "Norms stand behind the residual sum, so there is no telling what a sublayer adds to the stream."
        )
    if asked and not loss:
        caveats.append("There are no gradients: the model has no head whose loss is known, or there are no labels.")
    return caveats
