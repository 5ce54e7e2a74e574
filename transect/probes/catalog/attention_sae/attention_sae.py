"""Sparse features of attention outputs, with head and source-token attribution (Kissane et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from ....data import Batches, Specimen
from ....data.split import split
from ....dictionaries import Dictionary, Principal, Settings, pinned, recovered, spliced_losses
from ....errors import BadData, NotApplicable
from ....parameters import Range
from ...draw import Drawing, Table, bars, heatmap, lines
from ...neurons import unembedding, wide
from ...registry import probing
from ...result import Quantity, Result
from .attribution import head_shares
from .contexts import KINDS, Contexts, Example, contexts_of, examples_of, kinds_of
from .dictionaries import Found, chosen_layers, obtained, present
from .sentences import CAVEATS, findings, told

READINGS = ("as it is", "zeros", "dictionary", "principal directions")
TOP = 10  # features of each head whose sources are looked at
REMOVED = 8  # held-out sequences on which the shown features are taken out, one by one
REMAINDER = 1e-2  # of what heads contribute, that sources may leave unexplained
BINS = 25  # of the histogram of frequencies, from 10^-5 to 1


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    layers = result.label("layer", len(result["l0"]))
    drawn: list[Drawing] = []
    rows = [
        [layer, f"{result['l0'][i]:.1f} of {int(result['features'])}", *(f"{one:.4f}" for one in result["loss"][i]),
         f"{result['recovered'][i, 0]:.1%}", f"{result['recovered'][i, 1]:.1%}", f"{result['explained'][i]:.1%}",
         f"{result['dead'][i]:.1%}"] for i, layer in enumerate(layers)
    ]  # fmt: skip
    drawn.append(
        Table(
            "How well the features stand for the attention outputs",
            "Held-out loss in nats with one layer's heads' outputs as they are, zero, made of the features, or of as "
            "many principal directions as features are active. Recovered: how much of the way from zeros to as it is.",
            ["layer", "active", *READINGS, "recovered", "by directions", "variance explained", "never active"], rows,
        )
    )  # fmt: skip
    edges = torch.linspace(-5, 0, BINS + 1)
    counts = {}
    for layer, row in zip(layers, result["frequency"], strict=True):
        alive = row[row > 0].log10().clamp(-5, 0).float()
        counts[f"layer {layer}"] = torch.histc(alive, BINS, -5, 0) / len(row)
    drawn.append(
        lines(
            "How often features are active", "Share of the features by the share of tokens for which they are. Those "
            "that are never are left out.", counts, x=[round(10 ** float(e), 6) for e in (edges[1:] + edges[:-1]) / 2],
            xlabel="share of tokens", ylabel="share of features",
        )
    )  # fmt: skip
    drawn[-1].figure.update_xaxes(type="log")  # type: ignore[union-attr]
    if "kinds" in result.quantities:
        drawn.append(
            heatmap(
                "What the heads' features are read from",
                f"The {TOP} features with the largest share of their direction in a head, by the token that "
                "contributes most where they are strongest. A head with several kinds does several things.",
                result["kinds"].flatten(0, 1), x=list(KINDS), unit="features",
                y=[f"{layer}.{head}" for layer in layers for head in range(result["kinds"].shape[1])],
                xlabel="source", ylabel="layer.head",
            )
        )  # fmt: skip
    drawn.append(
        bars(
            "Features of one head, and of several", "Share of the features by how much of the direction lies in the "
            "head that has most of it.",
            {f"layer {layer}": torch.histc(row[row.isfinite()], 10, 0, 1) / row.isfinite().sum()
             for layer, row in zip(layers, result["head_share"].amax(2), strict=True)},
            x=[f"{10 * place} to {10 * place + 10} %" for place in range(10)], xlabel="in one head",
            ylabel="share of features",
        )
    )  # fmt: skip
    return [*drawn, *_tables(result, layers)]


def _tables(result: Result, layers: Sequence[str]) -> list[Drawing]:
    """The strongest features, and where they are strongest."""
    rows, shown = [], result["shown"]
    for i, layer in enumerate(layers):
        for rank, feature in enumerate(shown[i].tolist()):
            if feature < 0:
                continue
            share = result["head_share"][i, feature]
            heads = ", ".join(f"{h}: {share[h]:.0%}" for h in share.sort(descending=True).indices[:3].tolist())
            rows.append([
                f"{layer}.{feature}", f"{result['frequency'][i, feature]:.2%}", heads, result.labels["source"][i *
                shown.shape[1] + rank], f"{result['effect'][i, rank]:+.4f}",
                result.labels["promoted"][i * shown.shape[1] + rank],
            ])  # fmt: skip
    drawn: list[Drawing] = [
        Table(
            "The strongest features",
            "Those that hold most of the squared length of what is reconstructed. Effect: what the loss gains, in nats "
            "a token, when the feature is taken out and all else stays.",
            ["layer.feature", "active for", "heads, by weights", "mostly read from", "effect", "promotes"], rows,
        )
    ]  # fmt: skip
    if len(result["example"]):
        rows = [
            [name, f"{value:.2f}", f"{int(head)}: {part:.0%}", int(back), text]
            for name, text, (_, _, value, head, part, back) in zip(
                result.labels["example of"], result.labels["example"], result["example"].tolist(), strict=True
            )
        ]
        drawn.append(
            Table(
                "Where they are strongest",
                "In the held-out text: «the token» where the feature is active, and ‹the token› from which most of it "
                "was read. Head: the one that contributes most there, and its share of what all contribute.",
                ["layer.feature", "activation", "head", "tokens back", "text"], rows,
            )
        )  # fmt: skip
    return drawn


@probing(
    "attention-sae", title="Sparse features of attention outputs", paper="arXiv:2406.17759", draw=draw, trains=True
)
def attention_sae(
    specimen: Specimen,
    *,
    layers: str = "middle",
    dictionary: str = "",
    expansion: Annotated[int, Range(1, 1024)] = 8,
    l1: Annotated[float, Range(0)] = 2.0,
    normalise: bool = True,
    tokens: Annotated[int, Range(1)] = 200_000,
    batch: Annotated[int, Range(1)] = 256,
    buffer: Annotated[int, Range(1)] = 65_536,
    lr: Annotated[float, Range(0, above=True)] = 1.2e-3,
    warm_up: Annotated[float, Range(0, 1)] = 0.0,
    bias: Literal["median", "zero"] = "median",
    resamplings: Annotated[int, Range(0, 100)] = 4,
    first: bool = False,
    held_out: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2,
    shown: Annotated[int, Range(1, 1000)] = 12,
    foreign: bool = False,
) -> Result:
    """Sparse features of a layer's attention outputs, the heads that make them, and the tokens they come from.

    Kissane et al. 2024. A dictionary is trained on what the heads of a layer put out, side by side in front of the
    output projection (D = heads x head size), on the text but for its last share, which is what all is measured on.
    With a folder in `dictionary` it is kept there in SAELens' layout, and read the next time; SAELens' own are read.
    A feature's heads: by the length of their parts of its direction. Its source: attention as it is, the token that
    contributes most to what the feature reads, over all heads (direct feature attribution), at the three sequences
    where it is strongest. How many kinds of source a head's features have is our measure of what the paper judges by
    eye. Time is the training's: about 12 D² expansion tokens operations a layer. See `transect.dictionaries.Settings`
    for what the paper chose.

    layers: "middle", "all", or the numbers of some, such as 0,3.
    dictionary: folder of dictionaries, a folder a layer, or one dictionary; what is missing is trained and written.
    expansion: features for each number that the heads put out.
    l1: weight of the sum of activations against the squared error; more of it, fewer active features.
    normalise: train on outputs scaled to a mean length of √D, so that l1 means the same in every layer.
    tokens: how many to train on; a text that has fewer is gone through again.
    batch: tokens a step.
    buffer: tokens whose outputs are in memory at once, and mixed.
    lr: learning rate.
    warm_up: share of the steps over which l1 rises from 0.
    bias: where the bias of the reconstruction starts: at the outputs' geometric median, or at zero.
    resamplings: how often features that are never active are given a new direction.
    first: train on and replace first tokens of sequences too, whose outputs are outliers.
    held_out: share of the sequences, the last ones, that only measure.
    shown: how many features to show of a layer.
    foreign: look through a dictionary that was trained on another model, such as this one before compression.
    """
    specimen.require_causal()
    chosen = chosen_layers(specimen, layers)
    read = present(specimen, dictionary, chosen, foreign)
    settings = Settings(
        expansion, l1, normalise, tokens, batch, buffer, lr, warm_up, bias, resamplings, first, specimen.seed
    ).checked()
    try:
        training, judged = split(specimen.text, held_out, 8, specimen.seed)
        found = [
            obtained(specimen, training, layer, dictionary, settings, read.get(layer))
            for layer in specimen.shown(chosen, "dictionaries")
        ]
        looked = [_look(specimen, one, judged, first, shown) for one in found]
    except BadData as error:
        raise NotApplicable(str(error)) from None
    return _result(specimen, found, looked, shown, bool(dictionary))


@dataclass
class Looked:
    """What one layer's dictionary makes of the held-out text."""

    contexts: Contexts
    losses: dict[str, float]
    shares: Tensor
    features: list[int]  # the strongest
    tops: Tensor  # H x TOP, features by their share in a head; -1 where fewer are alive
    examples: list[Example]
    effects: list[float]
    promoted: list[str]

    @property
    def exact(self) -> bool:
        """Whether what sources contribute adds up to what heads do."""
        size = max((float(example.heads.abs().max()) for example in self.examples), default=0.0)
        return max((example.remainder for example in self.examples), default=0.0) <= REMAINDER * size


