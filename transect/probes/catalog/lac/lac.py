"""Which layers a token uses, in prompts and in what the model writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from ....data import Specimen
from ....parameters import Range
from ...draw import Drawing, lines
from ...registry import probing
from ...result import Quantity, Result
from .phases import PAIRS, PHASES, Texts, read
from .void_losses import CONTROLS, READINGS, Sweep, controls, movement, sweep, void_turn
from .voids import Spread, activity, norms_of

ALPHAS = (0.0, 0.2, 0.5, 0.8)


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    alphas = result.label("alpha", len(result["loss"][0]))
    return [
        lines(
            "Active layers by depth", "Share of tokens for which the layer lengthens the state by at least the "
            "threshold. The first two layers are compared with zero. Generated tokens and the text's own at the same "
            "places; prompts without the first token.",
            {f"{phase} tokens": result["activity"][number] for number, phase in enumerate(PHASES)}
            | {"first token": result["activity_first"]},
            xlabel="layer", ylabel="share active",
        ),
        lines(
            "Next-token loss without void layers", "exit: predicted from the state behind the last active layer. "
            "skip: void layers are passed by. plain: the model as it is.",
            {name: result["loss"][number] for number, name in enumerate(READINGS)},
            x=[float(alpha) for alpha in alphas], xlabel="alpha", ylabel="nats",
        ),
        lines(
            "How far layers move a state", "A layer can turn a state without lengthening it and is then called void. "
            "Means over the text's tokens without the first.",
            {"length of the change": result["turn"], "change of length, up or down": result["step"].abs()},
            xlabel="layer", ylabel="relative to the state's length", log=True,
        ),
        lines(
            "How far layers turn a state", "Cosine of the state before and after. 1: not turned at all.",
            {"cosine": result["cosine"]}, xlabel="layer", ylabel="cosine before and after",
        ),
    ]  # fmt: skip


@probing("lac", title="Layers that tokens do not use", paper="arXiv:2505.14467", draw=draw)
def lac(
    specimen: Specimen,
    *,
    alpha: Annotated[float, Range(0, 10)] = 0.8,
    spread: Spread = "range",
    prompts: Annotated[int, Range(4, 1000)] = 16,
    length: Annotated[int, Range(4, 4096)] = 32,
    generate: Annotated[int, Range(4, 4096)] = 32,
) -> Result:
    """Layers that lengthen a token's state too little to count as used, in prompts and in generated tokens.

    Shemiranifar 2025: see `voids` for the rule. Prompts are beginnings of the text, run in one pass; then the model
    goes on greedily through its key/value cache, and nothing counts after an end of text.

    Two readings are kept apart. "exit" is what the released code does: all layers are computed, and the prediction is
    made from the state behind the last active one. "skip" is what the paper's words suggest, and our design: a void
    layer passes the state on as it is. The losses are those of the text. Controls (ours) skip as many layers of each
    token: those that the rule found on the unchanged stream, random ones behind the first layer, or those with the
    largest cosine between state before and after. Profiles of two phases are compared by the mean over layers of the
    difference of their shares of active tokens, and so are random halves of the prompts.

    alpha: share of the spread of earlier changes that a layer must reach; 0 asks only that the state does not shrink.
    spread: "range" is the largest minus the smallest earlier change; "middle" the distance of their 10 % and 90 %
        quantiles, which one huge change does not move (ours).
    prompts: number of prompts.
    length: tokens of a prompt; shorter where the text is.
    generate: tokens to generate after each prompt.
    """
    specimen.require_causal()
    specimen.require_contributions()
    lens = specimen.lens
    texts = read(specimen, prompts, length, generate)
    alphas = sorted({*ALPHAS, alpha})
    at = alphas.index(alpha)
    generator = torch.Generator().manual_seed(specimen.seed)
    swept = sweep(specimen, lens, texts, alphas, spread, generator)
    quantities = _by_alpha(swept, at) | _by_layer(specimen, texts, alpha, spread, generator)
    labels = {
        "phase": PHASES, "pair": PAIRS, "reading": READINGS, "mode": READINGS[1:], "control": CONTROLS,
        "alpha": [f"{one:g}" for one in alphas],
    }  # fmt: skip
    return Result(quantities, _findings(quantities, alpha, at, int(texts.counted.sum())), CAVEATS, labels)


CAVEATS = (
    "A change of length is not a contribution: a layer that turns a state at constant length is called void. The "
    "length of the change stands beside it.",
    "One early layer that lengthens a state a hundredfold makes every later layer void by this rule; the first token "
    'often has such a layer. Compare spread="middle".',
    "Nothing is saved: in both readings all layers are computed, since the rule has to see what a layer does.",
    "A causal model computes a generated token just as it computes one of a prompt. What differs between the phases is "
    "the text and the place in it; compare the text's own tokens at the same places.",
    "The paper reports better answers with void layers left out. That is a matter of tasks, and is not measured here.",
)


def _by_alpha(swept: Sweep, at: int) -> dict[str, Quantity]:
    """What was measured at every alpha, and the profiles of the one at place `at`."""
    profiles = swept.profiles[..., at]
    return {
        "activity": Quantity(profiles, ("phase", "layer"), "share", "tokens for which the layer is active"),
        "active_share": Quantity(
            swept.share, ("phase", "alpha"), "share", "active layers, mean over tokens and layers"
        ),
        "difference": Quantity(swept.difference, ("pair", "alpha"), "share", "difference of activity profiles"),
        "loss": Quantity(swept.loss, ("reading", "alpha"), "nats", "next-token loss on the text"),
        "executed": Quantity(swept.executed, ("alpha",), "share", "layers that are not passed by in skip mode"),
        "agreement": Quantity(
            swept.agreement, ("mode", "alpha"), "share", "generated tokens that the reading predicts too"
        ),
    }


def _by_layer(
    specimen: Specimen, texts: Texts, alpha: float, spread: Spread, generator: torch.Generator
) -> dict[str, Quantity]:
    """What layers do to states, and what it costs to pass by as many of them as are void."""
    active = activity(norms_of(texts.states), alpha, spread)
    step, turn, cosine = movement(texts.states)
    control = controls(specimen, texts.ids, active, cosine, generator)
    first = activity(texts.norms, alpha, spread)[:, :, 0].float().mean(1)
    mean = texts.norms[:, :, 1 : texts.start].mean((1, 2))

    def over_text(values: Tensor, about: str) -> Quantity:
        return Quantity(values[..., 1:].mean((1, 2)), ("layer",), "", about)

    return {
        "activity_first": Quantity(first, ("layer",), "share", "first tokens, likewise"),
        "control_loss": Quantity(control, ("control",), "nats", "loss with as many layers of each token passed by"),
        "step": over_text(step, "change of length over length before"),
        "turn": over_text(turn, "length of the change over length before"),
        "cosine": over_text(cosine, "cosine of the state before and after"),
        "void_turn": Quantity(void_turn(turn, active), ("layer",), "", "length of the change where the layer is void"),
        "norms": Quantity(mean, ("state",), "", "mean length of a prompt token's state"),
    }


def _findings(quantities: Mapping[str, Quantity], alpha: float, at: int, written: int) -> list[str]:
    """What the numbers say, in sentences. at: place of alpha. written: generated tokens that count."""
    values = {name: one.values for name, one in quantities.items()}
    return [*_which(values, alpha, at, written), *_costs(values, at)]


def _which(values: Mapping[str, Tensor], alpha: float, at: int, written: int) -> list[str]:
    """Which layers are active, and whether the phases differ in that."""
    prompt, new, _ = values["active_share"][:, at].tolist()
    between, text, _, *halves = values["difference"][:, at].tolist()
    profile, noise = values["activity"][0], max(halves)
    told = [
        f"At alpha {alpha:g}, {prompt:.0%} of the layers are active for a prompt's tokens and {new:.0%} for the "
        f"{written} generated ones (without the first token of a prompt: "
        f"{float(values['activity_first'].mean()):.0%} for that)."
    ]
    rare = [str(layer) for layer in range(len(profile)) if profile[layer] < 0.1]
    if rare:
        told.append(f"Active for fewer than a tenth of the prompts' tokens: layer {', '.join(rare)}.")
    verdict = "the phases differ" if between > noise else "no difference that could not be chance"
    told.append(
        f"Between prompts and generated tokens the share of active tokens differs by {between:.3f} a layer, and "
        f"between random halves of one phase by less than {noise:.3f} in 95 % of draws: {verdict}. The text's own "
        f"tokens at the same places differ from the prompts by {text:.3f}."
    )
    return told


def _costs(values: Mapping[str, Tensor], at: int) -> list[str]:
    """What it costs to leave void layers out, against others, and what they do."""
    plain, exit_loss, skip_loss = values["loss"][:, at].tolist()
    length, chance, cosine = values["control_loss"].tolist()
    verdict = (
        "the rule finds layers that matter less."
        if length < chance - 0.01
        else "the rule is no better than chance here, to within 0.01 nats."
    )
    told = [
        f"The loss on the text is {plain:.3f} nats. Predicted from the last active layer it is {exit_loss:.3f}; with "
        f"void layers passed by, {skip_loss:.3f}, at {float(values['executed'][at]):.0%} of the layers. At that alpha "
        f"the two readings give {values['agreement'][0, at]:.0%} and {values['agreement'][1, at]:.0%} of the tokens "
        "that the model generates.",
        f"With the same number of layers passed by for each token, the loss is {length:.3f} for those that the rule "
        f"finds, {cosine:.3f} for those with the largest cosine, and {chance:.3f} for random ones: {verdict}",
    ]
    void = values["void_turn"]
    if bool(void.isfinite().any()):
        told.append(
            "Void layers are not idle: where a layer is void it still changes the state by "
            f"{float(void.nanmean()):.2f} of its length (mean over layers)."
        )
    return told
