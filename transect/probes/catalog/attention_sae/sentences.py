"""What the numbers of a layer's sparse features say, in sentences; and the text where one is strongest."""

from __future__ import annotations

from collections.abc import Sequence

from ....data import Specimen
from ...result import Result
from .contexts import KINDS, Example

BEFORE, AROUND = 8, 2  # tokens that are shown before a place, and around a source that is farther away
LITTLE = 0.5  # of the variance, below which a dictionary is not ready to be read
OFTEN = 4  # rounds over the text from which on a dictionary may have learned it by heart

CAVEATS = (
    "A feature is a direction that this training found. Another seed, size or text finds others, and a small "
    "dictionary mixes what a large one keeps apart.",
    "Loss recovered is measured from zeros, which cost little in a layer that matters little. Read it beside the "
    "losses.",
    "The sum of activations that is held down makes them too small: what is recovered is a lower bound for these "
    "directions.",
    "A source says which token's value was carried, with attention as it is. Why the head looked there is not said.",
    "The first token of a sequence is left as it is and not counted, unless first is chosen: outputs there are "
    "outliers.",
    "What a feature promotes is its direct way to the unembedding alone, past all later layers.",
)


def told(specimen: Specimen, example: Example, exact: bool) -> str:
    """The text around a place: «the token» itself, and ‹its source›, which may be the same."""
    position, source = example.position, example.source if exact else example.position
    start = max(example.start, position - BEFORE)
    if source >= start - 1:
        return _words(specimen, example, min(start, source), position, source)
    far = _words(specimen, example, max(example.start, source - AROUND), min(source + AROUND, start - 1), source)
    return f"{far} ... {_words(specimen, example, start, position, source)}"


def _words(specimen: Specimen, example: Example, start: int, stop: int, source: int) -> str:
    """Tokens start to stop, both included, with the marks. Each is what it adds to the text before it: some tokenizers
    write a token's space only there."""
    words, before = [], ""
    for place in range(start, stop + 1):
        ids = example.ids[start : place + 1].tolist()
        text = " ".join(map(str, ids)) if specimen.tokenizer is None else specimen.decode(ids)
        word, before = text[len(before) :], text
        space, word = word[: len(word) - len(word.lstrip(" "))], word.lstrip(" ").replace("\n", "⏎")
        word = f"‹{word}›" if place == source and place != example.position else word
        words.append(space + (f"«{word}»" if place == example.position else word))
    return "".join(words)


def findings(result: Result, trained_on: Sequence[str], kept: bool) -> list[str]:
    """What the numbers say."""
    said = []
    for i, layer in enumerate(result.labels["layer"]):
        clean, zeros, made, directions = result["loss"][i].tolist()
        by_features, by_directions = result["recovered"][i].tolist()
        l0 = float(result["l0"][i])
        said.append(
            f"Layer {layer}: {l0:.1f} of {int(result['frequency'][i].isfinite().sum())} features are active for a "
            f"token. Made of them, the heads' outputs bring the held-out loss from {zeros:.4f} nats (zeros) to "
            f"{made:.4f}; as they are it is {clean:.4f}. So {by_features:.1%} of the loss is recovered, and "
            f"{by_directions:.1%} ({directions:.4f}) by the {max(1, round(l0))} strongest principal directions. "
            f"{float(result['dead'][i]):.1%} of the features were never active in {int(result['tokens'][i])} tokens."
        )
        if float(result["explained"][i]) < LITTLE:
            said.append(
                f"The features of layer {layer} explain only {float(result['explained'][i]):.0%} of the outputs' "
                "variance: before anything is read from them, train on more tokens (tokens), or with a smaller l1."
            )
        if trained_on[i]:
            said.append(f"The dictionary of layer {layer} was read; it says that it is of {trained_on[i]}.")
        elif float(result["rounds"][i]) > OFTEN:
            said.append(
                f"The training of layer {layer} went through its text {float(result['rounds'][i]):.0f} times: with "
                "more text (--data, --sequences) its features would hold for more than this one."
            )
        if result["shown"][i, 0] >= 0:
            said.append(_strongest(result, i, layer))
        if "kinds" in result.quantities:
            said.append(_heads(result, i, layer))
    if not kept:
        said.append("The dictionary was not kept: name a folder for it (--attention-sae.dictionary).")
    if "kinds" not in result.quantities:
        said.append(
            "Sources are not told: attention weights times values do not add up to what this model's heads put out."
        )
    return said


def _strongest(result: Result, i: int, layer: str) -> str:
    """The one with the largest effect."""
    effects = result["effect"][i].nan_to_num(-1e9)
    rank = int(effects.argmax())
    feature, shown = int(result["shown"][i, rank]), result["shown"].shape[1]
    share = result["head_share"][i, feature].nan_to_num(0)
    source = result.labels["source"][i * shown + rank]
    told = f", mostly read from {source}" if source != "-" else ""
    return (
        f"Of those shown, feature {feature} of layer {layer} matters most: without it the loss is "
        f"{float(effects[rank]):+.4f} nats. It is active for {float(result['frequency'][i, feature]):.1%} of the "
        f"tokens, {float(share.max()):.0%} of it lie in head {int(share.argmax())}{told}."
    )


def _heads(result: Result, i: int, layer: str) -> str:
    """How many kinds of source the features of a head have."""
    kinds = result["kinds"][i]
    several = int(((kinds > 0).sum(1) >= 2).sum())
    judged = int((kinds.sum(1) > 0).sum())
    most = KINDS[int(kinds.sum(0).argmax())]
    return (
        f"In {several} of {judged} heads of layer {layer} the features that lie most in the head are read from at "
        f"least two kinds of tokens; the most frequent kind is {most}."
    )
