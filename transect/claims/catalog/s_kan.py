"""Claims of S-KAN (Yang et al. 2024, arXiv:2408.08338)."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, median

import torch
from torch import Tensor, nn

from ...parts.catalog.s_kan import KANLayer, SelectableKAN
from ...parts.catalog.s_kan.part import FAMILIES
from ..context import Context
from ..descent import descend
from ..registry import Result, Verdict, claim

STEPS, SEEDS, RATE, POINTS, SIZE = 400, (0,), 1e-2, 1000, 6
TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exp(sin πa + b²)": lambda a, b: (torch.sin(math.pi * a) + b**2).exp(),
    "ab": lambda a, b: a * b,
    "sin 4πa cos πb": lambda a, b: torch.sin(4 * math.pi * a) * torch.cos(math.pi * b),
    "||a| - |b||": lambda a, b: (a.abs() - b.abs()).abs(),
}


@claim(
    "s-kan/selects",
    method="s-kan",
    paper="arXiv:2408.08338",
    statement="Fitted to functions of two variables, a network whose nodes choose their family, pruned to it, is never "
    "as bad as the worst family alone, no worse than their median, and better than an MLP of its size.",
)
def selects(context: Context) -> Result:
    """Our scale: nets of 2, 5 and 1 nodes, 400 steps; half of them with all families, a quarter sharper, a quarter
    pruned. It is trained on points, and says nothing of the model."""
    numbers, held = [], []
    for name, target in TARGETS.items():
        errors = {family: fmean(error(target, [family], seed) for seed in SEEDS) for family in FAMILIES}
        chosen = fmean(error(target, list(FAMILIES), seed) for seed in SEEDS)
        mlp = fmean(error(target, [], seed) for seed in SEEDS)
        held += [chosen < max(errors.values()), chosen <= median(errors.values()), chosen < mlp]
        numbers.append({"function": name, "selected": chosen, "mlp": mlp, **errors})
    return Result(
        Verdict.of(all(held)),
        f"{sum(held)} of {len(held)} comparisons (worst family, median family, MLP on {len(TARGETS)} functions) are as "
        f"said, of means over {len(SEEDS)} seeds",
        numbers,
    )


def error(target: Callable[[Tensor, Tensor], Tensor], families: list[str], seed: int) -> float:
    """Held-out mean squared error over the variance; of several families after pruning; of none that of an MLP."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = 2 * torch.rand(2 * POINTS, 2) - 1
        y = target(x[:, 0], x[:, 1])[:, None]
        y = (y - y.mean()) / y.std()
        if not families:
            net: nn.Module = nn.Sequential(nn.Linear(2, 34), nn.SiLU(), nn.Linear(34, 1))  # 137 numbers
        else:
            net = SelectableKAN(2, 1, size=SIZE)
            net.first, net.second = KANLayer(2, 5, families, SIZE), KANLayer(5, 1, families, SIZE)

        def loss(_: int) -> Tensor:
            return (net(x[:POINTS]) - y[:POINTS]).square().mean()

        if len(families) < 2:
            fit(net, loss, STEPS)
        else:
            layers = [net.first, net.second]  # type: ignore[list-item]

            def sharper(step: int) -> Tensor:
                for layer in layers:
                    layer.temperature.fill_(10 ** -(step / (STEPS // 4)))  # type: ignore[union-attr, operator]
                return loss(step)

            fit(net, loss, STEPS // 2)
            fit(net, sharper, STEPS // 4)
            for name, layer in zip(("first", "second"), layers, strict=True):
                setattr(net, name, layer.pruned(layer.logits.argmax(1)))  # type: ignore[union-attr, operator]
            fit(net, loss, STEPS // 4)
        with torch.no_grad():
            return float((net(x[POINTS:]) - y[POINTS:]).square().mean())


def fit(net: nn.Module, loss: Callable[[int], Tensor], steps: int) -> None:
    """AdamW without decay."""
    descend(net, loss, max(1, steps), RATE, weight_decay=0.0, warm_up=0.0)
