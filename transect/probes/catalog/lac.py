"""Which layers a token uses, in prompts and in what the model writes."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from ...activations import Specimen, changed, watch
from ...errors import NotApplicable
from ...parameters import Range
from ..draw import Drawing, lines
from ..excerpts import excerpt
from ..places import wide
from ..registry import probing
from ..result import Quantity, Result
from ..voids import Skipping, Spread, activity, last_active, norms_of

ALPHAS = (0.0, 0.2, 0.5, 0.8)
PHASES = ("prompt", "generated", "text")
PAIRS = ("prompt and generated", "prompt and text", "generated and text", "halves of prompts", "halves of generated")
READINGS = ("plain", "exit", "skip")
CONTROLS = ("length", "random", "cosine")
DRAWS = 200


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    alphas = result.label("alpha", len(result["loss"][0]))
    return [
        lines(
            "Active layers by depth",
            "Share of tokens for which the layer lengthens the state by at least the threshold. The first two layers "
            "are "
            "compared with zero. Generated tokens and the text's own at the same places; prompts without the first "
            "token.",
            {f"{phase} tokens": result["activity"][number] for number, phase in enumerate(PHASES)}
            | {"first token": result["activity_first"]},
            xlabel="layer", ylabel="share active",
        ),
        lines(
            "Next-token loss without void layers",
            "exit: predicted from the state behind the last active layer. skip: void layers are passed by. plain: the "
            "model as it is.",
            {name: result["loss"][number] for number, name in enumerate(READINGS)},
            x=alphas, xlabel="alpha", ylabel="nats",
        ),
        lines(
            "What layers do to a state",
            "A layer can turn a state without lengthening it and is then called void. Means over the text's tokens "
            "without the first.",
            {
                "change of length": result["step"], "length of the change": result["turn"],
                "cosine before and after": result["cosine"],
            },
            xlabel="layer", ylabel="relative to the state's length, or cosine",
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
    ids = excerpt(specimen, prompts, length + generate, 8)
    if len(ids) < 4:
        raise NotApplicable(
            f"it compares halves of the prompts and needs a text of at least 4 sequences, got {len(ids)}"
        )
    new = min(generate, ids.shape[1] // 2)
    start = ids.shape[1] - new
    tokens, norms, counted = generated(specimen, ids[:, :start], new)
    if not bool(counted.any()):
        raise NotApplicable(
            "the model ends every text of the excerpt at once: there are no generated tokens to look at"
        )
    alphas = sorted({*ALPHAS, alpha})
    generator = torch.Generator().manual_seed(specimen.seed)

    with torch.no_grad(), watch(specimen.anatomy, ["residual"]) as seen:
        logits = specimen.model(input_ids=ids, use_cache=False).logits
    text, text_norms = dict(seen.residual), norms_of(seen.residual)
    loss = torch.zeros(len(READINGS), len(alphas))
    loss[0] = next_token_loss(logits, ids)
    share, executed = torch.zeros(len(PHASES), len(alphas)), torch.zeros(len(alphas))
    difference, agreement = torch.zeros(len(PAIRS), len(alphas)), torch.zeros(2, len(alphas))
    profiles = torch.zeros(len(PHASES), specimen.layers)
    plain = continuation(specimen, ids[:, :start], tokens)
    for number, one in enumerate(alphas):
        parts = phases(activity(norms, one, spread), activity(text_norms, one, spread), counted, start)
        frequencies = torch.stack([frequency(active, counts) for active, counts in parts])
        share[:, number] = frequencies.mean(1)
        difference[:, number] = differences(frequencies, parts, generator)
        if one == alpha:
            profiles = frequencies
        active = activity(text_norms, one, spread)
        with torch.no_grad():
            loss[1, number] = next_token_loss(lens(last_active(text, active)), ids)
            exits = lens(last_active(plain, activity(norms, one, spread)))[:, start:]
        skipping = Skipping(specimen.layers, one, spread)
        loss[2, number], executed[number] = skipped_loss(specimen, ids, skipping)
        with torch.no_grad(), changed(specimen.anatomy, skipping.changes):
            skips = specimen.model(input_ids=torch.cat([ids[:, :start], tokens], 1), use_cache=False).logits[:, start:]
        best = lens(plain[specimen.layers])[:, start:].argmax(-1)
        for row, found in enumerate((exits, skips)):
            agreement[row, number] = (found.argmax(-1) == best)[counted].float().mean()

    active = activity(text_norms, alpha, spread)
    step, turn, cosine = movement(text)
    control = controls(specimen, ids, active, cosine, generator)
    quantities = {
        "activity": Quantity(profiles, ("phase", "layer"), "share", "tokens for which the layer is active"),
        "activity_first": Quantity(
            activity(norms, alpha, spread)[:, :, 0].float().mean(1), ("layer",), "share", "first tokens, likewise"
        ),
        "active_share": Quantity(share, ("phase", "alpha"), "share", "active layers, mean over tokens and layers"),
        "difference": Quantity(difference, ("pair", "alpha"), "share", "difference of activity profiles"),
        "loss": Quantity(loss, ("reading", "alpha"), "nats", "next-token loss on the text"),
        "executed": Quantity(executed, ("alpha",), "share", "layers that are not passed by in skip mode"),
        "agreement": Quantity(agreement, ("mode", "alpha"), "share", "generated tokens that the reading predicts too"),
        "control_loss": Quantity(control, ("control",), "nats", "loss with as many layers of each token passed by"),
        "step": Quantity(step[..., 1:].mean((1, 2)), ("layer",), "", "change of length over length before"),
        "turn": Quantity(turn[..., 1:].mean((1, 2)), ("layer",), "", "length of the change over length before"),
        "cosine": Quantity(cosine[..., 1:].mean((1, 2)), ("layer",), "", "cosine of the state before and after"),
        "void_turn": Quantity(void_turn(turn, active), ("layer",), "", "length of the change where the layer is void"),
        "norms": Quantity(norms[:, :, 1:start].mean((1, 2)), ("state",), "", "mean length of a prompt token's state"),
    }
    labels = {
        "phase": PHASES, "pair": PAIRS, "reading": READINGS, "mode": READINGS[1:], "control": CONTROLS,
        "alpha": [f"{one:g}" for one in alphas],
    }  # fmt: skip
    at = alphas.index(alpha)
    told = findings(quantities, alpha, at, int(counted.sum()))
    return Result(quantities, told, CAVEATS, labels)


CAVEATS = (
    "A change of length is not a contribution: a layer that turns a state at constant length is called void. The "
    "length of "
    "the change stands beside it.",
    "One early layer that lengthens a state a hundredfold makes every later layer void by this rule; the first token "
    'often has such a layer. Compare spread="middle".',
    "Nothing is saved: in both readings all layers are computed, since the rule has to see what a layer does.",
    "A causal model computes a generated token just as it computes one of a prompt. What differs between the phases is "
    "the text and the place in it; compare the text's own tokens at the same places.",
    "The paper reports better answers with void layers left out. That is a matter of tasks, and is not measured here.",
)


@torch.no_grad()
def generated(specimen: Specimen, prompts: Tensor, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy continuation (P x new), lengths of all states (L + 1 x P x T + new), and which new tokens count (P x new).

    One pass over the prompts, then one token a pass through the key/value cache. An end of text, and what follows it,
    does not count.
    """
    tokens, past = prompts, None
    chosen: list[Tensor] = []
    lengths: list[Tensor] = []
    for _ in range(new + 1):
        with watch(specimen.anatomy, ["residual"]) as seen:
            output = specimen.model(input_ids=tokens, past_key_values=past, use_cache=True)
        lengths.append(norms_of(seen.residual))
        tokens, past = output.logits[:, -1:].argmax(-1), output.past_key_values
        chosen.append(tokens)
    written = torch.cat(chosen[:new], 1)
    return written, torch.cat(lengths, 2), ~ended(specimen, written)


