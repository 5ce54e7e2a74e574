"""What the bricks probe's numbers say, in sentences."""

from __future__ import annotations

import torch

from ...result import Result
from .sparsity import INDICATORS, MASKED, RANDOM, below, costless

SMALL = 0.05  # nats that count as almost nothing (ours)


def about_sparsity(result: Result) -> list[str]:
    """Of running text."""
    share = below(result["distribution"], 0.2).mean(1).tolist()
    losses = result["masked loss"]
    free = {way: costless(losses[number].tolist(), SMALL) for number, way in enumerate((*INDICATORS, RANDOM))}
    half = MASKED.index(0.7)
    return [
        f"In a token and layer, {share[0]:.0%} of the neurons have an activation below a fifth of the largest, "
        f"{share[1]:.0%} an output below a fifth of the largest output.",
        f"Of every token and layer {free['activation']:.0%} can be at zero by activation, {free['output']:.0%} by "
        f"output and {free[RANDOM]:.0%} at random before the loss rises by more than {SMALL} nats (from "
        f"{float(losses[0, 0]):.3f}). With {MASKED[half]:.0%} at zero it is {float(losses[0, half]):.3f}, "
        f"{float(losses[1, half]):.3f} and {float(losses[2, half]):.3f}; without "
        f"any neurons {float(losses[0, -1]):.3f}.",
    ]


def about_functions(result: Result) -> list[str]:
    """Of labelled texts."""
    names, best = result.labels["function"], result["best"].amax(1)
    order = best.argsort(descending=True).tolist()
    shown = ", ".join(f"{names[c]} {float(best[c]):.2f}" for c in order)
    chance = float(result["best by chance"].max())
    told = [
        f"The best neuron's score by kind: {shown}. With shuffled labels the best of all is {chance:.2f}; over all "
        f"neurons the mean is {float(result['mean'].mean()):.3f}, where no information gives "
        f"{float(result['base'].mean()):.3f}."
    ]
    rise, count = result["rise"], len(names)
    other = ~torch.eye(count, dtype=torch.bool)
    own, others = rise.diagonal(), rise[other].view(count, -1).mean(1)
    worst = int((own - others).argmax())
    told.append(
        f"Without the {float(result['share']):.1%} of the neurons that serve a kind best, its own perplexity rises by "
        f"{float(own.mean()):.0%} on average and that of other kinds by {float(others.mean()):.0%}; without as many "
        f"random neurons by {float(result['random rise'].mean()):.0%}. Most of its own is {names[worst]}: "
        f"{float(own[worst]):+.0%} against {float(others[worst]):+.0%} for the others."
    )
    told.append(
        f"Two kinds share {float(result['overlap'][other].mean()):.0%} of these neurons on average; random sets would "
        f"share {float(result['share']):.0%}."
    )
    experts = result["experts"]
    if bool(experts.isfinite().any()):
        told.append(
            f"Of groups of neurons that read alike {float(experts.nanmean()):.1%} hold more of a kind's best neurons "
            f"than chance gives in one of 1000 cases; of random groups "
            f"{float(result['experts by chance'].nanmean()):.2%}."
        )
    return told
