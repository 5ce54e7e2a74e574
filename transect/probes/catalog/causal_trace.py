"""Where in the model a fact can be brought back after its subject was destroyed."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...data import Specimen
from ...parameters import Range
from ..draw import Drawing, heatmap, lines
from ..registry import probing
from ..result import Quantity, Result
from ..tracing import Trace, answered, embedding_deviation, trace, window_of

ROLES = (
    "first subject token", "middle subject tokens", "last subject token", "first token after the subject",
    "tokens between", "last token of the prompt",
)  # fmt: skip
_NAMES = {"mlp": "MLP outputs", "attention": "attention outputs", "block": "block outputs"}


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    effect, fraction = result["role effect"], result["fraction"]
    what = _NAMES[result.settings["kind"]]
    return [
        heatmap(
            f"What restoring {what} brings back", "Probability of the answer gained by restoring one site in the noisy "
            "run, mean over facts. Dark is nothing, bright is a site through which the fact passes.",
            effect, y=result.label("role", len(effect)), xlabel="layer", ylabel="token", unit="probability",
        ),
        lines(
            "Share of the loss restored", "For each fact the best token of the layer, then the mean over facts. 1 "
            "means that one site undoes the noise.", {"mean over facts": fraction.mean(0)},
            xlabel="layer", ylabel="share restored",
        ),
        heatmap(
            "Fact by fact", "The same for every fact: are the facts alike?", fraction,
            y=result.label("fact", len(fraction)), xlabel="layer", ylabel="fact", unit="share",
        ),
    ]  # fmt: skip


@probing(
    "causal-trace", title="Where facts can be restored: causal tracing", paper="arXiv:2202.05262, arXiv:2301.04213",
    draw=draw,
)  # fmt: skip
def causal_trace(
    specimen: Specimen,
    *,
    kind: Literal["mlp", "attention", "block"] = "mlp",
    window: Annotated[int, Range(0, 1000)] = 0,
    noise: Annotated[float, Range(0, 100)] = 3.0,
    samples: Annotated[int, Range(1, 1000)] = 10,
    facts: Annotated[int, Range(1, 100000)] = 30,
) -> Result:
    """Destroy the subject of known facts with noise, and see which clean activations bring the answer back.

    The facts are those that the model completes correctly. Three runs of each: clean; corrupted, with Gaussian noise
    on the subject's embeddings; restored, where the noisy run gets back the clean activations of one token in a few
    layers. The effect of a site is p(restored) - p(corrupted), mean over the noise, which is the same for every site.
    Tokens are averaged by their role in the prompt, as in Meng et al.; the only token of a subject counts as its last,
    the last token of the prompt as such, unless the subject ends there.

    kind: what is restored: mlp, attention (what they add), or block (the whole state of the token).
    window: how many layers are restored together. 0: the share of the paper's main analysis, 5 of 28, at least 1.
    noise: standard deviation of the noise, in standard deviations of the embeddings' entries.
    samples: draws of the noise.
    facts: how many facts at most (ours; each takes seconds on a model of 135 M parameters, and the findings give their
        standard errors); of more that the model knows, a choice at random, so that no kind prevails.
    """
    specimen.require_causal()
    layers = specimen.layers
    window = window or max(1, round(layers * 5 / 28))
    order = torch.randperm(len(specimen.facts), generator=torch.Generator().manual_seed(specimen.seed))
    known = answered(specimen, [specimen.facts[number] for number in order.tolist()], facts)
    scale = embedding_deviation(specimen)
    traces = [
        trace(
            specimen, fact, kind=kind, window=window, noise=noise, samples=samples, seed=specimen.seed, scale=scale
        )
        for fact in specimen.shown(known, "causal tracing")
    ]  # fmt: skip
    effects, roles = by_role(traces)
    clean, corrupted = (torch.tensor([getattr(one, name) for one in traces]) for name in ("clean", "corrupted"))
    fractions = torch.stack([one.by_layer for one in traces])
    mean = torch.stack([row[~row[:, 0].isnan()].mean(0) for row in effects.transpose(0, 1)])
    quantities = {
        "effect": Quantity(
            effects, ("fact", "role", "layer"), "probability", "p(restored) - p(corrupted); NaN: no token"
        ),
        "role effect": Quantity(
            mean, ("role", "layer"), "probability", "the same, mean over the facts with such a token"
        ),
        "fraction": Quantity(fractions, ("fact", "layer"), "share", "of the loss restored by the layer's best token"),
        "clean": Quantity(clean, ("fact",), "probability", "of the answer"),
        "corrupted": Quantity(corrupted, ("fact",), "probability", "of the answer with noise on the subject, mean"),
    }
    labels = {"role": roles, "fact": [f"{fact.text} {fact.answer}" for fact in known]}
    return Result(
        quantities,
        _findings(quantities, roles, kind, window, layers),
        _caveats(clean, corrupted, window, layers),
        labels,
    )


def by_role(traces: list[Trace]) -> tuple[Tensor, list[str]]:
    """Effects by role of the token (facts x roles x L), NaN where a fact has none, and the roles that occur."""
    means = []
    for one in traces:
        groups: dict[str, list[Tensor]] = defaultdict(list)
        for token in range(one.subject[0], len(one.effects)):
            groups[_role(token, *one.subject, len(one.effects))].append(one.effects[token])
        means.append({role: torch.stack(rows).mean(0) for role, rows in groups.items()})
    roles = [role for role in ROLES if any(role in one for one in means)]
    missing = torch.full_like(traces[0].effects[0], torch.nan)
    return torch.stack([torch.stack([one.get(role, missing) for role in roles]) for one in means]), roles


def _role(token: int, first: int, last: int, length: int) -> str:
    if token < last:
        return ROLES[2 if token == last - 1 else 0 if token == first else 1]
    return ROLES[5 if token == length - 1 else 3 if token == last else 4]


def _findings(quantities: dict[str, Quantity], roles: list[str], kind: str, window: int, layers: int) -> list[str]:
    clean, corrupted = quantities["clean"].values.mean(), quantities["corrupted"].values.mean()
    mean, effects = quantities["role effect"].values, quantities["effect"].values
    around = "" if window == 1 else f" and the layers around it ({window} at a time)"
    said = [
        f"For {len(effects)} facts that the model knows, the answer's mean probability is {clean:.3f}; with noise on "
        f"the subject it is {corrupted:.3f}."
    ]
    for role in ("last subject token", "last token of the prompt"):
        if role not in roles:
            continue
        row, all_facts = mean[roles.index(role)], effects[:, roles.index(role)]
        best = int(row.argmax())
        values = all_facts[:, best][~all_facts[:, best].isnan()]
        error = f" ± {values.std() / len(values) ** 0.5:.3f} (standard error)" if len(values) > 1 else ""
        said.append(
            f"At the {role}, restoring the {_NAMES[kind]} of layer {best}{around} helps most: {row[best]:+.3f}{error}, "
            f"which is {float(row[best] / (clean - corrupted)):.0%} of what the noise took."
            if row[best] > 0 and clean > corrupted
            else f"At the {role}, no layer's {_NAMES[kind]} bring the answer back (best, {best}: {row[best]:+.3f})."
        )
    peaks = quantities["fraction"].values.argmax(1).bincount(minlength=layers)
    top = int(peaks.argmax())
    said.append(
        f"Fact by fact, the layer that restores most is layer {top} for {int(peaks[top])} of {len(effects)} facts."
    )
    return said


def _caveats(clean: Tensor, corrupted: Tensor, window: int, layers: int) -> list[str]:
    found = [
        "Where a fact can be restored is not where it is best edited: Hase et al. find that tracing effects say almost "
        "nothing about which layer an edit should change.",
        "A fact that passes through several sites at once can show no effect at any single one.",
    ]
    weak = int((corrupted > 0.5 * clean).sum())
    if weak:
        found.append(f"For {weak} facts the noise left more than half of the probability: there is little to restore.")
    if len(window_of(layers // 2, window, layers)) > layers / 2:
        found.append(f"A window of {window} of {layers} layers is wide: neighbouring layers cannot be told apart.")
    return found
