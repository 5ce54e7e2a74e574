"""Feature neurons: MLP neurons named by the token that their weights decode to, and what holding them does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from ....data import Specimen
from ....errors import NotApplicable, TransectError
from ....parameters import Range
from ...draw import Drawing, Table, lines
from ...neurons import kinds_of, readable, unembedding
from ...registry import probing
from ...result import Quantity, Result
from .clamping import Chosen, clamp_effects, short_text
from .decoded import Decoded, decode, random_z

SIGNS = ("+", "-")
CHANCE = 0.01  # share of them above the threshold


def draw(result: Result) -> list[Drawing]:
    """How specialised the neurons of each block are, the most specialised ones, and what was searched or held."""
    share = result["specialised"]
    series = {kind: share[number] for number, kind in enumerate(result.label("vector", len(share)))}
    note = "Share of a block's neurons whose top token stands out more than for 99 % of random vectors; chance is 1 %."
    named = list(zip(result.label("best", 0), result["best z"].tolist(), strict=True))
    drawings: list[Drawing] = [
        lines(
            "Neurons that single out a token", note, series | {"chance": [CHANCE] * share.shape[1]},
            xlabel="block", ylabel="share",
        ),
        Table(
            "The most specialised neurons", "One for each token; + and - are the two directions of the vector. z: how "
            "far the token stands out, in standard deviations over the vocabulary.", ["neuron: top tokens", "z"], named,
        ),
    ]  # fmt: skip
    if "search z" in result.quantities:
        found = list(zip(result.label("found", 0), result["search z"].tolist(), strict=True))
        note = "Where the searched word scores highest, in standard deviations over the vocabulary."
        drawings.append(Table("Neurons for the searched word", note, ["neuron", "z of the word"], found))
    if "own" in result.quantities:
        columns = torch.stack([result["own"], result["others"].nanmean(1), result["loss"], result["open"]], 1).tolist()
        rows = [[name, *row] for name, row in zip(result.label("held", 0), columns, strict=True)]
        note = (
            "Mean change of the log-probability of the neuron's own token, in nats, when it is held, and when random "
            "neurons are held that push as hard; change of the loss; share of positions where its gate is open."
        )
        drawings.append(Table("Holding a neuron", note, ["neuron: token", "it", "random", "loss", "open"], rows))
    return drawings


@probing("feature-neurons", title="What single neurons stand for", paper="arXiv:2501.02688", draw=draw)
def feature_neurons(
    specimen: Specimen,
    *,
    search: str = "",
    normalise: bool = False,
    fold: bool = True,
    top: Annotated[int, Range(1, 20)] = 3,
    best: Annotated[int, Range(1, 1000)] = 20,
    clamp: Annotated[int, Range(0, 100)] = 5,
    strength: Annotated[float, Range(0.01, 1000)] = 4.0,
    controls: Annotated[int, Range(1, 100)] = 8,
) -> Result:
    """Name MLP neurons by the token that their weights single out, and hold the best of them at a value.

    The scores of a vector w (d) are W_U w (V). The paper decodes rows of up and takes a softmax. Rows of gate, columns
    of down, both signs, z = (max - mean) / std over the vocabulary, the search and all controls are our design. Whether
    the paper applies a norm before the head is not known; with `fold` a row is multiplied by the gain of the norm that
    the MLP reads through, a column by the gains of the MLP's output norm and of the final norm. "Specialised" is above
    the 99 % quantile of 4096 Gaussian vectors on the same W_U. At which values the paper holds neurons is not known.
    Cost: 2 n d V operations for each of up, gate and down of a block; the scores are never in memory all at once.

    search: a word; which neurons score it highest, averaged over its surface forms that are one token.
    normalise: bring the rows of W_U to length 1 first, where a few tokens with long rows win everywhere.
    fold: multiply by the gains of the norms.
    top: tokens kept for each neuron.
    best: neurons that are listed.
    clamp: how many of the best up-projection neurons are held, one for each token; 0 for none. This alone needs text.
    strength: at how many times the root mean square of its up-projection a neuron is held.
    controls: random neurons of the same block for each held one, at the same size of output.
    """
    lens, kinds = specimen.lens, kinds_of(specimen.anatomy.blocks)
    if not kinds:
        raise NotApplicable("no block of this model has an MLP of neurons left: they were dropped, or are parts")
    head, forms = unembedding(lens, normalise), surface_forms(specimen, search)
    decoded = decode(specimen, head, kinds, min(top, len(head)), fold, forms)
    result = _named(specimen, decoded, random_z(head, specimen.seed), best, len(head))
    if forms:
        _search(result, decoded, search)
    if clamp:
        _hold(specimen, result, decoded, clamp, strength, controls)
    return result


CAVEATS = (
    "The head turns what the stream holds into tokens, while rows of up and gate read the stream. That both share "
    "directions is an assumption; it fits late blocks and tied embeddings better than early blocks.",
    "A neuron may stand for something that is no single token. Then this says nothing about it.",
)


def _named(specimen: Specimen, decoded: Decoded, control: Tensor, best: int, vocabulary: int) -> Result:
    """What the weights alone say. control: z of random vectors. best: how many neurons are listed."""
    kinds, axes = decoded.kinds, ("vector", "sign", "layer", "neuron")
    threshold = float(control.quantile(1 - CHANCE))
    either = decoded.z.amax(1)
    above, present = either > threshold, either.isfinite()
    listed = decoded.ranked(best, kinds, (0, 1))
    distinct = torch.tensor([len(decoded.tokens[kind, ..., 0].unique()) for kind in range(len(kinds))])
    z = torch.tensor([float(decoded.z[place]) for place in listed])
    result = Result(
        {
            "z": Quantity(decoded.z, axes, "std", "how far the top token stands out"),
            "tokens": Quantity(decoded.tokens, (*axes, "place"), "", "ids of the top tokens, -1 for none"),
            "specialised": Quantity(
                above.sum(-1) / present.sum(-1).clamp_min(1), ("vector", "layer"), "share",
                "neurons above 99 % of random vectors",
            ),
            "control": Quantity(control, ("random",), "std", "z of random vectors, the larger of both signs"),
            "distinct": Quantity(distinct, ("vector",), "tokens", "different top tokens"),
            "best z": Quantity(z, ("best",), "std", "z of the listed neurons"),
        },
        caveats=CAVEATS,
        labels={"vector": kinds, "sign": SIGNS, "best": [named(specimen, decoded, place) for place in listed]},
    )  # fmt: skip
    shares = [float(above[kind].sum() / present[kind].sum()) for kind in range(len(kinds))]
    result.findings = _findings(result, shares, threshold, vocabulary)
    return result


def surface_forms(specimen: Specimen, search: str) -> list[int]:
    """Ids of the forms of a word that are one token: as given, lower case, capitalised, with a space before or not."""
    word = search.strip()
    if not word:
        return []
    if specimen.tokenizer is None:
        raise NotApplicable("searching for a word needs the model's tokenizer: pass tokenizer=AutoTokenizer...")
    written = [space + form for form in (word, word.lower(), word.capitalize()) for space in ("", " ")]
    cut = [specimen.tokenizer(form, add_special_tokens=False)["input_ids"] for form in written]
    unknown = getattr(specimen.tokenizer, "unk_token_id", None)
    forms = sorted({ids[0] for ids in cut if len(ids) == 1 and ids[0] != unknown})
    if not forms:
        raise TransectError(f"feature-neurons: search={search!r} is not a single token of this tokenizer in any form")
    return forms


def named(specimen: Specimen, decoded: Decoded, place: tuple[int, int, int, int]) -> str:
    """E.g. "3:17 up +: 'dog', 'dogs'": block 3, neuron 17, as neuron-clamp takes it."""
    kind, sign, layer, neuron = place
    return f"{layer}:{neuron} {decoded.kinds[kind]} {SIGNS[sign]}: {readable(specimen, decoded.tokens[place].tolist())}"


def _findings(result: Result, shares: Sequence[float], threshold: float, vocabulary: int) -> list[str]:
    kinds = result.labels["vector"]
    listed = ", ".join(f"{share:.1%} of the {kind} vectors" for kind, share in zip(kinds, shares, strict=True))
    found = [
        f"A random vector singles out its top token by z = {float(result['control'].median()):.1f} (median) and in 1 "
        f"of 100 cases by more than {threshold:.1f}. Above that are {listed}; by chance it would be 1 %."
    ]
    if max(shares) <= 2 * CHANCE:
        found.append("There are no specialised neurons here: no kind of vector is above twice the chance level.")
    else:
        found.append(f"The neurons that stand out most are {'; '.join(result.labels['best'][:3])}.")
        counts = ", ".join(f"{int(n)} for {kind}" for kind, n in zip(kinds, result["distinct"], strict=True))
        found.append(f"Of {vocabulary} tokens, these many are the top token of some vector: {counts}.")
    return found


def _search(result: Result, decoded: Decoded, search: str, count: int = 10) -> None:
    """The neurons that score the searched word highest, with either sign."""
    size = decoded.searched.nan_to_num(0).abs().flatten()
    places = [torch.unravel_index(place, decoded.searched.shape) for place in size.topk(min(count, len(size))).indices]
    values = torch.stack([decoded.searched[place] for place in places])
    names = [f"{int(layer)}:{int(neuron)} {decoded.kinds[int(kind)]}" for kind, layer, neuron in places]
    result.quantities["search z"] = Quantity(values, ("found",), "std", f"score of {search!r}, sign included")
    result.labels = {**result.labels, "found": names}
    result.findings = [*result.findings, f"{search!r} scores highest at {names[0]} (z = {float(values[0]):.1f})."]


def _hold(specimen: Specimen, result: Result, decoded: Decoded, count: int, strength: float, controls: int) -> None:
    """Hold the most specialised up-projection neurons, where there is text."""
    try:
        ids = short_text(specimen)
    except NotApplicable as reason:
        result.caveats = [*result.caveats, f"No neuron was held at a value: {reason}."]
        return
    signs = (0, 1) if "gate" in decoded.kinds else (0,)  # an ungated neuron is silent below zero
    places = decoded.ranked(count, ("up",), signs)
    if not places:
        return
    chosen = [Chosen(place[2], place[3], 1 - 2 * place[1], int(decoded.tokens[place][0])) for place in places]
    effects = clamp_effects(specimen, chosen, ids, strength, controls)
    result.quantities |= {
        "own": Quantity(effects.own, ("held",), "nats", "change of the own token's log-probability"),
        "others": Quantity(
            effects.others, ("held", "control"), "nats", "the same when a random neuron is held instead"
        ),
        "loss": Quantity(effects.loss, ("held",), "nats", "change of the loss"),
        "value": Quantity(effects.values, ("held",), "", "at which the up-projection was held"),
        "open": Quantity(effects.open, ("held",), "share", "positions where the factor of the gate exceeds 0.01"),
    }
    names = [f"{one.layer}:{one.neuron}={value:.3g}: {readable(specimen, [one.token])}"
             for one, value in zip(chosen, effects.values.tolist(), strict=True)]  # fmt: skip
    result.labels = {**result.labels, "held": names}
    above = int((effects.own > effects.others.nan_to_num(-torch.inf).amax(1)).sum())
    result.findings = [
        *result.findings,
        f"Held at {strength:g} times their usual size, the {len(chosen)} most specialised up-projection neurons "
        f"changed the log-probability of their own token by {float(effects.own.mean()):+.2f} nats on average, random "
        f"neurons with as large an output by {float(effects.others.nanmean()):+.2f}; {above} of {len(chosen)} moved "
        f"it up more than each of their {controls} controls. The loss changed by "
        f"{float(effects.loss.mean()):+.3f} nats.",
    ]