def _look(specimen: Specimen, found: Found, judged: Batches, first: bool, shown: int) -> Looked:
    anatomy, layer, dictionary = specimen.anatomy, found.layer, found.dictionary
    contexts = contexts_of(anatomy, layer, dictionary, judged, first)
    if not contexts.tokens:
        raise BadData("the held-out text has no token to measure on: give longer sequences")
    principal = Principal(dictionary.width)
    found.vectors[0]  # its buffer is in memory now
    principal.add(found.vectors.held(found.vectors.buffer))
    directions = max(1, round(contexts.active / contexts.tokens))
    replacements = {
        "as it is": lambda x: x, "zeros": torch.zeros_like,
        "dictionary": lambda x: dictionary(x.to(dictionary.decoder)),
        "principal directions": principal.replacement(directions),
    }  # fmt: skip
    losses = spliced_losses(anatomy, judged, "heads", layer, replacements, first)
    attention = anatomy.blocks[layer].attention
    assert attention is not None  # `chosen_layers` saw it
    shares = head_shares(dictionary, attention.heads).cpu()
    alive = contexts.fired > 0
    order = contexts.squares.sort(descending=True).indices
    features = order[alive[order]][:shown].tolist()
    ranked = shares.masked_fill(~alive[:, None], -1).topk(min(TOP, len(shares)), dim=0)
    tops = ranked.indices.masked_fill(ranked.values < 0, -1).T
    wanted = [*features, *tops[tops >= 0].tolist()]
    examples = examples_of(anatomy, layer, contexts, wanted, judged)
    few = judged.take(REMOVED)
    without = {str(feature): pinned(dictionary, [feature], [0.0]) for feature in features}
    removed = spliced_losses(anatomy, few, "heads", layer, {"": lambda x: x, **without}, first)
    effects = [removed[str(feature)] - removed[""] for feature in features]
    return Looked(contexts, losses, shares, features, tops, examples, effects, _promoted(specimen, layer, dictionary,
                  features))  # fmt: skip