def ended(specimen: Specimen, tokens: Tensor) -> Tensor:
    """Where an end of text stands or has gone before (P x N)."""
    config = getattr(specimen.model, "generation_config", None) or specimen.anatomy.config
    ends = config.eos_token_id
    if ends is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    numbers = torch.as_tensor(ends, device=tokens.device).reshape(-1)
    return torch.isin(tokens, numbers).cumsum(1) > 0


@torch.no_grad()
def continuation(specimen: Specimen, prompts: Tensor, tokens: Tensor) -> dict[int, Tensor]:
    """States of prompts with their continuations."""
    with watch(specimen.anatomy, ["residual"]) as seen:
        specimen.model.base_model(input_ids=torch.cat([prompts, tokens], 1), use_cache=False)
    return dict(seen.residual)


def phases(active: Tensor, text: Tensor, counted: Tensor, start: int) -> list[tuple[Tensor, Tensor]]:
    """Activity (L x P x n) with what counts (P x n) of prompts, generated tokens, and the text's own in their place."""
    everything = torch.ones_like(text[0])
    return [
        (active[:, :, 1:start], everything[:, 1:start]), (active[:, :, start:], counted),
        (text[:, :, start:], everything[:, start:]),
    ]  # fmt: skip


def frequency(active: Tensor, counts: Tensor) -> Tensor:
    """Share of the tokens that count for which each layer is active (L)."""
    return (active & counts).sum((1, 2)).cpu() / counts.sum().cpu()


