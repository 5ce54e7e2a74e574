"""How well a model's layers predict a recording, which layers do, and how much could be predicted at all."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, factorial
from typing import Annotated, Literal

import torch
from torch import Tensor

from ....data import Specimen
from ....errors import BadData, NotApplicable, TransectError
from ....parameters import Range
from ...draw import Drawing, Table, bars, heatmap, lines
from ...registry import probing
from ...result import Quantity, Result
from .banded import apart, candidates_for, contributions, correlations, fit
from .ceiling import LEAST, from_repeats, from_subjects
from .features import features_of, kernel_of, pace_of
from .recordings import FORMAT, Recording, load_recording
from .significance import BLOCK, block_p, false_discovery

Ceiling = Literal["repeats", "subjects"]
LEAST_TRAINING, LEAST_HELD_OUT = 24, 10  # samples
LEVEL = 0.05  # of false discoveries
SHOWN = 100  # channels in a heatmap; more are not told apart
PACE = "words and letters"


@dataclass(frozen=True)
class Alignment:
    """What was found. S states, K bands, V channels, m samples that are held out.

    alone: r of each state alone (S x V), and by the pace of the words alone (V). validation: R² on blocks of the
    training samples (S x V). together, parts: r (V) and R² by band (K x V) of banded ridge. p: of r (V).
    """

    alone: Tensor
    pace: Tensor
    validation: Tensor
    together: Tensor
    parts: Tensor
    weights: Tensor
    p: Tensor

    @property
    def best(self) -> Tensor:
        """State of each channel, chosen on the training samples (V)."""
        return self.validation.argmax(0)

    @property
    def best_r(self) -> Tensor:
        """r of that state (V)."""
        return self.alone.gather(0, self.best[None])[0]


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    alone, channels = result["r alone"], result.labels["channel"]
    best = result["best"].bincount(minlength=len(alone))
    profile = {
        "each layer alone": alone.mean(1),
        "number of words and letters alone": result["r pace"].mean().expand(len(alone)),
    }
    drawn: list[Drawing] = [
        lines(
            "How well each layer predicts the recording",
            "Correlation of prediction and response on samples held out, mean over channels. State 0 is the embedding. "
            "The line is what the number of words and letters predicts by itself.",
            profile | {"all bands together": result["r"].mean().expand(len(alone))}, xlabel="state", ylabel="r",
        ),
        bars(
            "Best layer of each channel", "Chosen on blocks of the training samples, before those held out are seen.",
            {"channels": best}, xlabel="state", ylabel="channels",
        ),
        bars(
            "What each band of layers adds",
            "Product measure of banded ridge, mean over channels: the bars sum to R² on samples held out.",
            {"R²": result["R2"].mean(1)}, x=result.labels["band"], xlabel="band", ylabel="R²",
        ),
    ]  # fmt: skip
    if len(channels) <= SHOWN:
        drawn.append(
            heatmap(
                "Layers and channels", "r of each layer alone on samples held out.", alone.T, y=channels,
                xlabel="state", ylabel="channel", diverging=True,
            )
        )  # fmt: skip
    rows = []
    for number in result["r"].sort(descending=True).indices[:20].tolist():
        row = [channels[number], int(result["best"][number]), f"{float(result['r best'][number]):.3f}"]
        row += [f"{float(result['r'][number]):.3f}", f"{float(result['q'][number]):.2g}"]
        if "ceiling" in result.quantities:
            row += [f"{float(result[name][number]):.3f}" for name in ("ceiling", "normalised")]
        rows.append(row)
    columns = ["channel", "best state", "r of it", "r of all bands", "q"]
    columns += ["ceiling", "normalised"] if "ceiling" in result.quantities else []
    drawn.append(
        Table(
            "Channels that are predicted best",
            f"q: rate of false discoveries. normalised: r over the ceiling, where that is {LEAST} or more.",
            columns, rows,
        )
    )  # fmt: skip
    return drawn


@probing("brain-alignment", title="Alignment with a recording", paper="arXiv:2506.08277", draw=draw)
def brain_alignment(
    specimen: Specimen,
    *,
    recording: str = "",
    first_delay: Annotated[int, Range(0, 1000)] = 1,
    last_delay: Annotated[int, Range(0, 1000)] = 5,
    bands: Annotated[int, Range(1, 100)] = 3,
    candidates: Annotated[int, Range(0, 10000)] = 20,
    held_out: Annotated[float, Range(0.05, 0.5)] = 0.2,
    context: Annotated[int, Range(2, 1_000_000)] = 256,
    permutations: Annotated[int, Range(100, 1_000_000)] = 5000,
    ceiling: Ceiling = "repeats",
) -> Result:
    """Predict a recording of many channels from each layer, by banded ridge, against how much can be predicted at all.

    Oota et al. 2025, after la Tour et al. 2022. Features of a sample: mean of a layer's residual stream over the tokens
    of the words that began in it, standardised by the training samples, at delays of 1 to 5 samples. Ridge regression
    for every channel, its penalty chosen on four contiguous blocks of the training samples; score: Pearson's r on
    samples held out. Each state of the stream alone; then bands of neighbouring layers together, each band with a
    penalty of its own (λ / γ_k with γ on the simplex, by random search), and what each band explains (product measure,
    sums to R²). p: predictions permuted in blocks of ten samples; q: Benjamini and Hochberg over channels.

    Where the recording has repeats, the mean over them is predicted and r is divided by the ceiling, the largest r
    that what repeats have in common allows. With ceiling=subjects they are people: each one's channels are predicted,
    and the ceiling comes from predicting them by other people's channels, extrapolated over their number (the paper's
    way; at least three). Channels with a ceiling below 0.05 are not normalised.

    Ours: held out are the last runs, or the end of the only one, and samples within the longest delay of them are not
    trained on, where the paper tests on another film; training statistics standardise all (the paper standardises the
    test set by itself); contiguous blocks choose penalties (the paper takes a random tenth); a band of its own for the
    number of words and letters, which any feature of words knows; λ from 10⁻³ to 10⁴ of a kernel's mean diagonal.
    Memory: (states + bands) x samples² numbers at most a few at a time; time: samples³ for each layer and candidate.

    recording: a file, .csv (a row a sample: its `words`, and a column of numbers a channel) or .npz. Needed.
    first_delay: samples from a word to the first response that it explains; 0 for recordings without a lag.
    last_delay: samples to the last one.
    bands: how many bands of neighbouring layers share a penalty.
    candidates: random choices of how penalties are shared among bands.
    held_out: share of the samples, at least, on which predictions are scored.
    context: tokens that the model reads at once.
    permutations: for the p values.
    ceiling: what repeats are, of the same subject or of different ones.
    """
    if not recording:
        raise NotApplicable(f"it needs a recording: pass --brain-alignment.recording FILE ({FORMAT})")
    if last_delay < first_delay:
        raise TransectError(f"the last delay, {last_delay}, is before the first, {first_delay}")
    read = load_recording(recording)
    repeats = len(read.responses)
    if ceiling == "subjects" and repeats < 3:
        raise BadData(f"ceilings from other subjects need three subjects at least, and the recording has {repeats}")
    training, tested = split(read.runs, held_out, last_delay)
    check(read, training, tested)
    delays = range(first_delay, last_delay + 1)
    features = features_of(specimen, read, context)
    ranges = [
        range(int(one[0]), int(one[-1]) + 1) for one in torch.arange(len(features)).tensor_split(bands) if len(one)
    ]
    targets = read.responses.permute(1, 0, 2).flatten(1) if ceiling == "subjects" else read.responses.mean(0)
    found = align(
        specimen, read, features, targets, ranges, training, tested, delays=delays, candidates=candidates,
        permutations=permutations,
    )  # fmt: skip
    top = None
    if ceiling == "subjects":
        top = from_subjects(read.responses, training, tested, last_delay, specimen.seed).flatten()
    elif repeats > 1:
        top = from_repeats(read.responses)
    names = list(read.names)
    if ceiling == "subjects":
        names = [f"{name}, subject {subject}" for subject in range(repeats) for name in names]
    labels = {"channel": names, "band": [PACE, *(band_name(one) for one in ranges)]}
    quantities = measured(found, top)
    said = caveats(top, repeats, len(tested))
    return Result(quantities, findings(found, quantities, labels, len(training), len(tested)), said, labels)


def split(runs: Tensor, share: float, gap: int) -> tuple[Tensor, Tensor]:
    """Samples to train on and samples held out: the last runs, or the end of the only run, with `gap` between."""
    samples, numbers = torch.arange(len(runs)), runs.unique_consecutive()
    if len(numbers) == 1:
        held_out = samples[len(samples) - round(share * len(samples)) :]
        return apart(samples[: -len(held_out) or None], held_out, gap), held_out
    for first in reversed(range(1, len(numbers))):
        held_out = samples[runs >= numbers[first]]
        if len(held_out) >= share * len(samples):
            break
    return samples[runs < numbers[first]], held_out


def check(recording: Recording, training: Tensor, held_out: Tensor) -> None:
    """BadData where samples are too few, or a channel does not vary in one of the parts."""
    if len(training) < LEAST_TRAINING or len(held_out) < LEAST_HELD_OUT:
        raise BadData(
            f"the recording has {len(recording.words)} samples, of which {len(training)} are to train on and "
            f"{len(held_out)} held out; it needs {LEAST_TRAINING} and {LEAST_HELD_OUT} at least"
        )
    for samples, what in ((training, "trained on"), (held_out, "held out")):
        still = (recording.responses[:, samples] == recording.responses[:, samples[:1]]).all(1).any(0)
        if bool(still.any()):
            name = recording.names[int(still.nonzero()[0])]
            raise BadData(f"{name!r} of the recording never changes in the samples that are {what}; leave it out")


def align(
    specimen: Specimen, recording: Recording, features: Tensor, targets: Tensor, ranges: list[range],
    training: Tensor, held_out: Tensor, *, delays: range, candidates: int, permutations: int,
) -> Alignment:  # fmt: skip
    """Fit every state alone and the bands together. features: S x N x d. targets: N x V."""
    gap, one = max(delays), candidates_for(1, 0, 0)
    wanted = targets[held_out]
    runs, heard = recording.runs, torch.tensor([bool(words) for words in recording.words])
    pace = kernel_of(pace_of(recording), torch.ones_like(heard), runs, training, delays)
    by_band = [pace, *(torch.zeros_like(pace) for _ in ranges)]
    alone, validation = [], []
    for state in specimen.shown(range(len(features)), "brain-alignment, layers"):
        kernel = kernel_of(features[state], heard, runs, training, delays)
        made = fit(kernel[None], targets, training, held_out, candidates=one, gap=gap)
        alone.append(correlations(made.predicted, wanted))
        validation.append(made.validation)
        band = next(number for number, states in enumerate(ranges, 1) if state in states)
        by_band[band] += kernel / len(ranges[band - 1])
    paced = fit(pace[None], targets, training, held_out, candidates=one, gap=gap)
    choices = candidates_for(len(by_band), candidates, specimen.seed)
    banded = fit(torch.stack(by_band), targets, training, held_out, candidates=choices, gap=gap)
    return Alignment(
        torch.stack(alone), correlations(paced.predicted, wanted), torch.stack(validation),
        correlations(banded.predicted, wanted), contributions(banded.parts, wanted), banded.weights.T,
        block_p(banded.predicted, wanted, permutations, specimen.seed),
    )  # fmt: skip


def band_name(states: range) -> str:
    """Such as "states 0-3"."""
    return f"states {states[0]}-{states[-1]}" if len(states) > 1 else f"state {states[0]}"


def measured(found: Alignment, ceiling: Tensor | None) -> dict[str, Quantity]:
    """What was found, as arrays."""
    cells, channel = ("state", "channel"), ("channel",)
    made = {
        "r alone": Quantity(found.alone, cells, "correlation", "of each state alone, on samples held out"),
        "validation": Quantity(found.validation, cells, "share", "R² on blocks of the training samples"),
        "best": Quantity(found.best, channel, "", "state with the largest R² on blocks of the training samples"),
        "r best": Quantity(found.best_r, channel, "correlation", "of that state alone, on samples held out"),
        "r pace": Quantity(found.pace, channel, "correlation", "of the number of words and letters alone"),
        "r": Quantity(found.together, channel, "correlation", "of all bands together, on samples held out"),
        "R2": Quantity(found.parts, ("band", "channel"), "share", "of the variance held out, by band"),
        "weight": Quantity(found.weights, ("band", "channel"), "share", "γ that was chosen"),
        "p": Quantity(found.p, channel, "probability", "of r, by permutations in blocks"),
        "q": Quantity(false_discovery(found.p), channel, "", "rate of false discoveries at which r is one"),
    }  # fmt: skip
    if ceiling is not None:
        normalised = torch.where(ceiling >= LEAST, found.together / ceiling.clamp_min(LEAST), torch.nan)
        made["ceiling"] = Quantity(ceiling, channel, "correlation", "that a perfect prediction would reach")
        made["normalised"] = Quantity(normalised, channel, "", "r of all bands over the ceiling")
    return made


def findings(
    found: Alignment, quantities: dict[str, Quantity], labels: dict[str, list[str]], training: int, held_out: int
) -> list[str]:
    """What the numbers say, in sentences."""
    from scipy.stats import wilcoxon

    profile, channels = found.alone.mean(1), found.alone.shape[1]
    significant = int((quantities["q"].values < LEVEL).sum())
    chosen = int(found.best.bincount(minlength=len(profile)).argmax())
    told = [
        f"All bands together predict {significant} of {channels} channels better than chance (false discoveries below "
        f"{LEVEL:.0%}), with r = {float(found.together.mean()):.3f} on average over {held_out} samples held out, after "
        f"{training} to train on."
    ]
    if channels > 1 and len(profile) > 1:
        by_state = f"State {chosen} is the best of most channels" if len(found.best.unique()) > 1 else (
            f"State {chosen} is the best of all channels"
        )  # fmt: skip
        gain = found.best_r - found.alone[0]
        p = float(wilcoxon(gain.numpy())[1]) if bool(gain.any()) else 1.0  # type: ignore[arg-type]
        told.append(
            f"{by_state} on the training samples. r of each channel's best state is {float(found.best_r.mean()):.3f} "
            f"on average, {float(gain.mean()):+.3f} against the embedding (Wilcoxon signed-rank over channels: "
            f"p = {p:.2g}); the number of words and letters alone gives {float(found.pace.mean()):.3f}."
        )
    shares = found.parts.mean(1)
    listed = ", ".join(f"{name} {float(one):+.3f}" for name, one in zip(labels["band"], shares, strict=True))
    told.append(f"Of the variance held out {float(shares.sum()):.3f} is explained, by band: {listed}.")
    if "ceiling" in quantities:
        normalised = quantities["normalised"].values
        real = normalised[normalised.isfinite()]
        told.append(
            f"{len(real)} channels have a ceiling of {LEAST} or more"
            + (
                f", {float(quantities['ceiling'].values.mean()):.3f} on average; over it r is "
                f"{float(real.median()):.3f} in the median."
                if len(real)
                else ": nothing that repeats can be predicted."
            )
        )
    return told


def caveats(ceiling: Tensor | None, repeats: int, held_out: int) -> list[str]:
    """What the numbers do not mean."""
    said = [
        "A layer that predicts a recording need not compute what the brain does; untrained models and the number of "
        "words predict some of it too.",
        "Channels of one recording are not independent: tests over channels are too sure of themselves.",
        f"p values come from changing the places of blocks of {BLOCK} samples; a slower response than that is "
        "correlated beyond a block.",
        "R² by band depends on how bands share what they have in common; one below zero predicts worse than nothing.",
    ]
    orders = factorial(ceil(held_out / BLOCK))
    if orders < 1 / LEVEL**2:
        said.append(
            f"The samples held out have only {orders} orders of their blocks: no p value is below 1 / {orders}."
        )
    if ceiling is None:
        said.append("The recording has no repeats, so how much of it could be predicted at all is not known.")
    elif repeats < 4:
        said.append(f"The ceiling comes from {repeats} repeats and is itself uncertain.")
    return said
