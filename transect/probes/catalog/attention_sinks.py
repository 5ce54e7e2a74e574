"""Attention sinks and massive activations: tokens that draw attention everywhere, and the huge numbers behind them."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import torch
from torch import Tensor

from ...data import Specimen
from ...forward import Seen, task_of
from ...parameters import Range
from ..draw import Drawing, Table, heatmap, lines
from ..registry import Looking, probing
from ..result import Quantity, Result

HALVES = ("attention", "mlp")
STRICT_SIZE, STRICT_RATIO = 100, 1000  # the definition for large models
LISTED = 10


def draw(result: Result) -> list[Drawing]:
    """Attention on the first token by head, the largest numbers by layer, alignment by layer, and the tokens."""
    sizes = {"largest": result["largest"], "median": result["median"]}
    counts = result["sink tokens"].tolist()
    rows = [[name, *row] for name, row in zip(result.label("token", 0), counts, strict=True)]
    return [
        heatmap(
            "Attention on the first token", "Mean attention that later positions pay to the first one. A head near 1 "
            "looks at nothing else.", result["first"], xlabel="head", ylabel="block", unit="share",
        ),
        lines(
            "Largest activation", "Magnitudes in the residual stream before each block and after the last. Massive "
            "activations stand orders of magnitude above the median.", sizes,
            xlabel="layer", ylabel="magnitude", log=True,
        ),
        lines(
            "Alignment with the first token", "Cosine of a state with that of the first token: all other tokens, and "
            "those with massive activations. A gap means that tokens with massive activations are alike.",
            {"all": result["cosine"], "massive": result["cosine massive"]}, xlabel="layer", ylabel="mean cosine",
        ),
        Table(
            "Tokens that draw attention", "How often each token was a sink somewhere behind the first position, how "
            "often it had a massive activation there, and how often it occurred.",
            ["token", "sink", "massive", "occurs"], rows,
        ),
    ]  # fmt: skip


def paid(weights: Tensor, real: Tensor | None) -> Tensor:
    """The attention that each token gets from all queries (B x H x T). weights: B x H x T x T; real: no padding."""
    weights = weights.float()
    return (weights if real is None else weights * real[:, None, :, None]).sum(2)  # padding looks at nothing


@probing(
    "attention-sinks",
    title="Attention sinks and massive activations",
    paper="arXiv:2510.22603",
    watches=["residual", "attention", "mlp", "patterns"],
    of_patterns=paid,
    draw=draw,
)
def attention_sinks(
    specimen: Specimen,
    *,
    threshold: Annotated[float, Range(0, 1)] = 0.3,
    ratio: Annotated[float, Range(1, 1e6)] = 30.0,
    queries: Annotated[int, Range(1, 100000)] = 8,
) -> Looking:
    """Find tokens that draw attention at every position, heads that do little else, and massive activations.

    The sink score of a token t in a head is the mean, over the queries q >= t that may look back at it, of the
    attention that q pays to t; over all queries in a model that looks both ways. A token is a sink of a block if its
    score, averaged over heads, is above the threshold; a head is a sink head if the first token's score is. A number in
    the residual stream is massive if its magnitude is more than `ratio` times the median magnitude in its sequence at
    that layer. That definition for small models, both thresholds and `queries` are our design; the one for large models
    (magnitude above 100 and 1000 times the median) is counted beside it. A massive activation starts in the half of a
    block that adds the larger number, in its direction, to that feature. Cosines are with the first token's state.

    This only looks. The paper's remedy, a loss in training that decorrelates hidden states from the first token's, is
    not here yet: it comes with training.

    threshold: share of attention above which a token is a sink.
    ratio: how many times the median a massive activation is.
    queries: positions after a token that must be able to look at it, or its score is not judged.
    """
    specimen.require_contributions()
    causal, tally = task_of(specimen.model) == "causal", Tally(specimen.layers)
    while (seen := (yield)) is not None:
        tally.add(seen, causal, threshold, ratio, queries)
    return tally.result(specimen, threshold, ratio)


class Tally:
    """Sums over the text; their size depends on layers, heads, features and vocabulary, not on the text."""

    def __init__(self, layers: int) -> None:
        self.layers, self.sequences, self.others = layers, 0, 0
        self.first: dict[int, Tensor] = {}  # block -> sum over sequences of the first token's score (H)
        self.sinks = torch.zeros(layers, 2)  # sinks at the first token, and behind it
        self.judged = 0  # tokens behind the first whose score was judged, in each block
        self.moments = torch.zeros(layers, 6, dtype=torch.float64)  # n, x, y, xx, yy, xy of cosine and score
        self.features = torch.zeros(0)  # massive entries, layer x feature
        self.tokens = torch.zeros(layers + 1, 2)  # tokens with massive entries: first ones, others
        self.strict = torch.zeros(layers + 1)
        self.largest, self.median = torch.zeros(layers + 1), torch.zeros(layers + 1, dtype=torch.float64)
        self.started = torch.zeros(
            layers, 2
        )  # massive entries that were not massive before, by the half that made them
        self.cosine = torch.zeros(
            layers + 1, 4, dtype=torch.float64
        )  # of others: sum, squares; of massive ones: sum, n
        self.sink_ids: Counter[int] = Counter()
        self.massive_ids: Counter[int] = Counter()
        self.ids: Counter[int] = Counter()

    def add(self, seen: Seen, causal: bool, threshold: float, ratio: float, queries: int) -> None:
        """One batch, with what the tokens are `paid` in place of its patterns."""
        batch, length, width = seen.residual[0].shape
        device = seen.residual[0].device
        real = torch.ones(batch, length, dtype=torch.bool, device=device) if seen.mask is None else seen.mask
        start = real.int().argmax(1)  # B: the first token that is not padding
        first = torch.arange(length, device=device) == start[:, None]
        other = real & ~first
        self.sequences, self.others = self.sequences + batch, self.others + int(other.sum())
        if not len(self.features):
            self.features = torch.zeros(self.layers + 1, width)
        sink_anywhere, massive_anywhere = torch.zeros_like(real), torch.zeros_like(real)
        was = None
        for layer in range(self.layers + 1):
            state = seen.residual[layer].float()
            size = state.abs()
            median = size.masked_fill(~real[..., None], torch.nan).flatten(1).nanmedian(1).values
            size = size * real[..., None]
            massive = size > ratio * median[:, None, None]
            self._add_massive(layer, size, median, massive, first)
            massive_anywhere |= massive.any(-1)
            cosine = torch.cosine_similarity(state, state[torch.arange(batch, device=device), start][:, None], dim=-1)
            some = other & massive.any(-1)
            self.cosine[layer] += torch.stack(
                [cosine[other].sum(), cosine[other].square().sum(), cosine[some].sum(), some.sum()]
            ).double().cpu()  # fmt: skip
            if was is not None:
                self._add_start(layer - 1, massive & ~was, state, seen)
            if layer in seen.patterns:
                sink_anywhere |= self._add_scores(layer, seen, real, first, cosine, causal, threshold, queries)
            was = massive
        if seen.ids is not None:
            self.ids.update(seen.ids[other].tolist())
            self.sink_ids.update(seen.ids[other & sink_anywhere].tolist())
            self.massive_ids.update(seen.ids[other & massive_anywhere].tolist())
        self.judged += int((other & _judged(real, causal, queries)).sum())

    def _add_massive(self, layer: int, size: Tensor, median: Tensor, massive: Tensor, first: Tensor) -> None:
        self.features[layer] += massive.sum((0, 1)).cpu()
        tokens = massive.any(-1)
        self.tokens[layer] += torch.stack([(tokens & first).sum(), (tokens & ~first).sum()]).cpu()
        self.strict[layer] += ((size > STRICT_SIZE) & (size > STRICT_RATIO * median[:, None, None])).sum().cpu()
        self.largest[layer] = max(self.largest[layer], size.max().cpu())
        self.median[layer] += median.sum().cpu()

    def _add_start(self, layer: int, new: Tensor, state: Tensor, seen: Seen) -> None:
        """Which half of the block added more to each newly massive number, in its direction."""
        zero = torch.zeros_like(state)
        parts = [getattr(seen, half).get(layer, zero).float() * state.sign() for half in HALVES]
        by_attention = parts[0] > parts[1]
        self.started[layer] += torch.stack([(new & by_attention).sum(), (new & ~by_attention).sum()]).cpu()

    def _add_scores(
        self,
        layer: int,
        seen: Seen,
        real: Tensor,
        first: Tensor,
        cosine: Tensor,
        causal: bool,
        threshold: float,
        queries: int,
    ) -> Tensor:
        """Sink scores in one block. Returns which tokens are sinks (B x T)."""  # fmt: skip
        looking = _looking(real, causal)
        score = seen.patterns[layer] / looking.clamp_min(1)[:, None]  # B x H x T
        at_first = (score * first[:, None]).sum((0, 2)).cpu()
        self.first[layer] = self.first.get(layer, 0) + at_first
        mean, judged = score.mean(1), _judged(real, causal, queries)
        sinks = (mean > threshold) & judged
        self.sinks[layer] += torch.stack([(sinks & first).sum(), (sinks & ~first).sum()]).cpu()
        x, y = cosine[judged & ~first].double(), mean[judged & ~first].double()
        self.moments[layer] += torch.stack(
            [torch.tensor(float(len(x))).to(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
        ).cpu()
        return sinks

    def result(self, specimen: Specimen, threshold: float, ratio: float) -> Result:
        """What was found in all of the text. specimen: names the tokens; threshold, ratio: see `attention_sinks`."""
        heads = max((len(scores) for scores in self.first.values()), default=0)
        first = torch.full((self.layers, heads), torch.nan)
        for layer, scores in self.first.items():
            first[layer, : len(scores)] = scores / self.sequences
        listed = [token for token, _ in (self.sink_ids + self.massive_ids).most_common(LISTED)]
        counts = [[self.sink_ids[token], self.massive_ids[token], self.ids[token]] for token in listed]
        cosine = self.cosine
        made = Result(
            {
                "first": Quantity(first, ("layer", "head"), "share", "attention on the first token"),
                "sinks": Quantity(self.sinks, ("layer", "position"), "tokens", "sinks: first tokens, and others"),
                "sink tokens": Quantity(
                    torch.tensor(counts).reshape(-1, 3), ("token", "count"), "", "sinks, massive, occurrences"
                ),
                "features": Quantity(self.features, ("state", "feature"), "entries", "massive activations"),
                "massive": Quantity(self.tokens, ("state", "position"), "tokens", "tokens with massive activations"),
                "strict": Quantity(self.strict, ("state",), "entries", "massive by the definition for large models"),
                "largest": Quantity(self.largest, ("state",), "", "largest magnitude"),
                "median": Quantity(self.median / self.sequences, ("state",), "", "median magnitude"),
                "started": Quantity(self.started, ("layer", "half"), "entries", "where massive activations start"),
                "cosine": Quantity(cosine[:, 0] / self.others, ("state",), "", "mean cosine with the first token"),
                "cosine squared": Quantity(cosine[:, 1] / self.others, ("state",), "", "mean of its square"),
                "cosine massive": Quantity(cosine[:, 2] / cosine[:, 3], ("state",), "", "of tokens with massive ones"),
                "correlation": Quantity(_correlation(self.moments), ("layer",), "", "of cosine and sink score"),
            },
            labels={
                "token": [repr(specimen.token(token)) for token in listed], "half": HALVES,
                "position": ("first", "others"), "count": ("sink", "massive", "occurs"),
            },
        )  # fmt: skip
        made.findings = [
            self._about_heads(first, threshold), self._about_sinks(made, threshold), *self._about_massive(ratio),
            self._about_cosine(made),
        ]  # fmt: skip
        made.caveats = [
            "A text cut into sequences starts them anywhere: the first token is then special by its place alone.",
            "In a layer with a sliding window, positions that can no longer see a token count as paying it nothing.",
            "Attention to a token says where a head looks, not what it carries from there.",
        ]
        return made

    def _about_heads(self, first: Tensor, threshold: float) -> str:
        strong = (first > threshold).nonzero().tolist()
        if not strong:
            return (
                f"Sink heads: none found. The largest mean share that a head pays to the first token is "
                f"{float(first.nan_to_num(0).max()) if first.numel() else 0:.2f}, below {threshold:g}."
            )
        layer, head = max(strong, key=lambda place: float(first[place[0], place[1]]))
        return (
            f"{len(strong)} of {int(first.isfinite().sum())} heads pay the first token more than {threshold:g} of "
            f"their attention on average; the strongest is head {head} of block {layer} with "
            f"{float(first[layer, head]):.2f}."
        )

    def _about_sinks(self, made: Result, threshold: float) -> str:
        behind = self.sinks[:, 1]
        if not behind.any():
            return f"Sink tokens behind the first position: none found in any block (score above {threshold:g})."
        layer, counted = int(behind.argmax()), zip(made.labels["token"], made["sink tokens"].tolist(), strict=True)
        words = [f"{name} ({sinks})" for name, (sinks, _, _) in counted if sinks]
        share = float(behind[layer]) / max(1, self.judged)
        text = f"Behind the first position there are sinks, most in block {layer}: {share:.2%} of its tokens."
        return text + (f" The most frequent, over all blocks: {', '.join(words[:5])}." if words else "")

    def _about_massive(self, ratio: float) -> list[str]:
        entries = self.features.sum(1)
        if not entries.any():
            most = float((self.largest.double() / (self.median / self.sequences).clamp_min(1e-30)).max())
            return [
                f"Massive activations: none found. The largest number in the stream is {most:.1f} times the median, "
                f"and {ratio:g} would be massive."
            ]
        state = int(entries.argmax())
        order = self.features[state].sort(descending=True)
        covering = int((order.values.cumsum(0) < 0.9 * entries[state]).sum()) + 1
        named = ", ".join(map(str, order.indices[: min(covering, 5)].tolist()))
        on = f"features {named}" if covering <= 5 else f"{covering} features, {named} first"
        found = [
            f"Massive activations (above {ratio:g} times the median): most stand before block {state}"
            if state < self.layers
            else f"Massive activations (above {ratio:g} times the median): most stand after the last block"
        ]
        found[0] += (
            f", {int(entries[state])} of them, the largest {float(self.largest[state]):.1f}; 90 % of them are on {on} "
            f"of {self.features.shape[1]}. {int(self.tokens[state, 0])} of {self.sequences} first tokens and "
            f"{int(self.tokens[state, 1])} of {self.others} others have one."
        )
        if self.started.any():
            layer = int(self.started.sum(1).argmax())
            half = int(self.started[layer].argmax())
            share = float(self.started[layer, half] / self.started.sum())
            place = "attention" if half == 0 else "the MLP"
            found.append(
                f"They start mostly in {place} of block {layer} ({share:.0%} of all that start in some block)."
            )
        strict = int(self.strict.sum())
        found.append(
            f"By the definition for large models (above {STRICT_SIZE} and {STRICT_RATIO} times the median) there are "
            + (f"{strict}." if strict else "none.")
        )
        return found

    def _about_cosine(self, made: Result) -> str:
        cosine, related = made["cosine"], made["correlation"]
        layer = int(cosine.nan_to_num(-2).argmax())
        text = (
            f"States are most aligned with the first token's at layer {layer} (mean cosine {float(cosine[layer]):.2f})"
        )
        if not related.isfinite().any():
            return text + "."
        strongest = int(related.nan_to_num(0).abs().argmax())
        return (
            f"{text}. Between a token's cosine and its sink score the strongest correlation is "
            f"{float(related[strongest]):+.2f}, in block {strongest}."
        )


def _looking(real: Tensor, causal: bool) -> Tensor:
    """How many queries may look at each position (B x T); padding does not look."""
    count = real.int()
    return count.flip(1).cumsum(1).flip(1) if causal else count.sum(1, keepdim=True).expand_as(count)


def _judged(real: Tensor, causal: bool, queries: int) -> Tensor:
    """Tokens that enough later positions may look at; in a text too short for that, its first half."""
    looking = _looking(real, causal)
    return real & (looking > torch.minimum(torch.full_like(looking[:, :1], queries), real.sum(1, keepdim=True) // 2))


def _correlation(moments: Tensor) -> Tensor:
    """Pearson's correlation from n, Σx, Σy, Σx², Σy², Σxy along the last axis; NaN without variation."""
    n, x, y, xx, yy, xy = moments.unbind(-1)
    spread = ((n * xx - x * x).clamp_min(0) * (n * yy - y * y).clamp_min(0)).sqrt()
    return torch.where(spread > 1e-9 * n * n, (n * xy - x * y) / spread, torch.nan)