def differences(frequencies: Tensor, parts: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> Tensor:
    """As in PAIRS: mean over layers of |f - g|, of two phases; for halves, what 95 % of random halves stay below."""
    prompt, written, text = frequencies
    found = [(prompt - written).abs().mean(), (prompt - text).abs().mean(), (written - text).abs().mean()]
    found += [halves_difference(*part, generator) for part in parts[:2]]
    return torch.stack(found)


def halves_difference(active: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """95 % quantile, over random halves of the sequences, of the difference of their profiles."""
    sums, sizes = (active & counts).sum(2).float().cpu(), counts.sum(1).float().cpu()  # L x P, P
    prompts = len(sizes)
    order = torch.rand(DRAWS, prompts, generator=generator).argsort(1)
    first = (order < prompts // 2).float()  # DRAWS x P
    f, g = (sums @ half.T / (sizes @ half.T) for half in (first, 1 - first))
    return (f - g).abs().mean(0).nanquantile(0.95)


def movement(states: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Change of length, length of the change, over the length before; cosine of before and after (each L x B x T)."""
    step, turn, cosine = [], [], []
    for layer in range(len(states) - 1):
        before, after = wide(states[layer]), wide(states[layer + 1])
        size = before.norm(dim=-1).clamp_min(1e-6)
        step.append((after.norm(dim=-1) - before.norm(dim=-1)) / size)
        turn.append((after - before).norm(dim=-1) / size)
        cosine.append(cosine_similarity(before, after, dim=-1))
    return torch.stack(step), torch.stack(turn), torch.stack(cosine)


def void_turn(turn: Tensor, active: Tensor) -> Tensor:
    """Mean length of the change where the layer is void, without the first token (L); NaN where it never is."""
    void = ~active[..., 1:]
    return (turn[..., 1:] * void).sum((1, 2)) / void.sum((1, 2))


@torch.no_grad()
def skipped_loss(specimen: Specimen, ids: Tensor, skipping: Skipping) -> tuple[float, float]:
    """Next-token loss in skip mode, and the share of layers that are not passed by, without the first token."""
    with changed(specimen.anatomy, skipping.changes):
        logits = specimen.model(input_ids=ids, use_cache=False).logits
    return next_token_loss(logits, ids), float(torch.stack(skipping.active)[..., 1:].float().mean())


def controls(specimen: Specimen, ids: Tensor, active: Tensor, cosine: Tensor, generator: torch.Generator) -> Tensor:
    """Losses with as many layers of each token passed by, as in CONTROLS. active, cosine: L x P x T."""
    chance = torch.rand(active.shape, generator=generator).to(ids.device)
    chance[0] = -1  # the first layer last of all: a model without it fails, and would decide the comparison alone
    choices = [active] + [as_many(active, score) for score in (chance, cosine)]
    return torch.tensor([skipped_loss(specimen, ids, Skipping(specimen.layers, fixed=one))[0] for one in choices])


def as_many(active: Tensor, score: Tensor) -> Tensor:
    """Activity (L x ...) with as many void layers for each token as `active` has: those with the largest scores."""
    rank = score.argsort(0, descending=True).argsort(0)
    return rank >= (~active).sum(0)


def next_token_loss(logits: Tensor, ids: Tensor) -> float:
    """Mean over all predictions, in nats."""
    return float(cross_entropy(wide(logits[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))


def findings(quantities: dict[str, Quantity], alpha: float, at: int, written: int) -> list[str]:
    """What the numbers say, in sentences."""
    values = {name: one.values for name, one in quantities.items()}
    prompt, new, _ = values["active_share"][:, at].tolist()
    between, text, _, prompt_halves, new_halves = values["difference"][:, at].tolist()
    plain, exit_loss, skip_loss = values["loss"][:, at].tolist()
    length, chance, cosine = values["control_loss"].tolist()
    profile = values["activity"][0]
    told = [
        f"At alpha {alpha:g}, {prompt:.0%} of the layers are active for a prompt's tokens and {new:.0%} for the "
        f"{written} "
        f"generated ones (without the first token of a prompt: {float(values['activity_first'].mean()):.0%} for that)."
    ]
    rare = [str(layer) for layer in range(len(profile)) if profile[layer] < 0.1]
    if rare:
        told.append(f"Active for fewer than a tenth of the prompts' tokens: layer {', '.join(rare)}.")
    noise = max(prompt_halves, new_halves)
    told.append(
        f"Between prompts and generated tokens the share of active tokens differs by {between:.3f} a layer, and "
        "between "
        f"random halves of one phase by less than {noise:.3f} in 95 % of draws: "
        + ("the phases differ" if between > noise else "no difference that could not be chance")
        + f". The text's own tokens at the same places differ from the prompts by {text:.3f}."
    )
    told.append(
        f"The loss on the text is {plain:.3f} nats. Predicted from the last active layer it is {exit_loss:.3f}; with "
        "void "
        f"layers passed by, {skip_loss:.3f}, at {float(values['executed'][at]):.0%} of the layers. At that alpha the "
        "two "
        f"readings give {values['agreement'][0, at]:.0%} and {values['agreement'][1, at]:.0%} of the tokens that the "
        "model "
        "generates."
    )
    told.append(
        f"With the same number of layers passed by for each token, the loss is {length:.3f} for those that the rule "
        "finds, "
        f"{cosine:.3f} for those with the largest cosine, and {chance:.3f} for random ones: "
        + (
            "the rule finds layers that matter less."
            if length < chance - 0.01
            else "the rule is no better than chance here, to within 0.01 nats."
        )
    )
    void = values["void_turn"]
    if bool(void.isfinite().any()):
        told.append(
            "Void layers are not idle: where a layer is void it still changes the state by "
            f"{float(void.nanmean()):.2f} of its length (mean over layers)."
        )
    return told