def _promoted(specimen: Specimen, layer: int, dictionary: Dictionary, features: Sequence[int]) -> list[str]:
    """Of each feature, the tokens that its direction raises most by itself; "" where there is no logit lens for it."""
    try:
        specimen.require_contributions()
        lens = specimen.lens
    except NotApplicable:
        return [""] * len(features)
    block = specimen.anatomy.blocks[layer]
    if "attention_output" in block.norms or not features:
        return [""] * len(features)
    written = wide(block.matrix("o").weight).detach() @ wide(dictionary.decoder[:, list(features)])
    if lens.centres:
        written = written - written.mean(0, keepdim=True)
    scores = unembedding(lens) @ (wide(lens.gain).detach()[:, None] * written)
    return [", ".join(repr(specimen.token(token)) for token in column.topk(3).indices.tolist()) for column in scores.T]


def _result(specimen: Specimen, found: Sequence[Found], looked: Sequence[Looked], shown: int, kept: bool) -> Result:
    """The arrays of all layers; dictionaries of several sizes are filled up with NaN."""
    features = max(one.dictionary.features for one in found)
    heads = max(one.shares.shape[1] for one in looked)
    names = [str(one.layer) for one in found]
    frequency = torch.full((len(found), features), torch.nan)
    shares = torch.full((len(found), features, heads), torch.nan)
    listed = torch.full((len(found), shown), -1)
    effects = torch.full((len(found), shown), torch.nan)
    tops = torch.full((len(found), heads, TOP), -1)
    kinds = torch.zeros(len(found), heads, len(KINDS))
    sources, promoted = ([""] * (len(found) * shown) for _ in range(2))
    rows, texts, of = [], [], []
    for i, one in enumerate(looked):
        frequency[i, : len(one.shares)] = one.contexts.fired / one.contexts.tokens
        shares[i, : len(one.shares), : one.shares.shape[1]] = one.shares
        listed[i, : len(one.features)] = torch.tensor(one.features, dtype=torch.long)
        effects[i, : len(one.effects)] = torch.tensor(one.effects)
        tops[i, : one.tops.shape[0], : one.tops.shape[1]] = one.tops
        kind = kinds_of(one.examples)
        for head, ranked in enumerate(one.tops.tolist()):
            for feature in ranked:
                if feature in kind:
                    kinds[i, head, kind[feature]] += 1
        for rank, feature in enumerate(one.features):
            sources[i * shown + rank] = KINDS[kind[feature]] if feature in kind and one.exact else "-"
            promoted[i * shown + rank] = one.promoted[rank] or "-"
        for example in one.examples:
            if example.feature not in one.features:
                continue
            head = int(example.heads.argmax())
            part = float(example.heads[head] / example.heads.sum())
            back = example.position - example.source if one.exact else torch.nan
            rows.append([i, example.feature, example.value, head, part, back])
            texts.append(told(specimen, example, one.exact))
            of.append(f"{names[i]}.{example.feature}")
    loss = torch.tensor([[one.losses[name] for name in READINGS] for one in looked], dtype=torch.float64)
    back = [[recovered(row[0], value, row[1]) for value in row[2:]] for row in loss.tolist()]
    quantities = {
        "features": Quantity(torch.tensor(features), (), "features", "of a dictionary, the largest"),
        "loss": Quantity(loss, ("layer", "reading"), "nats", "held-out loss with the layer's heads' outputs replaced"),
        "recovered": Quantity(torch.tensor(back), ("layer", "by"), "share", "of the loss that zeros cost"),
        "l0": Quantity(torch.tensor([one.contexts.active / one.contexts.tokens for one in looked]), ("layer",),
                       "features", "active for a token, mean over held-out tokens"),
        "dead": Quantity(torch.tensor([float((one.contexts.fired == 0).double().mean()) for one in looked]),
                         ("layer",), "share", "features that are never active on the held-out text"),
        "explained": Quantity(torch.tensor([one.contexts.explained for one in looked]), ("layer",), "share",
                              "of the heads' outputs' variance"),
        "frequency": Quantity(frequency, ("layer", "feature"), "share", "held-out tokens for which it is active"),
        "head_share": Quantity(shares, ("layer", "feature", "head"), "share", "of the length of its direction"),
        "shown": Quantity(listed, ("layer", "rank"), "", "the strongest features; -1: fewer are alive"),
        "effect": Quantity(effects, ("layer", "rank"), "nats", "what the loss gains without it"),
        "top": Quantity(tops, ("layer", "head", "rank"), "", "features with the largest share in a head"),
        "tokens": Quantity(torch.tensor([one.contexts.tokens for one in looked]), ("layer",), "tokens", "measured on"),
        "rounds": Quantity(torch.tensor([one.rounds for one in found]), ("layer",), "",
                           "times that the training went through its text; 0 for a dictionary that was read"),
        "example": Quantity(torch.tensor(rows, dtype=torch.float64).reshape(-1, 6), ("example", "field"), "",
                            "layer's place, feature, activation, head, its share, tokens back to the source"),
    }  # fmt: skip
    if all(one.exact for one in looked):
        quantities["kinds"] = Quantity(
            kinds, ("layer", "head", "kind"), "features", "of those in `top`, by what they are mostly read from"
        )
    labels = {
        "layer": names, "reading": READINGS, "by": READINGS[2:], "kind": KINDS, "source": sources,
        "promoted": promoted, "example": texts, "example of": of,
        "field": ("layer", "feature", "activation", "head", "share", "back"),
    }  # fmt: skip
    made = Result(quantities, caveats=CAVEATS, labels=labels)
    made.findings = findings(made, [one.trained_on for one in found], kept)
    return made
