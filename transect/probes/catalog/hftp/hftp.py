"""Neurons whose activation has the rhythm of sentences or phrases, in text where both have a fixed one."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ....data import Specimen
from ....errors import NotApplicable, TransectError
from ....parameters import Range
from ...draw import Drawing, Table, bars, heatmap, lines
from ...registry import probing
from ...result import Quantity, Result
from .rhythm import UNITS_A_SECOND, Control, Stimuli, fitted, own_sentences, sentences_of
from .tagging import GROUPS, KINDS, LEVEL, THRESHOLD, Tagging, record, tag

SHOWN = 8  # neurons of each kind in the table
BROKEN = {
    "words": "words permuted in each sentence",
    "classes": "words permuted alike in all sentences",
    "phrases": "phrases in random order",
}


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    layers, counts, neurons = result.label("layer", len(result["count"])), result["count"], result["neurons"]
    power, frequencies = result["power"].mean(1), result["frequency"]
    hertz = [round(float(one), 4) for one in frequencies]
    shares = {name: counts[:, number] / neurons for number, name in enumerate(result.labels["kind"])}
    rates = dict(zip(result.labels["rate"], result["rate"].tolist(), strict=True))
    near = [min(range(len(hertz)), key=lambda place: abs(hertz[place] - rate)) for rate in rates.values()]
    by_layer = result["power"][0][:, near] - result["power"][1][:, near]
    drawn: list[Drawing] = [
        lines(
            "Spectrum of the neurons",
            "Share of a neuron's power at each frequency, mean over neurons and layers. Units come at 4 Hz; sentences "
            f"at {rates['sentence']:.4g} Hz. What the control lacks is due to the order of the words.",
            dict(zip(result.labels["condition"], power[:, 1:], strict=True)), x=hertz[1:], xlabel="frequency, Hz",
            ylabel="share of the power", log=True,
        ),
        bars(
            "Tagged neurons by layer",
            f"Share of a layer's neurons whose contrast stands out (z > {THRESHOLD:g}) among all layers' and whose "
            "amplitude passes the permutation test.",
            shares, x=layers, xlabel="layer", ylabel="share of neurons",
        ),
        heatmap(
            "What the rhythm takes of the power, by layer",
            "Share of the power at each rate, mean over a layer's neurons, less that in the control.",
            by_layer.T, x=layers, y=list(rates), xlabel="layer", ylabel="rate", diverging=True,
        ),
    ]  # fmt: skip
    drawn.append(_table(result))
    return drawn


def _table(result: Result) -> Table:
    """The neurons that stand out most, of each kind."""
    kinds, z, layers = result["kind"], result["z"], result.label("layer", len(result["kind"]))
    rows = []
    for number, name in enumerate(result.labels["kind"], 1):
        score = (z[0], z[1], z.amin(0))[number - 1].masked_fill(kinds != number, -torch.inf)
        for place in score.flatten().topk(min(SHOWN, score.numel())).indices.tolist():
            row, neuron = divmod(place, score.shape[1])
            if score[row, neuron] == -torch.inf:
                break
            both = result["corrected"][row, neuron] == number
            peaks, p = result["peak"][:2, row, neuron], result["p"][:, row, neuron]
            rows.append(
                [name, layers[row], neuron, *(f"{one:.1f}" for one in (*z[:, row, neuron], *peaks)),
                 *(f"{one:.2g}" for one in p), "yes" if both else "no"]
            )  # fmt: skip
    return Table(
        "Neurons that stand out most",
        f"z of the contrast at either rate; amplitude over that of neighbouring frequencies, at the rate of sentences "
        f"and of the first kind of phrase; p value of both tests; whether the neuron is of the same kind at a rate of "
        f"false discoveries of {LEVEL:.0%} over all neurons.",
        ["kind", "layer", "neuron", "z sentence", "z phrase", "peak sentence", "peak phrase", "p sentence", "p phrase",
         "corrected"],
        rows,
    )  # fmt: skip


@probing("hftp", title="Rhythm of sentences and phrases", paper="NeurIPS 2025, An et al. (HFTP)", draw=draw)
def hftp(
    specimen: Specimen,
    *,
    sentences: str = "",
    count: Annotated[int, Range(4, 1000)] = 50,
    skip: Annotated[int, Range(0, 100)] = 1,
    shuffles: Annotated[int, Range(10, 10000)] = 100,
    permutations: Annotated[int, Range(100, 100000)] = 1000,
    control: Control = "words",
) -> Result:
    """Find the MLP neurons that follow the rhythm of sentences or of phrases in text of isochronous words.

    An et al. 2025, hierarchical frequency tagging. Sentences of four one-token words, a subject phrase and a
    predicate phrase of two each, follow one another without punctuation or special tokens. A word is a sample of a
    neuron's signal x (T), its activation being what the down matrix reads; at 4 words a second sentences have 1 Hz
    and phrases 2 Hz. In the experiment the order of the sentences is random. The paper's control permutes the words
    in every sentence so that none is followed by its own successor. Shuffles are averaged in ten groups.

    Step 1: amplitude |rfft(x)| of the mean over groups, against permutations of x in time; passed above the 95th
    percentile. Step 2: mean amplitude of the groups in the experiment less that in the control, 0 where it is
    negative or step 1 was not passed; z over all layers and neurons, zeros included; tagged where z > 2. Sentences of
    more units have phrases of 2 to one less than the sentence: one that passes is enough, the largest contrast counts.

    Ours: sentences are made of our own lists; each word is cut into tokens by itself, with the mean over the tokens of
    one that has several; the first sentences do not count, because a model's first tokens are outliers; a verdict that
    is corrected for many tests, with the larger of the two p values (permutations, and Welch's t test over the groups)
    at 5 % false discoveries (Benjamini and Hochberg), Bonferroni over several phrase rates; the count with experiment
    and control exchanged; amplitude over that of neighbouring frequencies; two other controls. The comparison
    with recordings of a brain by dissimilarity matrices is left out.

    sentences: a .txt file of own sentences, one a line, all of as many words (4 to 16), or characters where nothing
        has a space. Empty: ours, in English.
    count: sentences that are read, fewer where the model's context ends.
    skip: sentences at the beginning that do not count.
    shuffles: random orders of each condition, in ten groups.
    permutations: of each neuron's signal in step 1.
    control: words, the paper's; classes keeps the rhythm of kinds of words, but not the grammar; phrases keeps phrases
        of two words and leaves no rhythm of sentences.
    """
    if shuffles % GROUPS:
        raise TransectError(f"shuffles are averaged in {GROUPS} groups, so {shuffles} cannot be divided among them")
    seed = specimen.seed
    made = sentences_of(specimen, sentences)[: count + skip] if sentences else own_sentences(
        specimen, count + skip, seed
    )  # fmt: skip
    stimuli = fitted(specimen, made, skip)
    if control == "phrases" and stimuli.size % 2:
        raise NotApplicable(f"sentences of {stimuli.size} units are not made of phrases of two, as its control needs")
    experiment = record(specimen, stimuli, "experiment", shuffles, seed)
    other = record(specimen, stimuli, control, shuffles, seed + 1)
    found = tag(experiment, other, stimuli.bins, permutations, seed)
    swapped = tag(other, experiment, stimuli.bins, permutations, seed).counts()
    labels = {
        "layer": [str(layer) for layer in experiment.layers], "kind": list(KINDS), "level": ["sentence", "phrase"],
        "rate": list(stimuli.rates), "condition": ["experiment", f"control: {BROKEN[control]}"],
    }  # fmt: skip
    quantities = measured(found, swapped, torch.stack([experiment.power, other.power]), stimuli)
    return Result(quantities, findings(found, swapped, quantities, stimuli, labels), caveats(stimuli, found), labels)


def measured(found: Tagging, swapped: Tensor, power: Tensor, stimuli: Stimuli) -> dict[str, Quantity]:
    """What was found, as arrays."""
    cells, real = ("level", "layer", "neuron"), found.kinds >= 0
    frequency = torch.arange(power.shape[-1]) * UNITS_A_SECOND / stimuli.samples
    passed = found.passed.nansum(-1) / real.sum(1)
    return {
        "count": Quantity(found.counts(), ("layer", "kind"), "neurons", "tagged neurons"),
        "corrected count": Quantity(
            found.counts(corrected=True), ("layer", "kind"), "neurons", "tagged, corrected for many tests"
        ),
        "swapped count": Quantity(
            swapped, ("layer", "kind"), "neurons", "tagged with experiment and control exchanged"
        ),
        "neurons": Quantity(real.sum(1), ("layer",), "neurons", "neurons of a layer"),
        "passed": Quantity(passed, ("level", "layer"), "share", "neurons that pass the permutation test"),
        "contrast": Quantity(found.values, cells, "activation", "amplitude in the experiment less that in the control"),
        "z": Quantity(found.z, cells, "", "contrast in deviations from the mean over all layers and neurons"),
        "p": Quantity(found.p, cells, "probability", "larger p value of permutations and contrast"),
        "kind": Quantity(found.kinds, ("layer", "neuron"), "", "1 sentence, 2 phrase, 3 both, 0 none, -1 no neuron"),
        "corrected": Quantity(found.corrected, ("layer", "neuron"), "", "the same, corrected for many tests"),
        "peak": Quantity(found.peaks, ("rate", "layer", "neuron"), "", "amplitude over that of neighbours"),
        "power": Quantity(power, ("condition", "layer", "frequency"), "share", "of the power, mean over neurons"),
        "frequency": Quantity(frequency, ("frequency",), "Hz", "at 4 units a second"),
        "rate": Quantity(torch.tensor(list(stimuli.rates.values())), ("rate",), "Hz", "of sentences and phrases"),
    }  # fmt: skip


def findings(
    found: Tagging, swapped: Tensor, quantities: dict[str, Quantity], stimuli: Stimuli, labels: dict[str, list[str]]
) -> list[str]:
    """What the numbers say, in sentences."""
    counts, corrected = found.counts(), found.counts(corrected=True)
    total = int((found.kinds >= 0).sum())
    busiest = [labels["layer"][int(counts[:, kind].argmax())] for kind in range(2)]
    power = quantities["power"].values.mean(1)[:, stimuli.bins]
    passed = (found.passed.nansum((1, 2)) / total).tolist()
    told = [
        f"Of {total} neurons {int(counts[:, 0].sum())} follow sentences alone, {int(counts[:, 1].sum())} phrases alone "
        f"and {int(counts[:, 2].sum())} both"
        + (
            f": most of the first kind in layer {busiest[0]}, of the second in layer {busiest[1]}. "
            if bool(counts[:, :2].sum(0).all())
            else ". "
        )
        + f"With experiment and control exchanged they are {', '.join(map(str, swapped.sum(0).tolist()))}.",
        f"Corrected for many tests they are {', '.join(map(str, corrected.sum(0).tolist()))}. The permutation test "
        f"alone, which 5 % pass by chance, is passed by {passed[0]:.1%} at the rate of sentences and by "
        f"{passed[1]:.1%} at {'one' if len(stimuli.bins) > 2 else 'that'} of phrases.",
        f"Over {stimuli.samples} units, the rate of sentences holds {float(power[0, 0]):.1%} of a neuron's power "
        f"({float(power[1, 0]):.1%} in the control), and that of phrases {float(power[0, 1:].sum()):.1%} "
        f"({float(power[1, 1:].sum()):.1%}).",
    ]
    return told


def caveats(stimuli: Stimuli, found: Tagging) -> list[str]:
    """What the numbers do not mean."""
    nonzero = int((found.values > 0).any(0).sum())
    said = [
        "Whatever comes once a sentence and is not a sine also has power at twice that rate: a neuron that fires on "
        "one word of each sentence counts as both. The control of phrases tells them apart.",
        "Sentences that are built alike repeat kinds of words at their own rate, even for a model without grammar. The "
        "control of classes keeps that rhythm.",
        f"z is over all neurons, of which {nonzero} are not zero: the fewer they are, the easier a z above "
        f"{THRESHOLD:g} is. Amplitudes are in the activations' own size, so layers where they are large stand out. It "
        "says who stands out, not how many there are; the corrected verdict does.",
    ]
    if stimuli.size == 4:
        said.append(
            "Phrases of two have half the rate of the words, the last frequency there is: there the transform has no "
            "phase and tells only every other word from the rest."
        )
    if not stimuli.exact:
        said.append("Some rates of phrases are no frequencies of the transform; the nearest ones stand for them.")
    return said
